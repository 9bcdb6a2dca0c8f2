"""Bytes and counts as people write them: GiB = 2^30, GB = 10^9."""

from __future__ import annotations

import math
import re

from trivium.base.errors import ConfigError

_DECIMAL = ("", "k", "M", "G", "T", "P")
_FACTORS = {"": 1, "B": 1}
_FACTORS |= {f"{unit}{tail}": 10 ** (3 * power) for power, unit in enumerate(_DECIMAL) if unit for tail in ("", "B")}
_FACTORS |= {f"{unit}i{tail}": 2 ** (10 * power) for power, unit in enumerate(_DECIMAL) if unit for tail in ("", "B")}
_BY_LOWER = {unit.lower(): factor for unit, factor in _FACTORS.items()}
_QUANTITY = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)\s*([A-Za-z]*)\s*")


def parse_bytes(text: str | int) -> int:
    """``"80GB"`` → 80·10^9, ``"8GiB"`` → 8·2^30, ``"512"`` → 512; letter case does not matter, part bytes round up.

    Raises:
        ConfigError: not a number with one of the units.
    """
    if isinstance(text, int):
        if isinstance(text, bool) or text < 0:
            raise ConfigError(f"{text!r}: expected a size in bytes, for example 80GB or 8GiB")
        return text
    if not isinstance(text, str):
        raise ConfigError(f"{text!r}: expected whole bytes, or a size such as 80GB or 8GiB")
    found = _QUANTITY.fullmatch(text)
    factor = _BY_LOWER.get(found[2].lower()) if found else None
    if found is None or factor is None:
        units = ", ".join(unit for unit in _FACTORS if unit.endswith("B"))
        raise ConfigError(f"{text!r}: expected a size such as 80GB (10^9) or 8GiB (2^30); units: {units}")
    digits = found[1].replace("_", "")
    return int(digits) * factor if digits.isdigit() else math.ceil(float(digits) * factor)


def parse_count(text: str | int) -> int:
    """``"7.5b"`` → 7 500 000 000, ``"125M"``, ``"1T"``, ``"10k"`` or a plain number, as parameters and tokens are told.

    Raises:
        ConfigError: not a number with one of k, M, B, T.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        return text
    found = _QUANTITY.fullmatch(str(text))
    powers = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
    if found is None or found[2].lower() not in powers:
        raise ConfigError(f"{text!r}: expected a count such as 125M, 7.5B or 1T")
    factor: int = 10 ** powers[found[2].lower()]
    return round(float(found[1].replace("_", "")) * factor)


def format_bytes(count: float, *, binary: bool = True, digits: int = 2) -> str:
    """``1536`` → ``"1.50 KiB"``; with ``binary=False`` ``31.4·10^9`` → ``"31.40 GB"``. Below one unit: plain bytes."""
    base, tail = (1024.0, "iB") if binary else (1000.0, "B")
    size, sign = abs(float(count)), "-" if count < 0 else ""
    power = 0
    while power < len(_DECIMAL) - 1 and round(size, digits) >= base:
        size /= base
        power += 1
    if power == 0:
        return f"{sign}{size:.0f} B"
    unit = _DECIMAL[power].upper() if binary else _DECIMAL[power]
    return f"{sign}{size:.{digits}f} {unit}{tail}"


def format_count(count: float, *, digits: int = 2) -> str:
    """``13_150_000_000`` → ``"13.15B"``, ``950`` → ``"950"``: the suffixes of model cards, k, M, B, T."""
    size, sign = abs(float(count)), "-" if count < 0 else ""
    power = 0
    suffixes = ("", "k", "M", "B", "T")
    while power < len(suffixes) - 1 and round(size, digits) >= 1000.0:
        size /= 1000.0
        power += 1
    if power == 0:
        return f"{sign}{size:.0f}" if size == int(size) else f"{sign}{size:.{digits}f}"
    return f"{sign}{size:.{digits}f}{suffixes[power]}"
