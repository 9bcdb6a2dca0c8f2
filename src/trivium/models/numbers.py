"""Checks of a shape's single numbers, told by key and value."""

from __future__ import annotations

import math

from trivium.base.errors import ConfigError


def positive_int(key: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a whole number of at least 1; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{key}={value!r}: expected a whole number of at least 1")


def positive_float(key: str, value: object) -> None:
    """Raise ConfigError unless ``value`` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise ConfigError(f"{key}={value!r}: expected a positive number")
