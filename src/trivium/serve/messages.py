"""One message of a chat, read strictly and handed on as the model's chat template is given it."""

from __future__ import annotations

from typing import Any

from trivium.serve import fields as f
from trivium.serve.errors import ApiError, invalid, shown
from trivium.serve.fields import Field
from trivium.serve.limits import Limits
from trivium.serve.strict_json import parse

NAME_CHARS = 256


def message(limits: Limits) -> f.Reader:
    """One message, as the chat template is given it."""

    def read(value: Any, param: str) -> dict[str, Any]:
        body = f.mapping(value, param)
        table = (
            Field(name="role", read=f.choice("system", "developer", "user", "assistant", "tool"), required=True),
            Field(name="content", read=_content),
            Field(name="name", read=f.text(64)),
            Field(name="tool_calls", read=f.items(_tool_call(limits), 1, 64)),
            Field(name="tool_call_id", read=f.text(NAME_CHARS, empty=False)),
            Field(name="refusal", read=f.refused("write it as content")),
            Field(name="audio", read=f.refused("the models here read text only")),
            Field(name="function_call", read=f.refused("use tool_calls")),
        )
        found = f.read_fields(body, table, f"{param}.")
        role = found["role"]
        if found["tool_calls"] is not None and role != "assistant":
            raise invalid(f"{param}.tool_calls", f"{param}.tool_calls belongs to role assistant, not {role}")
        if (found["tool_call_id"] is not None) != (role == "tool"):
            raise invalid(
                f"{param}.tool_call_id", f"{param}.tool_call_id belongs to role tool, and only there; role={role}"
            )
        if found["content"] is None and found["tool_calls"] is None:
            raise ApiError(400, "missing_required_parameter", f"{param}.content is required", param=f"{param}.content")
        found["role"] = "system" if role == "developer" else role
        found["content"] = found["content"] or ""
        return {name: entry for name, entry in found.items() if entry is not None}

    return read


def _content(value: Any, param: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise invalid(param, f"{param}={shown(value)}: expected a string or a list of text parts", "invalid_type")
    parts = (
        Field(name="type", read=_part_kind, required=True),
        Field(name="text", read=f.text(1 << 30), required=True),
        Field(name="prompt_cache_breakpoint", read=f.refused("prefixes are shared by their tokens, without marks")),
    )
    read = f.items(lambda part, name: f.read_fields(f.mapping(part, name), parts, f"{name}."), 1, 1024)
    return "".join(part["text"] for part in read(value, param))


def _part_kind(value: Any, param: str) -> str:
    if value != "text":
        why = "the models here read text only" if isinstance(value, str) else "expected text"
        raise ApiError(400, "unsupported_content", f"{param}={shown(value)}: {why}", param=param)
    return "text"


def _arguments(limits: Limits) -> f.Reader:
    """Templates want an object where OpenAI has its text, which is read as strictly as the body around it."""

    def read(value: Any, param: str) -> dict[str, Any]:
        raw = str(f.text(1 << 20)(value, param))
        try:
            return parse(raw.encode() or b"{}", limits)
        except ApiError as error:
            message = f"{param}={shown(raw)}: expected the text of a JSON object ({error.code})"
            raise invalid(param, message) from None

    return read


def _tool_call(limits: Limits) -> f.Reader:
    inner = (
        Field(name="name", read=f.function_name, required=True),
        Field(name="arguments", read=_arguments(limits), required=True),
    )
    table = (
        Field(name="id", read=f.text(NAME_CHARS, empty=False), required=True),
        Field(name="type", read=f.choice("function"), default="function"),
        Field(name="function", read=f.mapping, required=True),
    )

    def read(value: Any, param: str) -> dict[str, Any]:
        found = f.read_fields(f.mapping(value, param), table, f"{param}.")
        found["function"] = f.read_fields(found["function"], inner, f"{param}.function.")
        return found

    return read
