"""A request's body as JSON: bounded in depth and parts before it is built, exact about where it is wrong."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from trivium.serve.errors import ApiError
from trivium.serve.limits import Limits

_PARTS = re.compile(r'"[^"]*"?|[\[{]|[\]}]')
_MARKS = {b"\xef\xbb\xbf": "a UTF-8 byte order mark", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def parse(body: bytes, limits: Limits) -> dict[str, Any]:
    """The JSON object in ``body``.

    Raises:
        ApiError: 400 with the byte or character at fault: not UTF-8, not JSON, not an object, duplicate keys, NaN,
            infinities, numbers too long or too large, lone surrogates, too deep, too many parts.
    """
    text = _text(body)
    _bound(text, limits)
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except json.JSONDecodeError as error:
        raise _fault(f"the body is not JSON: {error.msg} at character {error.pos}") from None
    except ValueError:  # Python's own bound on digits
        raise _fault("an integer has more than 4300 digits", "invalid_number") from None
    except RecursionError:
        raise _fault(f"the body is nested deeper than {limits.json_depth} levels", "json_too_deep") from None
    if not isinstance(value, dict):
        raise _fault(f"the body is a JSON {_kind(value)}; expected an object")
    if "\\u" in text:
        _refuse_surrogates(value)
    return value


def _text(body: bytes) -> str:
    if not body.strip():
        raise _fault("the body is empty; expected a JSON object (offset 0)")
    for mark, name in _MARKS.items():
        if body.startswith(mark):
            raise _fault(f"the body begins with {name} at offset 0; send plain UTF-8", "invalid_encoding")
    if b"\x00" in body[:4]:
        raise _fault("the body is UTF-16 or UTF-32 (a zero byte near offset 0); send plain UTF-8", "invalid_encoding")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _fault(f"the body is not UTF-8: byte 0x{body[error.start]:02x} at offset {error.start}") from None


def _bound(text: str, limits: Limits) -> None:
    """Depth and number of parts, in time that the caps bound: an attack is left at its first part too many."""
    opening = text.count("[") + text.count("{")
    if opening <= limits.json_depth and opening + text.count('"') <= limits.json_items:
        return
    depth = 0
    plain = text.replace("\\\\", "..").replace('\\"', "..")  # same offsets, and a quote ends a string
    for parts, match in enumerate(_PARTS.finditer(plain), 1):
        first = plain[match.start()]
        if first in "[{":
            depth += 1
            if depth > limits.json_depth:
                message = f"nested deeper than {limits.json_depth} levels at character {match.start()}"
                raise _fault(f"the body is {message}", "json_too_deep")
        elif first in "]}":
            depth -= 1
        if parts > limits.json_items:
            message = f"more than {limits.json_items} strings, lists and objects at character {match.start()}"
            raise _fault(f"the body has {message}", "json_too_large")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise invalid_key(key)
            seen.add(key)
    return found


def invalid_key(key: str) -> ApiError:
    """Two values for one key."""
    return ApiError(400, "duplicate_key", f"the key {json.dumps(key[:100])} stands twice in one object")


def _constant(text: str) -> NoReturn:
    raise _fault(f"{text} is not JSON and not a number that can be used", "invalid_number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _fault(f"the number {text[:40]} is too large", "invalid_number")
    return value


def _refuse_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        message = f"a string holds the lone surrogate \\u{code:04x}, which is half a character"
        raise _fault(message, "invalid_encoding") from None


def _kind(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _fault(message: str, code: str = "invalid_json") -> ApiError:
    return ApiError(400, code, message)
