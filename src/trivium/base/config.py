"""Typed configuration: frozen dataclasses from TOML, JSON, mappings and command-line overrides.

Nothing is coerced and nothing is ignored: an unknown key, a wrong type or a number out of range is a ConfigError that
names the key, where it was written, what was given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from trivium.base.errors import ConfigError
from trivium.base.source import KeyPath, Source, read_source, with_overrides
from trivium.base.units import parse_bytes

T = TypeVar("T")

_MAX_ERRORS = 10


@dataclass(frozen=True)
class Range:
    """Bounds of a number, ``Annotated[int, Range(0, 3)]``: ``low``, ``high`` allowed, ``above``, ``below`` not."""

    low: float | None = None
    high: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies within."""
        return (
            (self.low is None or value >= self.low)
            and (self.high is None or value <= self.high)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.low is not None and self.high is not None:
            return f"from {self.low} to {self.high}"
        signs = ((">=", self.low), (">", self.above), ("<=", self.high), ("<", self.below))
        return " and ".join(f"{sign} {bound}" for sign, bound in signs if bound is not None)


@dataclass(frozen=True)
class Bytes:
    """Marks an ``Annotated[int, Bytes()]`` that may also be written as ``"80GB"`` or ``"8GiB"``."""


def build(cls: type[T], mapping: Mapping[str, Any], source: str = "config") -> T:
    """The dataclass ``cls`` from a nested mapping. A field named ``from_`` is written ``from``.

    Raises:
        ConfigError: every wrong key at once, up to ten.
    """
    return _build_source(cls, Source(name=source, values=dict(mapping)))


def load(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The dataclass ``cls`` from a TOML or JSON file and ``("zero.stage=3", ...)`` on top.

    Raises:
        ConfigError: as `build`, with ``file:line``; also what `read_source` raises.
    """
    return _build_source(cls, with_overrides(read_source(path), tuple(overrides)))


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-like values, keys as in a file; ``build(type(config), it)`` gives it back."""
    return {_key(field): _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def diff(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """What changed from ``old`` to ``new``, configs or mappings: dotted key → (old, new); None for absent."""
    before = _flatten(old if isinstance(old, Mapping) else to_dict(old))
    after = _flatten(new if isinstance(new, Mapping) else to_dict(new))
    keys = [*before, *(key for key in after if key not in before)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def did_you_mean(word: str, allowed: Sequence[str], *, what: str = "allowed") -> str:
    """``"; did you mean 'stage'?"``, or the list of what is allowed when nothing is near."""
    near = difflib.get_close_matches(word, allowed, n=1, cutoff=0.6)
    if not near:
        near = difflib.get_close_matches(word.lower().replace("-", "_"), allowed, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; {what}: {', '.join(allowed)}" if allowed else ""


def _build_source(cls: type[T], source: Source) -> T:
    builder = _Builder(source, cls)
    built = builder.dataclass(cls, source.values, ())
    if builder.errors:
        more = len(builder.errors) - _MAX_ERRORS
        tail = [f"... and {more} more"] if more > 0 else []
        raise ConfigError("\n".join(builder.errors[:_MAX_ERRORS] + tail))
    result: T = built
    return result


class _Wrong(Exception):
    """The value is not of the type asked for; carries what was expected, for a union to try its next member."""

    def __init__(self, expected: str, path: KeyPath | None = None, value: Any = None) -> None:
        super().__init__(expected)
        self.expected = expected
        self.path = path
        self.value = value


class _Builder:
    """Builds one config and collects what is wrong with it."""

    def __init__(self, source: Source, root: type[Any]) -> None:
        self.source = source
        self.root = root
        self.errors: list[str] = []

    def dataclass(self, cls: type[Any], values: Any, path: KeyPath) -> Any:
        if not isinstance(values, Mapping):
            self._fail(path, f"{_told(path, values)}: expected a table ({_table_keys(cls)})")
            return None
        known = len(self.errors)
        fields = {_key(field): field for field in dataclasses.fields(cls) if field.init}
        hints = get_type_hints(cls, include_extras=True)
        for key in values:
            if key not in fields:
                self._unknown(key, list(fields), path)
        arguments: dict[str, Any] = {}
        for key, field in fields.items():
            if key in values:
                arguments[field.name] = self._field(hints[field.name], values[key], (*path, key))
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                kind = _describe(hints[field.name])
                self._fail(path, f"the key {'.'.join((*path, key))!r} is missing: expected {kind}")
        if len(self.errors) > known:
            return None
        try:
            return cls(**arguments)
        except (ConfigError, ValueError) as error:
            prefix = f"[{'.'.join(path)}] " if path else ""
            self._fail(path, f"{prefix}{error}")
            return None

    def _field(self, hint: Any, value: Any, path: KeyPath) -> Any:
        try:
            return self._value(hint, value, path)
        except _Wrong as wrong:
            where, given = (wrong.path, wrong.value) if wrong.path else (path, value)
            self._fail(where, f"{_told(where, given)}: expected {wrong.expected}")
            return None

    def _value(self, hint: Any, value: Any, path: KeyPath) -> Any:
        origin, arguments = get_origin(hint), get_args(hint)
        if hint is Any:
            return value
        if origin is Annotated:
            return self._annotated(hint, value, path)
        if origin is Literal:
            for allowed in arguments:
                if type(allowed) is type(value) and allowed == value:
                    return value
            raise _Wrong(_describe(hint) + _near_literal(value, arguments))
        if origin in (Union, types.UnionType):
            return self._union(hint, value, path)
        if origin in (list, tuple, Sequence) or hint in (list, tuple):
            return self._sequence(hint, value, path)
        if origin in (dict, Mapping) or hint is dict:
            if not isinstance(value, Mapping):
                raise _Wrong(_describe(hint))
            inner = arguments[1] if arguments else Any
            return {key: self._field(inner, item, (*path, str(key))) for key, item in value.items()}
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return value if isinstance(value, hint) else self.dataclass(hint, value, path)
        return _scalar(hint, value)

    def _annotated(self, hint: Any, value: Any, path: KeyPath) -> Any:
        inner, *marks = get_args(hint)
        if isinstance(value, str) and any(isinstance(mark, Bytes) for mark in marks):
            try:
                value = parse_bytes(value)
            except ConfigError:
                raise _Wrong(_describe(hint)) from None
        try:
            result = self._value(inner, value, path)
        except _Wrong as wrong:
            raise (wrong if wrong.path else _Wrong(_describe(hint))) from None
        for mark in marks:
            if isinstance(mark, Range):
                for item in result if isinstance(result, list | tuple) else (result,):
                    if isinstance(item, int | float) and not mark.holds(item):
                        raise _Wrong(_describe(hint))
        return result

    def _union(self, hint: Any, value: Any, path: KeyPath) -> Any:
        members = get_args(hint)
        tables = [member for member in members if dataclasses.is_dataclass(member)]
        if isinstance(value, Mapping) and len(tables) == 1:
            return self._value(tables[0], value, path)
        deep: _Wrong | None = None
        for member in sorted(members, key=lambda member: member is float):
            if dataclasses.is_dataclass(member) and not isinstance(value, Mapping):
                continue
            try:
                return self._value(member, value, path)
            except _Wrong as wrong:
                deep = deep or (wrong if wrong.path else None)
        raise deep or _Wrong(_describe(hint))

    def _sequence(self, hint: Any, value: Any, path: KeyPath) -> Any:
        origin, arguments = get_origin(hint) or hint, get_args(hint)
        if not isinstance(value, list | tuple):
            raise _Wrong(_describe(hint))
        fixed = origin is tuple and arguments and Ellipsis not in arguments
        if fixed and len(arguments) != len(value):
            raise _Wrong(_describe(hint))
        kinds = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
        items = []
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True)):
            where = (*path[:-1], f"{path[-1]}[{index}]")
            try:
                items.append(self._value(kind, item, where))
            except _Wrong as wrong:
                raise (wrong if wrong.path else _Wrong(wrong.expected, where, item)) from None
        return items if origin is list else tuple(items)

    def _unknown(self, key: Any, allowed: list[str], path: KeyPath) -> None:
        given = ".".join((*path, str(key)))
        homes = [home for home in _tables_with(self.root, str(key)) if home != path]
        if homes:
            hint = f"; it belongs in {' or '.join('[' + '.'.join(home) + ']' for home in homes[:3])}"
        else:
            hint = did_you_mean(str(key), allowed, what=f"keys of [{'.'.join(path)}]" if path else "keys")
        self._fail((*path, str(key)), f"unknown key {given!r}{hint}")

    def _fail(self, path: KeyPath, message: str) -> None:
        self.errors.append(f"{self.source.place(_without_index(path))}: {message}")


def _scalar(hint: Any, value: Any) -> Any:
    if hint is None or hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is Path:
        if isinstance(value, str | Path) and str(value) and "\0" not in str(value):
            return Path(value)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if value is member or value == member.value:
                return member
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _Wrong(_describe(hint))


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a finite number",
    str: "a string",
    bool: "true or false",
    Path: "a path",
    None: "nothing",
    type(None): "nothing",
    Any: "anything",
}


def _describe(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        kind = (
            'a size in bytes such as "8GiB"'
            if any(isinstance(m, Bytes) for m in arguments)
            else _describe(arguments[0])
        )
        return " ".join([kind, *(str(mark) for mark in arguments[1:] if isinstance(mark, Range))])
    if origin is Literal:
        return "one of " + ", ".join(repr(allowed) for allowed in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(member) for member in arguments if member is not type(None)) + (
            ", or nothing" if type(None) in arguments else ""
        )
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)}: {', '.join(_describe(kind) for kind in arguments)}"
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        return f"a list, each item {_describe(arguments[0])}" if arguments else "a list"
    if origin in (dict, Mapping) or hint is dict:
        return "a table"
    if dataclasses.is_dataclass(hint):
        return f"a table ({_table_keys(hint)})"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return "one of " + ", ".join(repr(member.value) for member in hint)
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _near_literal(value: Any, allowed: Sequence[Any]) -> str:
    if not isinstance(value, str):
        return ""
    near = difflib.get_close_matches(value, [word for word in allowed if isinstance(word, str)], n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _told(path: KeyPath, value: Any) -> str:
    text = repr(value)
    return f"{'.'.join(path) or 'the configuration'} = {text if len(text) <= 60 else text[:57] + '...'}"


def _key(field: dataclasses.Field[Any]) -> str:
    return field.name.rstrip("_")


def _table_keys(cls: Any) -> str:
    return "keys: " + ", ".join(_key(field) for field in dataclasses.fields(cls) if field.init)


def _without_index(path: KeyPath) -> KeyPath:
    return tuple(part.split("[", 1)[0] for part in path)


def _tables_with(cls: type[Any], key: str, path: KeyPath = ()) -> list[KeyPath]:
    """Paths of the tables under ``cls`` that have ``key``."""
    found: list[KeyPath] = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init and _key(field) == key and path:
            found.append(path)
        for kind in (hints[field.name], *get_args(hints[field.name])):
            if dataclasses.is_dataclass(kind) and isinstance(kind, type):
                found += _tables_with(kind, key, (*path, _key(field)))
    return found


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat
