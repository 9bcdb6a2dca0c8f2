"""Render a chat by a model folder's own jinja2 template: sandboxed, with caps on size, steps and time.

No paper. [Note: control tokens in contents] Before rendering, every control token's text inside a value that came with
the messages is broken by a mark, a character that occurs nowhere else. Templates may search, cut and trim contents as
they like; what is still unbroken in the output is the template's own. Marks go when the text becomes token ids.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer, NodeVisitor

from trivium.base.errors import ConfigError, DataError

_TEMPLATE_CHARS = 256 << 10
_OUTPUT_CHARS = 8 << 20
_STEPS = 500_000
_SECONDS = 3.0
_MARKS = tuple(chr(code) for code in range(0xE000, 0xF8FF))
# Filters and methods of strings that can build far more than they were given.
_GROWING = frozenset(
    (
        *("center", "expandtabs", "ljust", "rjust", "zfill", "translate", "format", "format_map", "wordwrap"),
        *("xmlattr", "batch", "slice", "urlize", "pprint", "random", "forceescape"),
    )
)
_ROLE = re.compile(r"[A-Za-z0-9_\-]{1,64}")


class TemplateRefusal(ConfigError):
    """The template itself refused the messages (``raise_exception``): they are in an order that it does not know."""


class _Exceeded(Exception):
    """The template asked for more than its share."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self) -> None:
        self._left = _STEPS
        self._deadline = time.monotonic() + _SECONDS

    def tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise _Exceeded(f"more than {_STEPS} steps")
        if self._left % 64 == 0 and time.monotonic() > self._deadline:
            raise _Exceeded(f"more than {_SECONDS} s")

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item


def _refuse(message: object) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As chat templates expect it: no HTML escapes."""
    if indent is not None and not 0 <= indent <= 16:
        raise _Exceeded(f"tojson with indent={indent}")
    separators = options.get("separators")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=None if separators is None else (str(separators[0]), str(separators[1])),
        sort_keys=bool(options.get("sort_keys", False)),
    )


class _Generation(Extension):
    """``{% generation %} … {% endgeneration %}``, which only trainers look at: its body, as it is."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares a set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes between the tags."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Sandbox(ImmutableSandboxedEnvironment):
    """No attribute that leads out, no change of what was given, every operator, call and access counted."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, budget: _Budget, now: datetime.datetime | None) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=False,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.budget = budget
        namespace = self.globals["namespace"]
        self.globals = {
            "namespace": namespace,
            "dict": dict,
            "range": self._range,
            "raise_exception": _refuse,
            "strftime_now": lambda form: (now or datetime.datetime.now()).strftime(str(form)[:100]),
        }
        self.filters = {name: one for name, one in self.filters.items() if name not in _GROWING} | {
            "tojson": _to_json,
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "counted": budget.each,
        }

    def _range(self, *bounds: int) -> Iterator[int]:
        return self.budget.each(range(*bounds))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        parts: list[str] = []
        size = 0
        for item in self.budget.each(value):
            part = str(item if attribute is None else self.getitem(item, attribute))
            size += len(part) + len(d)
            _bound(size)
            parts.append(part)
        return str(d).join(parts)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(value)
        _bound(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(int(width), 64)
        lines = str(value).splitlines()
        _bound(len(str(value)) + len(lines) * len(pad))
        out = [(pad + line if (number or first) and (line or blank) else line) for number, line in enumerate(lines)]
        return "\n".join(out)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Bound what an operator can build."""
        self.budget.tick()
        sized = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        if operator == "+" and sized and isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            _bound(len(left) + len(right))
        elif operator == "*" and sized and isinstance(left, (str, list)) and isinstance(right, int):
            _bound(len(left) * right)
        elif operator != "+" and sized:
            raise _Exceeded(f"the operator {operator} on texts or lists")
        elif operator == "**" and abs(right) > 64:
            raise _Exceeded("a power above 64")
        elif operator in ("*", "**") and any(abs(value) > 1 << 40 for value in (left, right)):
            raise _Exceeded("a product of huge numbers")
        return super().call_binop(context, operator, left, right)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Count a call; methods of strings are bounded as the filters are."""
        self.budget.tick()
        called = args[1] if len(args) > 1 else None
        owner = getattr(called, "__self__", None)
        name = getattr(called, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args[2:], **kwargs)
        if isinstance(owner, str) and name == "join":
            return self._join(args[2], owner)
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Count an access; methods that grow a string are not there."""
        self.budget.tick()
        if isinstance(obj, str) and attribute in _GROWING:
            raise _Exceeded(f"str.{attribute}")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Count an access."""
        self.budget.tick()
        return super().getitem(obj, argument)


def _bound(size: int) -> None:
    if size > _OUTPUT_CHARS:
        raise _Exceeded(f"a value of more than {_OUTPUT_CHARS} characters")


class _CountedLoops(NodeVisitor):
    """Wraps what every loop goes over in a counting filter."""

    def visit_For(self, node: nodes.For) -> None:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None).set_lineno(node.lineno)


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


@dataclass(frozen=True)
class Rendered:
    """A rendered chat. ``mark`` stands inside control tokens' texts that came with the messages; "" where none did."""

    text: str
    mark: str

    @property
    def plain(self) -> str:
        """As a person would read it."""
        return self.text.replace(self.mark, "") if self.mark else self.text


class ChatTemplate:
    """One template, compiled once. Each rendering has a sandbox and a budget of its own: any thread may render."""

    def __init__(self, text: str, *, source: str = "the chat template") -> None:
        """Raises DataError, naming ``source``, for a template that is too large or does not compile."""
        if len(text) > _TEMPLATE_CHARS:
            raise DataError(f"{source} has {len(text)} characters: at most {_TEMPLATE_CHARS} are accepted")
        self.text, self._source = text, source
        self._code = self._compile()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokens: Mapping[str, str] | None = None,
        control: Iterable[str] = (),
        now: datetime.datetime | None = None,
        **options: Any,
    ) -> Rendered:
        """The chat as text. ``tokens``: ``bos_token`` and its like; ``control``: texts that contents must not say.

        ``options`` go to the template as they are (``enable_thinking`` and such). ``now`` is for ``strftime_now``.

        Raises:
            TemplateRefusal: the template refuses these messages; its own words.
            DataError: a role that is no name; the template failed, or exceeded its share of time, steps or size.
        """
        if not isinstance(messages, (list, tuple)):
            raise DataError(
                f"messages is a {type(messages).__name__}: expected a list of objects with role and content"
            )
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise DataError(f"messages[{number}].role={str(role)[:80]!r}: expected a name such as 'user'")
        try:
            breaker = _Breaker((messages, tools, options), control)
            variables = {
                "messages": breaker.broken(messages),
                "tools": breaker.broken(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **(tokens or {}),
                **breaker.broken(options),
            }
            text = self._run(_Sandbox(_Budget(), now), variables)
        except TemplateRefusal:
            raise
        except (_Exceeded, jinja2.TemplateError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(f"{self._source} failed: {error or type(error).__name__}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self._source} cannot render these messages: {error}") from error
        return Rendered(text=text, mark=breaker.mark if breaker.used else "")

    def _compile(self) -> CodeType:
        sandbox = _Sandbox(_Budget(), None)
        try:
            tree = sandbox.parse(self.text)
            _CountedLoops().visit(tree)
            return sandbox.compile(_JoinsAsSums().visit(tree))
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{self._source} does not compile: {error or type(error).__name__}") from error

    def _run(self, sandbox: _Sandbox, variables: Mapping[str, Any]) -> str:
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        parts: list[str] = []
        size = 0
        for part in template.generate(**variables):
            sandbox.budget.tick()
            size += len(part)
            _bound(size)
            parts.append(part)
        return "".join(parts)


class _Breaker:
    """See [Note: control tokens in contents]."""

    def __init__(self, values: Any, control: Iterable[str]) -> None:
        words = sorted((word for word in control if len(word) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None
        seen = set(json.dumps(values, ensure_ascii=False, default=str))
        mark = next((mark for mark in _MARKS if mark not in seen), None)
        if mark is None:
            raise DataError(f"the messages hold all {len(_MARKS)} characters from U+E000 on: leave one of them out")
        self.mark = mark
        self.used = False

    def broken(self, value: Any) -> Any:
        """A copy in which no text says a control token. A message's role is not content, but names a part."""
        if isinstance(value, str):
            return value if self._pattern is None else self._pattern.sub(self._break, value)
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(item) for item in value]
        return value

    def _break(self, match: re.Match[str]) -> str:
        self.used = True
        return match[0][0] + self.mark + match[0][1:]
