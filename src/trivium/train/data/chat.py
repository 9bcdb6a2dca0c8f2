"""Render a chat by the tokenizer's own jinja2 template, telling what is content and what is the template's.

The template runs sandboxed, with caps on its size, its output, its loops and its time. Contents never pass through it:
it renders placeholders, so that nothing inside a message can become a control token and every token's owner is known.
"""

from __future__ import annotations

import datetime
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from trivium.base.errors import DataError
from trivium.train.data.sources import Message

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_TEMPLATE_CHARS = 64 << 10
_OUTPUT_CHARS = 1 << 20
_LOOP_ITEMS = 100_000
_SECONDS = 2.0
_EDGE = "\u2003"
_MARK = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")


_GROWING = (
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "pprint", "random", "rjust",
    "slice", "translate", "wordwrap", "xmlattr", "zfill",
)  # fmt: skip


class _Stop(Exception):
    """The template asked for more than its share, or refused the messages."""


class _JoinsAsSums(NodeTransformer):
    """``a ~ b`` as ``a|string + b|string``, so that the bound on ``+`` holds for it too."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        texts: list[nodes.Expr] = [nodes.Filter(part, "string", [], [], None, None) for part in node.nodes]
        total = texts[0]
        for text in texts[1:]:
            total = nodes.Add(total, text)
        total.set_lineno(node.lineno, override=True)
        return total


def _replace(value: str, old: str, new: str, count: int = -1) -> str:
    if len(value) + str(value).count(old) * len(new) > _OUTPUT_CHARS:
        raise _Stop(f"a value of more than {_OUTPUT_CHARS} characters")
    return str(value).replace(old, new, count)


class _Budget:
    """What one rendering may still use of steps and time."""

    def __init__(self) -> None:
        self._items = 0
        self._deadline = 0.0

    def renew(self) -> None:
        self._items = 0
        self._deadline = time.monotonic() + _SECONDS

    def tick(self) -> None:
        self._items += 1
        if self._items > _LOOP_ITEMS or time.monotonic() > self._deadline:
            raise _Stop(f"more than {_LOOP_ITEMS} steps or {_SECONDS} s")

    def range(self, *bounds: int) -> Iterator[int]:
        for value in range(*bounds):
            self.tick()
            yield value


def _refuse(message: object) -> None:
    raise _Stop(str(message))


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self._tick = budget.tick
        never = datetime.datetime(2000, 1, 1)  # a date that changes would change the tokens
        self.globals = {
            "namespace": self.globals["namespace"],
            "dict": dict,
            "range": budget.range,
            "raise_exception": _refuse,
            "strftime_now": never.strftime,
        }
        self.filters = {name: function for name, function in self.filters.items() if name not in _GROWING} | {
            "replace": _replace
        }

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _JoinsAsSums().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Bound what an operator can build."""
        if operator == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            if len(left) + len(right) > _OUTPUT_CHARS:
                raise _Stop(f"a value of more than {_OUTPUT_CHARS} characters")
        elif any(not isinstance(value, (int, float)) or abs(value) > 1 << 20 for value in (left, right)):
            raise _Stop(f"'{operator}' on something other than small numbers")
        elif operator == "**" and abs(right) > 64:
            raise _Stop("a power above 64")
        return super().call_binop(context, operator, left, right)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Count a call; str.replace is bounded like the filter."""
        self._tick()
        owner = getattr(args[1], "__self__", None)
        if isinstance(owner, str) and args[1].__name__ == "replace":
            return _replace(owner, *args[2:])
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        if isinstance(obj, str) and attribute in _GROWING:
            raise _Stop(f"str.{attribute}")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return super().getitem(obj, argument)


class Template:
    """A chat template, compiled once inside its sandbox; ``text`` is what is saved with the tokenizer."""

    def __init__(self, text: str, *, source: str) -> None:
        """Check size and syntax. Raises DataError naming ``source``."""
        if len(text) > _TEMPLATE_CHARS:
            raise DataError(
                f"{source}: chat_template has {len(text)} characters, at most {_TEMPLATE_CHARS} are accepted"
            )
        self._budget = _Budget()
        try:
            self._compiled = _Sandbox(self._budget).from_string(text)
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{source}: chat_template does not compile ({error})") from error
        self.text = text
        self._source = source

    def render(
        self, messages: Sequence[Message], tokens: Mapping[str, str], *, prompt: bool, where: str
    ) -> list[tuple[str, str | None]]:
        """The rendered chat in pieces: (text, role) for a message's content, (text, None) for the template's own."""
        rows = [
            {"role": message.role, "content": f"{_EDGE}\ue000{index}\ue001{_EDGE}"}
            for index, message in enumerate(messages)
        ]
        try:
            output = self._run({**tokens, "messages": rows, "add_generation_prompt": prompt})
        except (
            _Stop,
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
        ) as error:
            raise DataError(f"{where}: the chat_template of {self._source} failed ({error})") from error
        return list(self._pieces(output, messages, where))

    def _run(self, variables: Mapping[str, Any]) -> str:
        self._budget.renew()
        parts: list[str] = []
        size = 0
        for part in self._compiled.generate(**variables):
            self._budget.tick()
            size += len(part)
            if size > _OUTPUT_CHARS:
                raise _Stop(f"more than {_OUTPUT_CHARS} characters")
            parts.append(part)
        return "".join(parts)

    def _pieces(self, output: str, messages: Sequence[Message], where: str) -> Iterator[tuple[str, str | None]]:
        seen = [int(match[2]) for match in _MARK.finditer(output)]
        if seen != list(range(len(messages))):
            raise DataError(
                f"{where}: the chat_template of {self._source} renders messages {seen} of {len(messages)}; "
                "each must appear once and in order for the loss mask to be exact"
            )
        start = 0
        for match in _MARK.finditer(output):
            if match.start() > start:
                yield output[start : match.start()], None
            message = messages[int(match[2])]
            content = message.content if match[1] else message.content.lstrip()
            content = content if match[3] else content.rstrip()
            yield content, message.role
            start = match.end()
        if start < len(output):
            yield output[start:], None
