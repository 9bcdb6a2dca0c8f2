"""Tool calls in the model's own dialect, and the grammar that makes them valid; `tool_reader` finds them in answers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trivium.serve.compilation import with_layout
from trivium.serve.errors import ApiError, invalid
from trivium.serve.grammar import Grammar

Choice = Literal["auto", "required"]


# A call in plain JSON, as a template shows it: "name" and, soon after, the key of the arguments. With a "description"
# between the two it is a tool's definition.
_CALL = re.compile(
    r"""\\?["']name\\?["']\s*:(?:(?!["']description\\?["']).){0,300}?\\?["'](arguments|parameters)\\?["']\s*:""",
    re.DOTALL,
)
# What a call stands in, with only the template's own marks between: a list, or another object's value.
_HOLDER = re.compile(r"""(\[|["']\s*:)(?:\s|\\n|\{%[^%]*%\}|\{\{-?|-?\}\}|[+~"'\\])*(?:\{(?:\s|\\n|["'\\])*)?\Z""")
# Calls that are marked in ways not known here, or are no JSON inside of marks that are.
_FOREIGN = re.compile(r"<tool_call>(?:\s|\\n)*\[|<[|｜][^<>|｜]*tool[_▁]call|<function=|<arg_key>|\[ARGS\]")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a model writes a call: ``trigger``, then ``{"name": "…", "<key>": {…}}``, then ``end``.

    ``between`` parts one call from the next (empty: one call at most). ``trigger_id``: the trigger is a control token,
    which does not appear in text. Without a trigger only an answer that begins with a call holds calls.
    """

    trigger: str
    lead: str
    key: str
    end: str
    between: str
    trigger_id: int | None = None

    def begin(self, name: str) -> str:
        """What stands after the trigger and before the arguments."""
        return f'{self.lead}{{"name": {json.dumps(name)}, "{self.key}": '


def dialect_of(template: str | None, special: dict[str, int]) -> Dialect | None:
    """How the model whose chat template this is calls tools; None where the template shows no form known here."""
    if template is None or "tools" not in template or _FOREIGN.search(template):
        return None
    plain = _plain_key(template)
    if "<tool_call>" in template:
        found = ("<tool_call>", "\n", "arguments", "}\n</tool_call>", "\n")
    elif "[TOOL_CALLS]" in template:
        found = ("[TOOL_CALLS]", "[", "arguments", "}]", "")
    elif plain is not None:
        found = ("", "", plain, "}", "; " if plain == "parameters" else "\n")
    else:
        return None
    trigger, lead, key, end, between = found
    return Dialect(trigger=trigger, lead=lead, key=key, end=end, between=between, trigger_id=special.get(trigger))


def _plain_key(template: str) -> str | None:
    """The key of the arguments in the first call in plain JSON; None without one, or where calls stand in a list."""
    keys = []
    for call in _CALL.finditer(template):
        holder = _HOLDER.search(template[max(call.start() - 400, 0) : call.start()])
        if holder is None:
            keys.append(call[1])
        elif holder[1] == "[":
            return None
    return keys[0] if keys else None


@dataclass(frozen=True, kw_only=True)
class ToolPlan:
    """What a request's tools come to: which may be called, whether one must be, and in which dialect."""

    dialect: Dialect
    names: tuple[str, ...]
    grammar: Grammar
    forced: bool


def plan_tools(
    tools: Sequence[dict[str, Any]] | None, choice: str | dict[str, Any] | None, parallel: bool, dialect: Dialect | None
) -> ToolPlan | None:
    """None where no tool may be called. Raises ApiError 400 where the choice does not fit the tools or the model."""
    if not tools:
        if choice not in (None, "none"):
            raise invalid("tool_choice", "tool_choice needs tools")
        return None
    names = [tool["function"]["name"] for tool in tools]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid("tools", f"two tools have the name {twice!r}")
    if choice == "none":
        return None
    if dialect is None:
        message = "the model's chat template does not say how it calls tools"
        raise ApiError(400, "unsupported_parameter", message, param="tools")
    forced = choice not in (None, "auto")
    if isinstance(choice, dict):
        if choice["name"] not in names:
            raise invalid("tool_choice", f"tool_choice names {choice['name']!r}; tools are {', '.join(names)}")
        tools = [tool for tool in tools if tool["function"]["name"] == choice["name"]]
        parallel = False
    source = _grammar(tools, dialect, forced=forced, parallel=parallel)
    allowed = tuple(tool["function"]["name"] for tool in tools)
    grammar = Grammar(kind="lark", source=source, param="tools")
    return ToolPlan(dialect=dialect, names=allowed, grammar=grammar, forced=forced)


def _grammar(tools: Sequence[dict[str, Any]], dialect: Dialect, *, forced: bool, parallel: bool) -> str:
    lines = ["%llguidance {}"]
    calls = " | ".join(f"call_{index}" for index in range(len(tools)))
    for index, tool in enumerate(tools):
        begin, schema = _quoted(dialect.begin(tool["function"]["name"])), json.dumps(_schema(tool, index))
        lines.append(f"call_{index}: {begin} %json {schema} {_quoted(dialect.end)}")
    trigger = f"<[{dialect.trigger_id}]>" if dialect.trigger_id is not None else _quoted(dialect.trigger)
    lines.append(f"call: {trigger} any" if trigger else "call: any")
    lines.append(f"any: {calls}")
    more = f" ({_quoted(dialect.between)} call)*" if parallel and dialect.between else ""
    if forced:
        lines.append(f"start: call{more}")
    elif not dialect.trigger:
        lines += [f"start: TEXT | call{more}", r"TEXT: /([^{](.|\n)*)?/"]
    elif dialect.trigger_id is not None:
        lines += [f"start: TEXT | TEXT call{more}", r"TEXT: /(.|\n)*/"]
    else:
        lines += [f"start: TEXT | head any{more}", rf"head[lazy]: /(.|\n)*/ {trigger}", r"TEXT: /(.|\n)*/"]
    return "\n".join(lines)


def _schema(tool: dict[str, Any], index: int) -> dict[str, Any]:
    schema = tool["function"]["parameters"]
    if schema.get("type", "object") != "object":
        param = f"tools[{index}].function.parameters"
        raise invalid(param, f"{param}.type={json.dumps(schema['type'])[:60]}: arguments are an object")
    return with_layout({**schema, "type": "object"})


def _quoted(text: str) -> str:
    return json.dumps(text) if text else ""
