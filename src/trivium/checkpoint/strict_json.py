"""JSON from outside: bounded size, no duplicate keys, no surprises; and typed values that JSON alone cannot hold."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import CheckpointError
from trivium.checkpoint.dtypes import dtype_name, dtype_of, from_bytes, raw_bytes

_MAX_INLINE_BYTES = 1 << 20


def json_limit(payload_bytes: int) -> int:
    """The largest JSON file we write and parse beside ``payload_bytes`` of tensors; real ones are far below a quarter.

    This bounds the memory that a crafted file can make us take.
    """
    return min(512 << 20, (2 << 20) + payload_bytes // 4)


def parse(raw: bytes, what: str | Path) -> dict[str, Any]:
    """The JSON object in ``raw``. Raises CheckpointError on anything else, on duplicate keys and on NaN."""
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not valid JSON: {error or type(error).__name__}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: expected a JSON object, found a {type(value).__name__}")
    return value


def dump(value: Mapping[str, Any]) -> bytes:
    """``value`` as compact UTF-8 JSON; non-finite numbers are refused (see `encode`)."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:200]!r}")
            seen.add(key)
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def encode(value: Any, where: str) -> Any:
    """``value`` as JSON that `decode` turns back into an equal value of the same type.

    Takes None, bool, int, float (also non-finite), str, bytes, list, tuple, dict and tensors up to 1 MiB.
    Raises CheckpointError, naming ``where``, on anything else.
    """
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, int):
        return int(value)
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where)
    if isinstance(value, (bytes, bytearray)):
        return {"$bytes": base64.b64encode(_small(bytes(value), where)).decode()}
    if isinstance(value, torch.Tensor):
        data = _small(bytes(raw_bytes(value.detach().cpu())), where)
        return {"$tensor": [dtype_name(value.dtype), list(value.shape), base64.b64encode(data).decode()]}
    raise CheckpointError(
        f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved without pickle: "
        "give None, bool, int, float, str, bytes, list, tuple, dict or a tensor up to 1 MiB"
    )


def _encode_mapping(value: Mapping[Any, Any], where: str) -> Any:
    plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
    pairs = [(key, encode(item, f"{where}[{key!r}]")) for key, item in value.items()]
    return dict(pairs) if plain else {"$dict": [[encode(key, where), item] for key, item in pairs]}


def _small(data: bytes, where: str) -> bytes:
    if len(data) > _MAX_INLINE_BYTES:
        raise CheckpointError(
            f"{where} has {len(data)} bytes: at most {_MAX_INLINE_BYTES} fit in a manifest; "
            "register it as a buffer of the model"
        )
    return data


def decode(value: Any, where: str) -> Any:
    """The value that `encode` was given. Raises CheckpointError on what `encode` cannot have made."""
    try:
        return _decode(value, where)
    except RecursionError as error:
        raise CheckpointError(f"{where} is nested too deeply") from error


def _decode(value: Any, where: str) -> Any:
    if isinstance(value, list):
        return [_decode(item, where) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((key, item),) = value.items()
        if key.startswith("$"):
            return _decode_tagged(key, item, where)
    return {key: _decode(item, where) for key, item in value.items()}


def _decode_tagged(tag: str, item: Any, where: str) -> Any:
    readers: dict[str, Callable[[Any], Any]] = {
        "$float": _decode_float,
        "$tuple": lambda items: tuple(_decode(entry, where) for entry in items),
        "$dict": lambda pairs: {_decode(key, where): _decode(entry, where) for key, entry in pairs},
        "$bytes": lambda text: base64.b64decode(text, validate=True),
        "$tensor": _decode_tensor,
    }
    if tag not in readers:
        raise CheckpointError(f"{where}: unknown kind of value {tag[:40]!r}: written by a newer version, or altered")
    try:
        return readers[tag](item)
    except (TypeError, ValueError, KeyError, binascii.Error, RuntimeError) as error:
        raise CheckpointError(f"{where}: malformed {tag} value: {error}") from error


def _decode_float(text: str) -> float:
    if text not in ("nan", "inf", "-inf"):
        raise ValueError(f"{str(text)[:40]!r} is not nan, inf or -inf")
    return float(text)


def _decode_tensor(item: Any) -> torch.Tensor:
    name, shape, text = item
    data = bytearray(base64.b64decode(text, validate=True))
    dtype = dtype_of(name, "a stored tensor")
    if not isinstance(shape, list) or not all(type(extent) is int and 0 <= extent <= len(data) for extent in shape):
        raise ValueError(f"{str(shape)[:80]} is not the shape of {len(data)} bytes")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{shape[:8]} of {name} is not the shape of {len(data)} bytes")
    return from_bytes(data, dtype).reshape(shape)
