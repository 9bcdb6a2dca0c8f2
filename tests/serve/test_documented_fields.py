"""Every field that OpenAI documents is honoured or refused by name, and none that is sent goes without effect."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.serve.running import Running, user
from tests.serve.test_requests import CHAT, ENDPOINTS

pytestmark = pytest.mark.timeout(150)


def test_every_field_of_the_openai_client_is_known() -> None:
    from openai.types import completion_create_params, embedding_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for params, path in (
        (chat_create_params.CompletionCreateParamsBase, "/v1/chat/completions"),
        (completion_create_params.CompletionCreateParamsBase, "/v1/completions"),
        (embedding_create_params.EmbeddingCreateParams, "/v1/embeddings"),
    ):
        documented = set(params.__annotations__) | ({"stream"} if "chat" in path else set())
        assert documented <= {field.name for field in ENDPOINTS[path][1]}, path


def nested() -> list[tuple[str, Any, Callable[[Any], dict[str, Any]]]]:
    """(what it is, the ``openai`` package's type of it, a body of a chat with it in its place)."""
    from openai.types import chat, shared_params
    from openai.types.chat import chat_completion_message_function_tool_call_param as call
    from openai.types.chat import chat_completion_named_tool_choice_param as choice

    say, shape = user("hi"), shared_params.response_format_json_schema
    function = {"name": "f"}
    asked = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

    def said(role: str, **more: Any) -> Callable[[Any], dict[str, Any]]:
        return lambda value: {"messages": [{"role": role, "content": "x"} | more | value]}

    return [
        ("stream options", chat.ChatCompletionStreamOptionsParam, lambda v: {"stream": True, "stream_options": v}),
        ("text", shared_params.ResponseFormatText, lambda v: {"response_format": {"type": "text"} | v}),
        ("object", shared_params.ResponseFormatJSONObject, lambda v: {"response_format": {"type": "json_object"} | v}),
        (
            "schema",
            shape.ResponseFormatJSONSchema,
            lambda v: {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}} | v},
        ),
        (
            "schema's inside",
            shape.JSONSchema,
            lambda v: {"response_format": {"type": "json_schema", "json_schema": {"name": "x"} | v}},
        ),
        (
            "tool",
            chat.ChatCompletionFunctionToolParam,
            lambda v: {"tools": [{"type": "function", "function": function} | v]},
        ),
        (
            "function",
            shared_params.FunctionDefinition,
            lambda v: {"tools": [{"type": "function", "function": function | v}]},
        ),
        (
            "tool choice",
            chat.ChatCompletionNamedToolChoiceParam,
            lambda v: {"tool_choice": {"type": "function", "function": function} | v},
        ),
        (
            "chosen function",
            choice.Function,
            lambda v: {"tool_choice": {"type": "function", "function": function | v}},
        ),
        ("system", chat.ChatCompletionSystemMessageParam, said("system")),
        ("developer", chat.ChatCompletionDeveloperMessageParam, said("developer")),
        ("user", chat.ChatCompletionUserMessageParam, said("user")),
        ("assistant", chat.ChatCompletionAssistantMessageParam, said("assistant")),
        ("tool's answer", chat.ChatCompletionToolMessageParam, said("tool", tool_call_id="c")),
        (
            "text part",
            chat.ChatCompletionContentPartTextParam,
            lambda v: {"messages": [say | {"content": [{"type": "text", "text": "x"} | v]}]},
        ),
        (
            "call",
            chat.ChatCompletionMessageFunctionToolCallParam,
            lambda v: {"messages": [{"role": "assistant", "tool_calls": [asked | v]}, say]},
        ),
        (
            "called function",
            call.Function,
            lambda v: {
                "messages": [{"role": "assistant", "tool_calls": [asked | {"function": asked["function"] | v}]}, say]  # type: ignore[operator]
            },
        ),
    ]


@pytest.mark.parametrize(("params", "body"), [entry[1:] for entry in nested()], ids=[entry[0] for entry in nested()])
def test_every_nested_field_of_the_openai_client_is_known(
    server: Running, params: Any, body: Callable[[Any], dict[str, Any]]
) -> None:
    assert server.chat(**body({"nobody_documents_this": 1})).error["code"] == "unknown_parameter"
    for name in params.__annotations__:
        answer = server.chat(**body({name: {"something": "else"}}))
        if answer.status != 200 and answer.error["code"] == "unknown_parameter":
            assert answer.error["param"].endswith(f"{name}.something"), (name, answer.raw)  # what is in it


CALLED = [{"type": "function", "function": {"name": "f", "strict": True}}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"enum": [1, 2]}},
    "required": ["a"],
    "additionalProperties": False,
}
CHANGES_NOTHING: list[tuple[str, dict[str, Any], str, str]] = [
    ("/tokenize", {"prompt": "hi", "tools": CALLED}, "tools", "invalid_value"),
    ("/tokenize", {"prompt": "hi", "tools": []}, "tools", "invalid_value"),
    ("/tokenize", {"prompt": "hi", "continue_final_message": True}, "continue_final_message", "invalid_value"),
    ("/tokenize", {"prompt": "hi", "continue_final_message": False}, "continue_final_message", "invalid_value"),
    ("/tokenize", {"prompt": "hi", "add_generation_prompt": False}, "add_generation_prompt", "invalid_value"),
    ("/tokenize", {"prompt": "", "add_generation_prompt": True}, "add_generation_prompt", "invalid_value"),
    (
        "/tokenize",
        {"prompt": "hi", "add_generation_prompt": True, "continue_final_message": True},
        "continue_final_message",
        "invalid_value",
    ),
    (
        "/tokenize",
        {
            "messages": [user("a"), {"role": "assistant", "content": "b"}],
            "add_generation_prompt": True,
            "continue_final_message": True,
        },
        "add_generation_prompt",
        "invalid_value",
    ),
    ("/tokenize", {"messages": [user("hi")], "add_special_tokens": True}, "add_special_tokens", "invalid_value"),
    ("/tokenize", {"messages": [user("hi")], "add_special_tokens": False}, "add_special_tokens", "invalid_value"),
    ("/v1/chat/completions", CHAT | {"parallel_tool_calls": True}, "parallel_tool_calls", "invalid_value"),
    ("/v1/chat/completions", CHAT | {"parallel_tool_calls": False}, "parallel_tool_calls", "invalid_value"),
    (
        "/v1/chat/completions",
        CHAT | {"parallel_tool_calls": False, "tools": []},
        "parallel_tool_calls",
        "invalid_value",
    ),
    (
        "/v1/chat/completions",
        CHAT
        | {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "description": "d"}}},
        "response_format.json_schema.description",
        "unsupported_parameter",
    ),
]


@pytest.mark.parametrize(
    ("path", "body", "param", "code"), CHANGES_NOTHING, ids=[f"{i}-{one[2]}" for i, one in enumerate(CHANGES_NOTHING)]
)
def test_what_would_change_nothing_is_refused(
    server: Running, path: str, body: dict[str, Any], param: str, code: str
) -> None:
    answer = server.post(path, body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code), answer.raw


def test_tools_are_tokenized_by_a_template_that_knows_them(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {"messages": [user("hi")], "tools": CALLED}
    assert (
        server.post("/tokenize", body).json()["count"] > server.post("/tokenize", body | {"tools": []}).json()["count"]
    )
    monkeypatch.setattr(server.server._service, "dialect", None)
    answer = server.post("/tokenize", body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "tools", "unsupported_parameter")
    assert server.post("/tokenize", body | {"tools": []}).status == 200


@pytest.mark.parametrize("strict", [True, False, None])
def test_strict_or_not_the_answer_matches(server: Running, strict: bool | None) -> None:
    inner = {"name": "x", "schema": SCHEMA, "strict": strict}
    shape = {"type": "json_schema", "json_schema": inner}
    tool = {"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": strict}}
    for seed in range(3):
        answer = server.chat(response_format=shape, seed=seed, max_tokens=200).json()["choices"][0]
        assert json.loads(answer["message"]["content"])["a"] in (1, 2)
        answer = server.chat(
            tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=300
        ).json()["choices"][0]
        (called,) = answer["message"]["tool_calls"]
        assert json.loads(called["function"]["arguments"])["a"] in (1, 2)
