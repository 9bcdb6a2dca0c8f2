"""Run a jinja2 template that nobody vouches for: sandboxed, with caps on its size, its output, its steps and its time.

Chat templates come with model folders and tokenizers; training and inference both run them, through this one sandbox.

[Note: weights]
A list that holds another one twice is small, but its text is not: forty such lists in each other would be written for
ever. So every list, tuple and mapping that a template makes is weighed as if nothing in it were shared, and refused
beyond the cap on values. Nothing that was weighed can change; a namespace can, and may stand in nothing else.
"""

from __future__ import annotations

import datetime
import functools
import json
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from types import CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer, NodeVisitor

from trivium.base.errors import ConfigError, DataError

# Filters and methods of strings that can build far more than they were given.
_GROWING = frozenset(
    (
        *("center", "expandtabs", "ljust", "rjust", "zfill", "translate", "format", "format_map", "wordwrap"),
        *("xmlattr", "batch", "slice", "urlize", "pprint", "random", "forceescape"),
    )
)
_HEAVY = 10_000
_SEPARATORS_CHARS = 16


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a template may be and use: its own characters, those of any value and of the output, steps, seconds."""

    template_chars: int
    output_chars: int
    steps: int
    seconds: float


class TemplateRefusal(ConfigError):
    """The template itself refused the messages (``raise_exception``): they are in an order that it does not know."""


class Exceeded(Exception):
    """The template asked for more than its share."""


class _Budget:
    """What one rendering may still use."""

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self._left = caps.steps
        self._deadline = time.monotonic() + caps.seconds
        self._weights: dict[int, tuple[int, Any]] = {}  # what was weighed stays alive: its id is nobody else's

    def tick(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise Exceeded(f"more than {self.caps.steps} steps")
        if self._left % 64 == 0:
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise Exceeded(f"more than {self.caps.seconds} s")

    def bound(self, size: int) -> None:
        if size > self.caps.output_chars:
            raise Exceeded(f"a value of more than {self.caps.output_chars} characters")

    def made(self, value: Any) -> Any:
        """``value``, which the template has made; see [Note: weights]."""
        self.bound(self._weigh(value))
        return value

    def _weigh(self, value: Any) -> int:
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Namespace):
            raise Exceeded("a namespace inside something else")
        if not isinstance(value, (list, tuple, Mapping, KeysView, ValuesView, ItemsView)):
            return 1
        if id(value) not in self._weights:
            parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            weight = 1 + sum(self._weigh(part) for part in parts)
            if weight > _HEAVY:
                self._look_at_the_clock()
            self._weights[id(value)] = (weight, value)
        return self._weights[id(value)][0]

    def each(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.tick()
            yield item


def _refuse(message: object) -> None:
    raise TemplateRefusal(str(message)[:1000])


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """As chat templates expect it: no HTML escapes."""
    if indent is not None and not 0 <= indent <= 16:
        raise Exceeded(f"tojson with indent={indent}")
    separators = options.get("separators")
    if separators is not None and sum(len(str(one)) for one in separators) > _SEPARATORS_CHARS:
        raise Exceeded("tojson with separators that long")
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
        self.globals = {
            "namespace": self._namespace,
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
        self.filters = {name: self._weighed(one) for name, one in self.filters.items()} | {"made": budget.made}

    def _weighed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def weighed(*args: Any, **kwargs: Any) -> Any:
            return self._made(function(*args, **kwargs))

        return weighed

    def _made(self, found: Any) -> Any:
        return found if isinstance(found, Namespace) else self.budget.made(found)

    def _namespace(self, *args: Any, **kwargs: Any) -> Namespace:
        return Namespace(self.budget.made(dict(*args, **kwargs)))

    def _range(self, *bounds: int) -> Iterator[int]:
        return self.budget.each(range(*bounds))

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        parts: list[str] = []
        size = 0
        for item in self.budget.each(value):
            part = str(item if attribute is None else self.getitem(item, attribute))
            size += len(part) + len(d)
            self.budget.bound(size)
            parts.append(part)
        return str(d).join(parts)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        text = str(value)
        self.budget.bound(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
        return text.replace(old, new, -1 if count is None else count)

    def _indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(int(width), 64)
        lines = str(value).splitlines()
        self.budget.bound(len(str(value)) + len(lines) * len(pad))
        out = [(pad + line if (number or first) and (line or blank) else line) for number, line in enumerate(lines)]
        return "\n".join(out)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Bound what an operator can build."""
        self.budget.tick()
        sized = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        if operator == "+" and sized and isinstance(left, (str, list, tuple)) and isinstance(right, type(left)):
            self.budget.bound(len(left) + len(right))
        elif operator == "*" and sized and isinstance(left, (str, list)) and isinstance(right, int):
            self.budget.bound(len(left) * right)
        elif operator != "+" and sized:
            raise Exceeded(f"the operator {operator} on texts or lists")
        elif operator == "**" and abs(right) > 64:
            raise Exceeded("a power above 64")
        elif operator in ("*", "**") and any(abs(value) > 1 << 40 for value in (left, right)):
            raise Exceeded("a product of huge numbers")
        return self.budget.made(super().call_binop(context, operator, left, right))

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
        return self._made(super().call(*args, **kwargs))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """Count an access; methods that grow a string are not there."""
        self.budget.tick()
        if isinstance(obj, str) and attribute in _GROWING:
            raise Exceeded(f"str.{attribute}")
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Count an access."""
        self.budget.tick()
        return super().getitem(obj, argument)


class _CountedLoops(NodeVisitor):
    """Wraps what every loop goes over in a counting filter."""

    def visit_For(self, node: nodes.For) -> None:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "counted", [], [], None, None).set_lineno(node.lineno)


class _WeighedValues(NodeTransformer):
    """Wraps lists, tuples and mappings, and what a namespace is given, in the filter that weighs them."""

    def visit_List(self, node: nodes.List) -> nodes.Expr:
        self.generic_visit(node)
        return _made(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Expr:
        self.generic_visit(node)
        return _made(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _made(node) if node.ctx == "load" else node

    def visit_Assign(self, node: nodes.Assign) -> nodes.Assign:
        self.generic_visit(node)
        if node.find(nodes.NSRef) is not None:
            node.node = _made(node.node)
        return node


def _made(node: nodes.Node) -> nodes.Expr:
    made = nodes.Filter(node, "made", [], [], None, None)
    made.set_lineno(node.lineno)
    return made


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


class SandboxedTemplate:
    """One template, compiled once. Each run has a sandbox and a budget of its own: any thread may run it."""

    def __init__(self, text: str, *, source: str, caps: Caps) -> None:
        """Raises DataError, naming ``source``, for a template that is too large or does not compile."""
        if len(text) > caps.template_chars:
            raise DataError(f"{source} has {len(text)} characters: at most {caps.template_chars} are accepted")
        self.text, self._source, self._caps = text, source, caps
        self._code = self._compile()

    def run(self, variables: Mapping[str, Any], *, now: datetime.datetime | None = None) -> str:
        """The output. ``now`` is what ``strftime_now`` tells; None: the present.

        Raises:
            TemplateRefusal: the template refused what it was given; its own words.
            DataError: it failed, or exceeded its share of time, steps or size.
        """
        sandbox = _Sandbox(_Budget(self._caps), now)
        template = jinja2.Template.from_code(sandbox, self._code, sandbox.make_globals(None))
        parts: list[str] = []
        size = 0
        try:
            for part in template.generate(**variables):
                sandbox.budget.tick()
                size += len(part)
                sandbox.budget.bound(size)
                parts.append(part)
        except (Exceeded, jinja2.TemplateError, ArithmeticError, LookupError, RecursionError) as error:
            raise DataError(f"{self._source} failed: {error or type(error).__name__}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self._source} cannot render these messages: {error}") from error
        return "".join(parts)

    def _compile(self) -> CodeType:
        sandbox = _Sandbox(_Budget(self._caps), None)
        try:
            tree = sandbox.parse(self.text)
            _CountedLoops().visit(tree)
            return sandbox.compile(_WeighedValues().visit(_JoinsAsSums().visit(tree)))
        except (jinja2.TemplateError, RecursionError) as error:
            raise DataError(f"{self._source} does not compile: {error or type(error).__name__}") from error
