"""Read one field of a request: each reader takes what was sent and the field's name, and returns it checked."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.serve.errors import ApiError, invalid, shown

Reader = Callable[[Any, str], Any]


@dataclass(frozen=True, kw_only=True)
class Field:
    """A documented field: how it is read, what stands when it is absent or null, and what the documents say of it.

    ``honoured`` False: only values that change nothing are let through; the others are refused with a 400.
    """

    name: str
    read: Reader
    default: Any = None
    required: bool = False
    honoured: bool = True
    about: str = ""


def read_fields(body: Mapping[str, Any], table: Sequence[Field], prefix: str = "") -> dict[str, Any]:
    """Every field of ``table`` with its value. Raises ApiError 400 for a wrong, a missing and an unknown field."""
    known = {field.name: field for field in table}
    for name in body:
        if name not in known:
            raise _unknown(name, list(known), prefix)
    values: dict[str, Any] = {}
    for name, field in known.items():
        value = body.get(name)
        if value is None:
            if field.required:
                message = f"{prefix}{name} is required"
                raise ApiError(400, "missing_required_parameter", message, param=prefix + name)
            values[name] = field.default
        else:
            values[name] = field.read(value, prefix + name)
    return values


def _unknown(name: str, known: Sequence[str], prefix: str) -> ApiError:
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known fields: {', '.join(known)}"
    shown_name = (prefix + name)[:100]
    return ApiError(400, "unknown_parameter", f"unknown field {shown(shown_name, 120)}{hint}", param=shown_name)


def boolean(value: Any, param: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise _type(value, param, "true or false")
    return value


def integer(low: int, high: int) -> Reader:
    """A whole number from ``low`` to ``high``."""

    def read(value: Any, param: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise _type(value, param, f"a whole number from {low} to {high}")
        if not low <= value <= high:
            raise invalid(param, f"{param}={shown(value)}: expected a whole number from {low} to {high}")
        return value

    return read


def number(low: float, high: float, *, above: bool = False) -> Reader:
    """A number from ``low`` (``above``: more than it) to ``high``."""
    bound = f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}"

    def read(value: Any, param: str) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _type(value, param, bound)
        if not low <= value <= high or not math.isfinite(value) or (above and value == low):
            raise invalid(param, f"{param}={shown(value)}: expected {bound}")
        return float(value)

    return read


def text(limit: int, *, empty: bool = True) -> Reader:
    """A string of at most ``limit`` characters."""
    bound = f"a string of {0 if empty else 1} to {limit} characters"

    def read(value: Any, param: str) -> str:
        if not isinstance(value, str):
            raise _type(value, param, bound)
        if len(value) > limit or not (value or empty):
            raise invalid(param, f"{param} has {len(value)} characters: expected {bound}")
        return value

    return read


def choice(*options: str) -> Reader:
    """One of a few words."""

    def read(value: Any, param: str) -> str:
        if not isinstance(value, str) or value not in options:
            raise invalid(param, f"{param}={shown(value)}: expected one of {', '.join(options)}")
        return value

    return read


def function_name(value: Any, param: str) -> str:
    """A function's name: letters, digits, '_', '-' and '.', at most 64."""
    name = str(text(64, empty=False)(value, param))
    if not all(letter.isascii() and (letter.isalnum() or letter in "_-.") for letter in name):
        raise invalid(param, f"{param}={shown(name)}: expected letters, digits, '_', '-' and '.'")
    return name


def mapping(value: Any, param: str) -> dict[str, Any]:
    """A JSON object."""
    if not isinstance(value, dict):
        raise _type(value, param, "an object")
    return value


def items(read_one: Reader, low: int, high: int) -> Reader:
    """A list of ``low`` to ``high`` entries, each read by ``read_one`` under the name ``field[index]``."""

    def read(value: Any, param: str) -> list[Any]:
        if not isinstance(value, list):
            raise _type(value, param, f"a list of {low} to {high} entries")
        if not low <= len(value) <= high:
            raise invalid(param, f"{param} has {len(value)} entries: expected {low} to {high}")
        return [read_one(entry, f"{param}[{index}]") for index, entry in enumerate(value)]

    return read


def refused(why: str, *neutral: Any) -> Reader:
    """Only ``neutral`` values, which ask for what happens anyway, are let through."""

    def read(value: Any, param: str) -> None:
        if not any(type(value) is type(same) and value == same for same in neutral):
            raise ApiError(400, "unsupported_parameter", f"{param}={shown(value)} is not supported: {why}", param=param)

    return read


def _type(value: Any, param: str, expected: str) -> ApiError:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    found = names.get(type(value), "a number")
    return invalid(param, f"{param} is {found}, {shown(value)}: expected {expected}", "invalid_type")
