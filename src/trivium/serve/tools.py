"""Tool calls in the model's own dialect: the grammar that makes them valid, and the reader that finds them in text."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trivium.serve.errors import ApiError, invalid
from trivium.serve.grammar import Grammar, with_layout

Choice = Literal["auto", "required"]


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a model writes a call: ``trigger``, then ``{"name": "…", "<key>": {…}}``, then ``end``.

    ``between`` parts one call from the next (empty: one call at most). ``trigger_id``: the trigger is a control token,
    which does not appear in text.
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
    """How the model whose chat template this is calls tools; None where the template knows of none."""
    if template is None or "tools" not in template:
        return None
    if "<tool_call>" in template:
        found = ("<tool_call>", "\n", "arguments", "}\n</tool_call>", "\n")
    elif "[TOOL_CALLS]" in template:
        found = ("[TOOL_CALLS]", "[", "arguments", "}]", "")
    elif '"parameters"' in template or "<|python_tag|>" in template:
        found = ("", "", "parameters", "}", "; ")
    else:
        found = ("", "", "arguments", "}", "\n")
    trigger, lead, key, end, between = found
    return Dialect(trigger=trigger, lead=lead, key=key, end=end, between=between, trigger_id=special.get(trigger))


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


@dataclass(frozen=True, kw_only=True)
class Call:
    """The beginning of a call, or (``name`` None) more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolReader:
    """Parts text into content and calls as it comes; what may be the beginning of a call is held back."""

    def __init__(self, plan: ToolPlan) -> None:
        dialect = plan.dialect
        self._trigger = "" if dialect.trigger_id is not None else dialect.trigger
        self._begins = {dialect.begin(name): name for name in plan.names}
        self._end = dialect.end
        self._between = dialect.between + " \n"
        self._held = ""
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._depth = 0
        self._quoted = self._escaped = False
        self.calls = 0

    def push(self, text: str) -> tuple[str, list[Call]]:
        """The content that is certain by now, and what came of calls."""
        self._held += text
        content: list[str] = []
        found: list[Call] = []
        while self._step(content, found):
            pass
        return "".join(content), found

    def flush(self) -> str:
        """At the end: what was held back and was no call."""
        rest, self._held = (self._held, "") if self._state in ("text", "head") else ("", "")
        return rest

    def _step(self, content: list[str], found: list[Call]) -> bool:
        if self._state == "text":
            return self._text(content)
        if self._state == "head":
            return self._head(content, found)
        if self._state == "arguments":
            return self._arguments(found)
        return self._tail()

    def _text(self, content: list[str]) -> bool:
        triggers = [self._trigger + begin for begin in self._begins]
        at, hold = _first(self._held, triggers)
        text = self._held[:at]
        if self.calls:
            text = text.strip(self._between)  # what parts one call from the next
        if text:
            content.append(text)
        self._held = self._held[at:]
        if not self._held or hold:
            return False
        self._state = "head"
        return True

    def _head(self, content: list[str], found: list[Call]) -> bool:
        for begin, name in self._begins.items():
            whole = self._trigger + begin
            if self._held.startswith(whole):
                self._held = self._held[len(whole) :]
                found.append(Call(index=self.calls, id=f"call_{secrets.token_hex(12)}", name=name))
                self.calls += 1
                self._state, self._depth = "arguments", 0
                return True
        return False

    def _arguments(self, found: list[Call]) -> bool:
        for place, letter in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = letter == "\\"
                self._quoted = letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    found.append(Call(index=self.calls - 1, arguments=self._held[: place + 1]))
                    self._held = self._held[place + 1 :]
                    self._state = "tail"
                    return True
        if self._held:
            found.append(Call(index=self.calls - 1, arguments=self._held))
            self._held = ""
        return False

    def _tail(self) -> bool:
        if len(self._held) < len(self._end):
            return False
        self._held = self._held.removeprefix(self._end)
        self._state = "text"
        return True


def _first(text: str, patterns: Sequence[str]) -> tuple[int, bool]:
    """Where the first of ``patterns`` stands whole (False), or where one may be beginning at the end (True)."""
    whole = min((at for at in (text.find(pattern) for pattern in patterns) if at >= 0), default=-1)
    longest = max(map(len, patterns))
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if 0 <= whole <= at:
            break
        if any(pattern.startswith(text[at:]) for pattern in patterns):
            return at, True
    return (whole, False) if whole >= 0 else (len(text), False)
