"""Answers as the official client reads them: whole and streamed, choices, log-probabilities, grammars, tools."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from tests.serve.running import Running, user
from tests.serve.stub import REPLY

pytestmark = pytest.mark.timeout(150)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def spoken(prompt_sum: int, count: int) -> str:
    """What the stub says."""
    reply = REPLY.encode()
    return bytes(reply[(prompt_sum + i) % len(reply)] for i in range(count)).decode(errors="replace")


def test_a_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="stub", messages=[user("hi")], max_completion_tokens=6)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == spoken(257 + 258 + 256 + sum(b"hi"), 6)
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 6, 11)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "stub", "messages": [user("hello")], "max_tokens": 90, "n": 2}
    whole = client.chat.completions.create(**asked)
    texts = ["", ""]
    finishes: list[str | None] = [None, None]
    usage = None
    roles = 0
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            usage = chunk.usage
        for choice in chunk.choices:
            assert chunk.usage is None
            roles += choice.delta.role == "assistant"
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert "🐟" in texts[0]
    assert (finishes, roles) == (["length", "length"], 2)
    assert usage == whole.usage


def test_stop_strings_and_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="stub", messages=[user("hi")], max_tokens=90, stop=["élan", "zzz"])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content is not None
    assert answer.choices[0].message.content.endswith("and ") or "élan" not in answer.choices[0].message.content
    at_comma = client.completions.create(
        model="stub", prompt="hi", max_tokens=90, extra_body={"stop_token_ids": [ord(",")]}
    )
    assert at_comma.choices[0].finish_reason == "stop"


def test_seeds_repeat(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        return client.completions.create(model="stub", prompt="x", max_tokens=20, seed=seed).choices[0].text

    assert draw(1) == draw(1) != draw(2)
    assert draw(-(2**63)) == draw(-(2**63))


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "stub", "messages": [user("hi")], "max_tokens": 5}
    entries: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, stream=True):
            if chunk.choices and chunk.choices[0].logprobs:
                entries += chunk.choices[0].logprobs.content or []
    else:
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert answer.choices[0].logprobs is not None
        entries = answer.choices[0].logprobs.content or []
    assert len(entries) == 5
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == spoken(257 + 258 + 256 + sum(b"hi"), 5)
    assert [len(entry.top_logprobs) for entry in entries] == [2] * 5
    assert entries[0].logprob == -0.5
    assert client.chat.completions.create(**asked).choices[0].logprobs is None


def test_completion_logprobs_with_echo(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "stub", "prompt": "abc", "max_tokens": 3, "logprobs": 1, "echo": True}
    answer = client.completions.create(**asked).choices[0]
    assert answer.text == "abc" + spoken(sum(b"abc"), 3)
    lists = answer.logprobs
    assert lists is not None and lists.token_logprobs is not None and lists.tokens is not None
    assert "".join(lists.tokens) == answer.text
    assert lists.text_offset == list(range(6))
    assert (lists.token_logprobs[0], lists.token_logprobs[1:]) == (None, [-1.0, -1.0, -0.5, -0.5, -0.5])
    tokens: list[str] = []
    offsets: list[int] = []
    text = ""
    for chunk in client.completions.create(**asked, stream=True):
        part = chunk.choices[0]
        text += part.text
        if part.logprobs:
            tokens += part.logprobs.tokens or []
            offsets += part.logprobs.text_offset or []
    assert (text, tokens, offsets) == (answer.text, lists.tokens, lists.text_offset)
    only = client.completions.create(**asked | {"max_tokens": 0}).choices[0]
    assert (only.text, only.finish_reason) == ("abc", "length")


def test_several_prompts_and_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="stub", prompt=["a", "b"], n=2, max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == [spoken(97, 4)] * 2 + [spoken(98, 4)] * 2
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)
    assert client.completions.create(model="stub", prompt=[97], max_tokens=4).choices[0].text == spoken(97, 4)
    both = client.completions.create(model="stub", prompt=[[97], [98]], max_tokens=4)
    assert [choice.text for choice in both.choices] == [spoken(97, 4), spoken(98, 4)]


def test_embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="stub", input=["ab", "b"])
    assert [entry.index for entry in answer.data] == [0, 1]
    mean = (97 + 98) / 2
    length = (mean**2 + 1) ** 0.5
    assert answer.data[0].embedding == pytest.approx([mean / length, 1 / length], rel=1e-5)
    assert answer.usage.prompt_tokens == 3
    last = client.embeddings.create(model="stub", input="ab", extra_body={"pooling": "last"}, encoding_format="float")
    length = (98**2 + 1) ** 0.5
    assert last.data[0].embedding == pytest.approx([98 / length, 1 / length], rel=1e-5)


def test_embeddings_in_base64(server: Running) -> None:
    plain = server.post("/v1/embeddings", {"model": "stub", "input": "ab"}).json()["data"][0]["embedding"]
    packed = server.post("/v1/embeddings", {"model": "stub", "input": "ab", "encoding_format": "base64"}).json()
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == pytest.approx(plain)


def test_errors_reach_the_client_as_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="stub", messages=[user("x")], temperature=3)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=[user("x")])
    assert [model.id for model in client.models.list()] == ["stub"]
    assert client.models.retrieve("stub").id == "stub"


@pytest.mark.parametrize("seed", range(8))
def test_a_schema_is_kept(client: openai.OpenAI, seed: int) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    asked: dict[str, Any] = {"model": "stub", "messages": [user("hi")], "seed": seed, "response_format": shape}
    answer = client.chat.completions.create(**asked, max_tokens=2000, n=3)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), PERSON)


def test_json_object_regex_and_grammar(client: openai.OpenAI) -> None:
    for seed in range(5):
        asked: dict[str, Any] = {"model": "stub", "messages": [user("hi")], "seed": seed, "max_tokens": 3000}
        found = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
        if found.finish_reason == "stop":
            assert isinstance(json.loads(found.message.content or ""), dict)
        matched = client.chat.completions.create(**asked, extra_body={"regex": "[ab]{3}-[0-9]+x"}).choices[0]
        text = matched.message.content or ""
        assert matched.finish_reason == "stop"
        assert set(text[:3]) <= {"a", "b"} and text[3] == "-" and text.endswith("x")
        lark = 'start: "yes" | "no" " way"'
        answer = client.completions.create(
            model="stub", prompt="x", seed=seed, max_tokens=20, extra_body={"grammar": lark}
        )
        assert answer.choices[0].text in ("yes", "no way")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_is_valid(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    for seed in range(4):
        asked: dict[str, Any] = {
            "model": "stub", "messages": [user("hi")], "seed": seed, "max_tokens": 500, "tools": [WEATHER, CLOCK],
            "tool_choice": choice, "parallel_tool_calls": False,
        }  # fmt: skip
        calls: list[tuple[str, str]] = []
        if stream:
            finish = None
            for chunk in client.chat.completions.create(**asked, stream=True):
                assert not chunk.choices[0].delta.content
                for part in chunk.choices[0].delta.tool_calls or []:
                    assert part.function is not None
                    if part.function.name:
                        assert part.id
                        calls.append((part.function.name, ""))
                    name, arguments = calls[part.index]
                    calls[part.index] = name, arguments + (part.function.arguments or "")
                finish = chunk.choices[0].finish_reason or finish
        else:
            answer = client.chat.completions.create(**asked).choices[0]
            assert not answer.message.content
            finish = answer.finish_reason
            calls = [(call.function.name, call.function.arguments) for call in answer.message.tool_calls or []]  # type: ignore[union-attr]
        assert finish == "tool_calls"
        ((name, arguments),) = calls
        schema = {"weather": WEATHER, "clock": CLOCK}[name]["function"]["parameters"]  # type: ignore[index]
        jsonschema.validate(json.loads(arguments), schema)
        if isinstance(choice, dict):
            assert name == "weather"


def test_tools_may_be_left_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "stub", "messages": [user("hi")], "max_tokens": 8, "tools": [WEATHER]}
    plain = client.chat.completions.create(**asked, tool_choice="none")
    assert plain.choices[0].message.tool_calls is None
    assert client.chat.completions.create(**asked).choices[0].finish_reason in ("stop", "length")
    assert plain.usage is not None
    assert plain.usage.prompt_tokens == 5


def test_a_conversation_with_calls_in_it(server: Running) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        user("what time is it?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "noon"},
        {"role": "user", "content": [{"type": "text", "text": "and "}, {"type": "text", "text": "now?"}]},
        {"role": "developer", "content": "be brief"},
    ]
    assert server.chat(messages=messages).status == 200
    for arguments in (
        "[1",
        "[]",
        '{"a": NaN}',
        '{"a": "\\ud800"}',
        '{"a": ' * 700 + "1" + "}" * 700,
        '{"a": 1, "a": 2}',
    ):
        call["function"] = {"name": "clock", "arguments": arguments}
        bad = server.chat(messages=messages)
        assert (bad.status, bad.error["param"]) == (400, "messages[1].tool_calls[0].function.arguments")


def test_an_answer_goes_on(server: Running) -> None:
    begun = [user("hi"), {"role": "assistant", "content": "Fish swim"}]
    asked = {"messages": begun, "continue_final_message": True}
    tokens = [257, *b"hi", 256, 258, *b"Fish swim"]
    for more in ({}, {"add_generation_prompt": False}):
        assert server.post("/tokenize", asked | more).json()["tokens"] == tokens
        answer = server.chat(**asked, **more, max_tokens=9).json()
        assert answer["choices"][0]["message"] == {
            "role": "assistant",
            "content": spoken(sum(tokens), 9),
            "refusal": None,
        }
        assert answer["usage"]["prompt_tokens"] == len(tokens)
    assert server.post("/tokenize", {"messages": begun, "add_generation_prompt": False}).json()["tokens"][-1] == 256
    assert server.post("/tokenize", {"messages": begun}).json()["tokens"][-2:] == [256, 258]
    shape = {"type": "json_object"}
    for more, param in (
        ({"add_generation_prompt": True}, "add_generation_prompt"),
        ({"messages": [user("hi")]}, "messages"),
        ({"response_format": shape}, "continue_final_message"),
        ({"tools": [WEATHER]}, "continue_final_message"),
    ):
        refused = server.chat(**(asked | more))
        assert (refused.status, refused.error["param"]) == (400, param)
