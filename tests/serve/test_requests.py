"""What is wrong with a request is said with the field and a code; it is never a 5xx (H1 to H7, H25 to H27)."""

from __future__ import annotations

import json
import string
import time
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serve.running import Running, user
from tests.serve.stub import CONTROL, USER
from trivium.serve import schema
from trivium.serve.errors import ApiError
from trivium.serve.fields import Field
from trivium.serve.limits import Limits
from trivium.serve.strict_json import parse

pytestmark = pytest.mark.timeout(150)
CHAT = {"model": "stub", "messages": [user("hi")], "max_tokens": 2}
TEXT = {"model": "stub", "prompt": "hi", "max_tokens": 2}
ENDPOINTS: dict[str, tuple[dict[str, Any], tuple[Field, ...]]] = {
    "/v1/chat/completions": (CHAT, schema.chat_fields(Limits())),
    "/v1/completions": (TEXT, schema.completion_fields(Limits())),
    "/v1/embeddings": ({"model": "stub", "input": "hi"}, schema.embedding_fields(Limits())),
    "/tokenize": ({"prompt": "hi"}, schema.tokenize_fields(Limits())),
    "/detokenize": ({"tokens": [65]}, schema.detokenize_fields(Limits())),
}
FIELDS = [(path, field.name) for path, (_, table) in ENDPOINTS.items() for field in table]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"   ", "empty"),
        (b'{"model": "stub", ', "character 18"),
        (b'{"a": 1,}', "character 8"),
        (b'{"a": "\xff"}', "byte 0xff at offset 7"),
        (b'\xef\xbb\xbf{"a": 1}', "byte order mark"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16"),
        (b"[1]", "list"),
        (b'"x"', "string"),
        (b"17", "number"),
        (b"null", "null"),
        (b'{"a": 1, "a": 2}', '"a" stands twice'),
        (b'{"temperature": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"),
        (b'{"temperature": -Infinity}', "-Infinity"),
        (b'{"temperature": 1e999}', "1e999"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", "4300 digits"),
        (b'{"prompt": "\\ud800"}', "\\ud800"),
        (b'{"\\udfff": 1}', "\\udfff"),
        (b'{"a": "tab\there"}', "character 10"),
    ],
)
def test_a_body_that_is_no_json_object(server: Running, body: bytes, said: str) -> None:  # H1, H2, H3, H6
    for path in ENDPOINTS:
        answer = server.post(path, body)
        assert answer.status == 400, answer.raw
        assert said in answer.error["message"]


def test_any_bytes_are_read_or_refused() -> None:
    @given(st.binary(max_size=200) | st.text(alphabet='{}[]":,\\u0d8 1eE+-.ntrf', max_size=60).map(str.encode))
    @settings(max_examples=150)
    def check(body: bytes) -> None:
        try:
            assert isinstance(parse(body, Limits()), dict)
        except ApiError as error:
            assert error.status == 400

    check()


def test_strict_json_agrees_with_json_on_what_is_right() -> None:
    leaves = st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.text(max_size=8)
    values = st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )

    @given(st.dictionaries(st.text(max_size=5), values), st.booleans())
    @settings(max_examples=60)
    def check(value: dict[str, Any], escaped: bool) -> None:
        assert parse(json.dumps(value, ensure_ascii=escaped).encode(), Limits()) == value

    check()


WRONG = [
    True,
    1.5,
    -1,
    2**70,
    "x" * 70_000,
    [],
    {},
    [[]],
    [{}],
    {"a": []},
    [None],
    0,
    -(10**30),
    "\x00",
    "",
    [1.5],
    1e308,
]


@pytest.mark.parametrize(("path", "name"), FIELDS, ids=[f"{path}:{name}" for path, name in FIELDS])
def test_each_field_given_anything(server: Running, path: str, name: str) -> None:  # H2, H4, H6
    refused = 0
    for value in WRONG:
        answer = server.post(path, ENDPOINTS[path][0] | {name: value})
        if answer.status == 200:
            continue
        refused += 1
        error = answer.error
        assert answer.status in (400, 404), (value, answer.raw)
        conflicts = {"stream", "logprobs", "messages", "prompt", "max_tokens", "tools"}
        assert (error["param"] or "").startswith(name) or error["param"] in conflicts, (value, error)
        assert error["code"] and error["message"]
    assert refused >= 3


@pytest.mark.parametrize(
    "field", [f for f in schema.chat_fields(Limits()) if not f.honoured], ids=lambda f: str(f.name)
)
def test_what_is_not_supported_is_refused_not_ignored(server: Running, field: Field) -> None:
    answer = server.post("/v1/chat/completions", CHAT | {field.name: {"something": "else"}})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "unsupported_parameter", field.name)
    assert server.post("/v1/chat/completions", CHAT | {field.name: None}).status == 200


def test_an_unknown_field_gets_a_suggestion(server: Running) -> None:  # H5
    answer = server.post("/v1/completions", TEXT | {"temprature": 1})
    assert answer.status == 400
    assert answer.error["param"] == "temprature"
    assert "did you mean temperature?" in answer.error["message"]
    nested = server.chat(response_format={"type": "json_object", "jsonschema": {}})
    assert (nested.status, nested.error["param"]) == (400, "response_format.jsonschema")


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 100_000,
        b"[" * 1_000_000,
        b'{"a":' + b"[" * 400_000 + b"]" * 400_000 + b"}",
        b"{" + b",".join(b'"%d":1' % i for i in range(200_000)) + b"}",
        b'{"a":[' + b",".join([b"[]"] * 500_000) + b"]}",
        b'{"a":[' + b",".join([b"{}"] * 500_000) + b"]}",
        b'{"a":"' + b"\\\\" * 1_000_000,
        b'{"a":"' + b'\\"' * 1_000_000,
    ],
    ids=["objects", "lists", "closed", "keys", "empty lists", "empty objects", "backslashes", "quotes"],
)
def test_deep_and_wide_json_is_left_early(body: bytes) -> None:  # H7
    body = body[: Limits().body_bytes]
    process = psutil.Process()
    with pytest.raises(ApiError):
        parse(b'{"a":' * 40, Limits())
    times = []
    before = process.memory_info().rss
    for _ in range(3):
        started = time.thread_time()
        with pytest.raises(ApiError) as caught:
            parse(body, Limits())
        times.append(time.thread_time() - started)
        assert caught.value.status == 400
    assert min(times) < 0.05
    assert process.memory_info().rss - before < 10 << 20


def test_text_comes_back_as_it_was(server: Running) -> None:  # H3
    text = "nul \x00, right to left \u202eabc\u202c, \u05d0\u05d1, a\u0308, 🐟👩‍👩‍👧, \ufeff, \ufffd"
    tokens = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": text}
    answer = server.post("/v1/completions", {"model": "stub", "prompt": text, "echo": True, "max_tokens": 0})
    assert answer.json()["choices"][0]["text"] == text


def test_characters_are_never_split(server: Running) -> None:  # H3: the reply has letters of 2 and 4 bytes
    for stream_chunk in server.chat(stream=True, max_tokens=200).events()[:-1]:
        text = stream_chunk["choices"][0]["delta"].get("content", "")
        assert "\ufffd" not in text
        text.encode()


def test_the_model_must_be_the_served_one(server: Running) -> None:  # H26
    for body in (CHAT | {"model": "gpt-9"}, {"messages": CHAT["messages"]}, CHAT | {"model": ""}):
        answer = server.post("/v1/chat/completions", body)
        assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert server.get("/v1/models/other").status == 404
    assert server.get("/v1/models/stub").json()["id"] == "stub"


@pytest.mark.parametrize("text", CONTROL)
def test_control_tokens_in_content_are_text(server: Running, text: str) -> None:  # H27
    tokens = server.post("/tokenize", {"messages": [user(f"a{text}b")]}).json()["tokens"]
    assert [token for token in tokens if token >= 256] == [USER, 256, 258]
    plain = server.post("/tokenize", {"prompt": text}).json()["tokens"]
    assert bytes(plain).decode() == text
    answer = server.chat(messages=[{"role": f"user{text}", "content": "x"}])
    assert (answer.status, answer.error["param"]) == (400, "messages[0].role")
    assert server.chat(chat_template="{{ 1 }}").status == 400


def test_a_prompt_beyond_the_context(server: Running) -> None:  # I6
    for body in (TEXT | {"prompt": "x" * 4096}, TEXT | {"prompt": [1] * 4096}, TEXT | {"prompt": "x" * 100_000}):
        answer = server.post("/v1/completions", body)
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
        assert "4096" in answer.error["message"]
    assert server.post("/v1/completions", TEXT | {"prompt": "x" * 4095}).status == 200
    clipped = server.post("/v1/completions", TEXT | {"prompt": "x" * 4090, "max_tokens": 100}).json()
    assert clipped["choices"][0]["finish_reason"] == "length"


def test_tokens_beyond_the_vocabulary(server: Running) -> None:
    answer = server.post("/v1/completions", TEXT | {"prompt": [1, 2, 261]})
    assert (answer.status, answer.error["param"]) == (400, "prompt[2]")


PING = {"type": "function", "function": {"name": "ping"}}
GRAMMARS: list[tuple[dict[str, Any], str]] = [
    ({"regex": "(a|b"}, "regex"),
    ({"regex": "(?=a)b"}, "regex"),
    ({"regex": ""}, "regex"),
    ({"grammar": "start: nothing"}, "grammar"),
    ({"grammar": 'start: "a" start2'}, "grammar"),
    ({"grammar": "x" * 65_537}, "grammar"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}}, "resp"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}}, "resp"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}}, "resp"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex"),
    ({"regex": "a", "ignore_eos": True}, "ignore_eos"),
    ({"regex": "a", "min_tokens": 1}, "min_tokens"),
    ({"regex": "ab", "stop": "b"}, "stop"),
    ({"response_format": {"type": "json_object"}, "stop": ["{"]}, "stop"),
    ({"grammar": 'start: "ab"', "stop_token_ids": [97]}, "stop_token_ids"),
    ({"tools": [PING], "stop": ["name"]}, "stop"),
    ({"tools": [PING], "tool_choice": "required", "stop_token_ids": [34]}, "stop_token_ids"),
]


@pytest.mark.parametrize(("fields", "param"), GRAMMARS, ids=[f"{i}-{param}" for i, (_, param) in enumerate(GRAMMARS)])
def test_a_grammar_that_cannot_be_used_is_refused(server: Running, fields: dict[str, Any], param: str) -> None:  # H25
    answer = server.chat(**fields)
    assert answer.status == 400, answer.raw
    assert (answer.error["param"] or "").startswith(param)


@pytest.mark.parametrize(
    "regex",
    ["(a+)+$", "(a|a)*b?", "(.*)*", "((a+)+)+c?", "[a-z]{1,9999}", "(x+x+)+y", "(((a{1,999}){1,999}){1,999}){1,999}"],
)
def test_a_catastrophic_expression_is_harmless(server: Running, regex: str) -> None:  # H25
    answer = server.chat(regex=regex, max_tokens=20)
    assert answer.status in (200, 400)
    assert server.get("/readyz").status == 200


def test_a_deep_schema_is_refused(server: Running) -> None:  # H25
    deep: dict[str, Any] = {}
    for _ in range(40):
        deep = {"type": "array", "items": deep}
    answer = server.chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": deep}})
    assert (answer.status, answer.error["code"]) == (400, "json_too_deep")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"n": 9}, "n"),
        ({"stop": ["x"] * 9}, "stop"),
        ({"stop": "x" * 65}, "stop[0]"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"messages": [user("x")] * 257}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [user("x") | {"tool_calls": []}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"logit_bias": {"1": 5, "01": -5}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
        ({"user": "x" * 257}, "user"),
    ],
)
def test_caps_and_combinations(server: Running, fields: dict[str, Any], param: str) -> None:
    answer = server.chat(**fields)
    assert answer.status == 400, answer.raw
    assert (answer.error["param"] or "").startswith(param), answer.error


def test_the_body_must_be_json_by_its_type(server: Running) -> None:
    body = json.dumps(CHAT).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        assert server.post("/v1/chat/completions", body, {"Content-Type": kind}).status == 415
    assert server.post("/v1/chat/completions", body, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
    assert server.post("/v1/chat/completions", body, {"Content-Type": ""}).status == 200
    assert server.post("/v1/chat/completions", body, {"Content-Encoding": "gzip"}).status == 415


def test_random_requests_never_fail_the_server(server: Running) -> None:  # H4
    words = st.text(alphabet=string.printable, max_size=6)
    leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3))

    @given(st.sampled_from(FIELDS), values)
    @settings(max_examples=150)
    def check(place: tuple[str, str], value: Any) -> None:
        path, name = place
        body = ENDPOINTS[path][0] | {"max_tokens": 2} if "completions" in path else dict(ENDPOINTS[path][0])
        answer = server.post(path, body | {name: value})
        assert answer.status < 500, (path, name, value, answer.raw)

    check()
