"""Read a TOML or JSON file, or one ``a.b=value`` override, into a mapping that knows on which line each key stands."""

from __future__ import annotations

import difflib
import json
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trivium.base.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_FILE_BYTES = 1 << 20

KeyPath = tuple[str, ...]

_TOML_HEADER = re.compile(r"^\s*\[\[?\s*([^\[\]]+?)\s*\]\]?\s*(#.*)?$")
_TOML_KEY = re.compile(
    r"""^\s*((?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+)(?:\s*\.\s*(?:"[^"]*"|'[^']*'|[A-Za-z0-9_-]+))*)\s*="""
)
_TOML_PART = re.compile(r""""([^"]*)"|'([^']*)'|([A-Za-z0-9_-]+)""")
_TOML_PLACE = re.compile(r"\s*\(at (?:line (\d+), column (\d+)|end of document)\)\s*$")
_JSON_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}\[\]:,]')


@dataclass(frozen=True, kw_only=True)
class Source:
    """A mapping and where it came from. ``lines`` tells the line of each key; ``overrides`` the text that set a key."""

    name: str
    values: dict[str, Any]
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overrides: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where ``path``, or the nearest table holding it, was written: ``run.toml:12`` or ``--set zero.stage=4``."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.overrides:
                return f"--set {self.overrides[path[:length]]}"
            if path[:length] in self.lines:
                return f"{self.name}:{self.lines[path[:length]]}"
        return self.name


def read_source(path: str | Path) -> Source:
    """Read a TOML file, or a JSON one when its name ends in ``.json``.

    Raises:
        ConfigError: no regular file, empty, too large, not text, a syntax error (line and column), a duplicate key.
    """
    text = _read_text(Path(path))
    name = str(path)
    if Path(path).suffix.lower() == ".json":
        return Source(name=name, values=_parse_json(text, name), lines=_json_lines(text))
    return Source(name=name, values=_parse_toml(text, name), lines=_toml_lines(text))


def with_overrides(source: Source, overrides: tuple[str, ...] | list[str]) -> Source:
    """``source`` with ``a.b=value`` texts applied in turn; values are TOML, and plain words are strings.

    Raises:
        ConfigError: a text without ``=``, with an empty key, or that goes through a value which is no table.
    """
    values = _copy_tables(source.values)
    written = dict(source.overrides)
    for text in overrides:
        key, equals, raw = text.partition("=")
        path = tuple(part.strip() for part in key.split("."))
        if not equals or not all(path):
            raise ConfigError(f"--set {text}: expected KEY=VALUE, for example --set zero.stage=3")
        table = values
        for depth, part in enumerate(path[:-1]):
            inner = table.setdefault(part, {})
            if not isinstance(inner, dict):
                given = ".".join(path[: depth + 1])
                raise ConfigError(f"--set {text}: {given} is {inner!r}, not a table; set {given} itself")
            table = inner
        table[path[-1]] = parse_value(raw.strip())
        written[path] = text
    return Source(name=source.name, values=values, lines=source.lines, overrides=written)


def parse_value(text: str) -> Any:
    """One TOML value; what is not TOML is taken as the string it is, so that words need no quotes."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return parsed["value"] if list(parsed) == ["value"] else text


def _copy_tables(value: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy_tables(inner) if isinstance(inner, dict) else inner for key, inner in value.items()}


def _read_text(path: Path) -> str:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{_near_files(path)}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {_reason(error)}") from None
    if stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{path}: is a directory; expected a TOML or JSON file{_near_files(path / 'config.toml')}")
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is not a regular file; expected a TOML or JSON file")
    if status.st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path}: has {status.st_size:,} bytes; a configuration has at most {MAX_FILE_BYTES:,}")
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {_reason(error)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: is not UTF-8 text (byte 0x{raw[error.start]:02x} at offset {error.start})"
        ) from None
    if "\0" in text:
        raise ConfigError(f"{path}: is not text (a zero byte at offset {raw.index(0)})")
    if not text.strip():
        raise ConfigError(f"{path}: is empty; see docs/getting-started.md for an example")
    return text


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def _near_files(path: Path) -> str:
    try:
        names = [entry.name for entry in path.parent.iterdir() if entry.suffix.lower() in (".toml", ".json")]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(path.name, names, n=1) or (names if len(names) == 1 else [])
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _parse_toml(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError(f"{name}: is nested too deeply") from None
    except ValueError as error:
        message = str(error)
        found = _TOML_PLACE.search(message)
        if found is None:
            raise ConfigError(f"{name}: {message}") from None
        last = text.split("\n")
        line, column = (found[1], found[2]) if found[1] else (str(len(last)), str(len(last[-1]) + 1))
        raise ConfigError(f"{name}:{line}:{column}: {message[: found.start()]}") from None


def _toml_lines(text: str) -> dict[KeyPath, int]:
    """Lines of tables and keys, read line by line: enough to point at one, never used to parse."""
    lines: dict[KeyPath, int] = {}
    table: KeyPath = ()
    for number, line in enumerate(text.split("\n"), start=1):
        header, key = _TOML_HEADER.match(line), _TOML_KEY.match(line)
        if key:
            parts = (*table, *_toml_parts(key[1]))
            for length in range(len(table) + 1, len(parts) + 1):
                lines.setdefault(parts[:length], number)
        elif header:
            table = _toml_parts(header[1])
            lines.setdefault(table, number)
    return lines


def _toml_parts(text: str) -> KeyPath:
    return tuple(found[1] or found[2] or found[3] for found in _TOML_PART.finditer(text))


def _parse_json(text: str, name: str) -> dict[str, Any]:
    def no_constant(constant: str) -> Any:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        parsed = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}:{error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        reason = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(f"{name}: {reason}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: expected an object of keys and values, got {type(parsed).__name__}")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice in one object; keep one of them")
        found[key] = value
    return found


def _json_lines(text: str) -> dict[KeyPath, int]:
    """Lines of an object's keys; keys inside lists are told by the list's own key."""
    lines: dict[KeyPath, int] = {}
    stack: list[str | None] = []
    key: str | None = None
    word = ""
    for token in _JSON_TOKEN.finditer(text):
        match token[0][0]:
            case '"':
                word = token[0]
            case ":":
                key = json.loads(word)
                path = tuple(part for part in (*stack[1:], key) if part is not None)
                lines.setdefault(path, text.count("\n", 0, token.start()) + 1)
            case "{" | "[":
                stack.append(key)
                key = None
            case "}" | "]":
                key = stack.pop() if stack else None
            case _:
                key = None
    return lines
