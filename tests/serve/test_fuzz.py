"""Random requests on every route, right and wrong fields mixed, and random bytes: no 5xx, nothing held after (H4)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serve.running import Answer, Running, user
from tests.serve.test_answers import CLOCK, PERSON, WEATHER
from tests.serve.test_requests import ENDPOINTS

pytestmark = pytest.mark.timeout(250)
WORDS = st.text(max_size=8) | st.sampled_from(
    ["stub", "auto", "none", "required", "text", "<|im_end|>", "\x00", "🐟", ""]
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-3, 40) | st.integers() | st.floats(allow_nan=False) | WORDS
    | st.sampled_from([2**63, -(2**63), 1e308, -0.0, 0.5])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=8
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "developer", "tool", "x"]), "content": WORDS | VALUES},
        optional={"name": WORDS, "tool_calls": VALUES, "tool_call_id": WORDS},
    ),
    min_size=1,
    max_size=4,
)
SHAPES = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "json_object", "json_schema", "x"])},
    optional={"json_schema": st.fixed_dictionaries({"name": WORDS, "schema": VALUES | st.just(PERSON)})},
)
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "messages": MESSAGES,
    "tools": st.lists(st.sampled_from([WEATHER, CLOCK]) | VALUES, max_size=3),
    "tool_choice": st.sampled_from(["auto", "none", "required", {"type": "function", "function": {"name": "clock"}}]),
    "response_format": SHAPES,
    "regex": st.sampled_from(["a+", "(a|b){2}", "[", "(?i)x", "\\d{1,3}"]) | WORDS,
    "grammar": st.sampled_from(['start: "a"', "start: x", "%llguidance {}"]) | WORDS,
    "prompt": WORDS | st.lists(st.integers(0, 300), max_size=5) | st.lists(WORDS, max_size=3),
    "input": WORDS | st.lists(st.integers(0, 300), max_size=5) | st.lists(WORDS, max_size=3),
    "tokens": st.lists(st.integers(-1, 300), max_size=6),
    "logit_bias": st.dictionaries(st.integers(-2, 300).map(str), st.floats(-101, 101), max_size=3),
    "stop": WORDS | st.lists(WORDS, max_size=9),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": LEAVES, "include_obfuscation": LEAVES}),
}
NAMES = {path: [field.name for field in table] for path, (_, table) in ENDPOINTS.items()}


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A route and a body of it with up to six fields drawn anew, of their kind or of any."""
    path = draw(st.sampled_from(sorted(ENDPOINTS)))
    body = dict(ENDPOINTS[path][0])
    for name in draw(st.lists(st.sampled_from(NAMES[path]), max_size=6, unique=True)):
        ours = [field for field in ENDPOINTS[path][1] if field.name == name]
        kind = PLAUSIBLE.get(name, st.sampled_from([0, 1, 2, 0.5, True, False, ours[0].default]))
        body[name] = draw(kind if draw(st.integers(0, 3)) else VALUES)
    if "max_tokens" in NAMES[path] and (body.get("max_tokens") is None or draw(st.booleans())):
        body["max_tokens"] = draw(st.integers(1, 6))
    return path, body


def right(answer: Answer, sent: Any) -> None:
    """A whole answer, or an error of OpenAI's shape that is the client's."""
    assert 200 <= answer.status < 500, (sent, answer.raw[:2000])
    if answer.status >= 400:
        assert answer.error["message"] and answer.error["code"], (sent, answer.raw)
    elif "text/event-stream" in answer.headers.get("content-type", ""):
        events = answer.events()
        assert events[-1] == "[DONE]" or events[-1]["error"]["code"], (sent, events[-2:])
        if events[-1] != "[DONE]":
            assert events[-1]["error"]["type"] == "invalid_request_error", (sent, events[-1])


def fuzz_fields(server: Running, examples: int) -> None:
    @given(bodies())
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(drawn: tuple[str, dict[str, Any]]) -> None:
        path, body = drawn
        try:
            data = json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            data = json.dumps(body).encode()
        right(server.post(path, data), drawn)

    check()


def fuzz_wire(server: Running, examples: int) -> None:
    methods = st.sampled_from([b"GET", b"POST", b"PUT", b"HEAD", b"OPTIONS", b"PATCH", b"FOO", b""])
    paths = st.sampled_from([*(path.encode() for path in ENDPOINTS), b"/", b"/metrics", b"/v1/status", b"/%ff", b"*"])
    letters = st.binary(max_size=12).map(lambda raw: raw.replace(b"\r\n\r\n", b""))
    names = st.sampled_from(
        [b"X", b"Host", b"Content-Length", b"Transfer-Encoding", b"Expect", b"Range", b"Connection"]
    )
    headers = st.lists(st.tuples(names, letters), max_size=4)

    @given(methods, paths | letters, headers, st.binary(max_size=40))
    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    def check(method: bytes, path: bytes, extra: list[tuple[bytes, bytes]], body: bytes) -> None:
        lines = b"".join(name + b": " + value + b"\r\n" for name, value in extra)
        raw = method + b" " + path + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" + lines
        raw += b"Content-Length: %d\r\n\r\n" % len(body) + body
        answer = server.raw(raw)
        if answer:
            status = int(answer.split(b" ", 2)[1])
            assert status < 500, (raw, answer[:500])

    check()


def test_random_fields_together(server: Running) -> None:
    fuzz_fields(server, 250)
    assert server.chat(messages=[user("hi")]).status == 200


def test_random_requests_on_the_wire(server: Running) -> None:
    fuzz_wire(server, 150)
    assert server.get("/livez").status == 200
