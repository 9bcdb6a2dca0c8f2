"""Reading a foreign ``config.json`` value by value: each with its type, range and what absence means to its library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trivium.base.errors import ConfigError
from trivium.models.architecture import Activation

# The largest whole number that any key may hold: a config that asks for more is refused before anything is built.
_MOST = 1 << 31
_MOST_LAYERS = 1 << 12
_ACTIVATIONS: tuple[tuple[str, Activation], ...] = (
    ("silu", "silu"),
    ("swish", "silu"),
    ("gelu", "gelu"),
    ("gelu_python", "gelu"),
    ("gelu_new", "gelu_tanh"),
    ("gelu_fast", "gelu_tanh"),
    ("gelu_pytorch_tanh", "gelu_tanh"),
    ("gelu_python_tanh", "gelu_tanh"),
    ("quick_gelu", "quick_gelu"),
    ("relu", "relu"),
    ("relu2", "relu2"),
    ("sigmoid", "sigmoid"),
    ("tanh", "tanh"),
)


class Settings:
    """The values of one config. ``what`` names it in messages. null and a missing key mean the same.

    Every method raises ConfigError, naming the key, what was found and what is expected.
    """

    def __init__(self, values: Mapping[str, Any], what: str) -> None:
        self.values, self.what = values, what

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is there, as it is; None when none is."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        return None

    def whole(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """A whole number from ``least`` on; without a default it must be there. Further ``keys`` are other names."""
        found = self.get(*keys)
        if found is None:
            if default is None:
                raise ConfigError(f"{keys[0]} is missing from the config of {self.what}: it must be there")
            return default
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or not least <= found < _MOST:
            raise self.wrong(keys[0], found, f"a whole number from {least} to {_MOST - 1}")
        return found

    def whole_or_none(self, *keys: str) -> int | None:
        """A whole number of at least 1, or None."""
        return None if self.get(*keys) is None else self.whole(*keys)

    def layers(self, *keys: str) -> int:
        """How many layers there are."""
        found = self.whole(*keys)
        if found > _MOST_LAYERS:
            raise self.wrong(keys[0], found, f"at most {_MOST_LAYERS}")
        return found

    def further_layers(self, key: str) -> int:
        """How many further layers there are: 0 where the key is missing."""
        found = self.whole(key, default=0, least=0)
        if found > _MOST_LAYERS:
            raise self.wrong(key, found, f"a whole number from 0 to {_MOST_LAYERS}")
        return found

    def number(self, *keys: str, default: float | None = None, positive: bool = True) -> float:
        """A finite number, above zero unless told otherwise."""
        found = self.get(*keys)
        if found is None:
            if default is None:
                raise ConfigError(f"{keys[0]} is missing from the config of {self.what}: it must be there")
            return default
        real = not isinstance(found, bool) and isinstance(found, (int, float)) and math.isfinite(found)
        if not real or (positive and found <= 0):
            raise self.wrong(keys[0], found, "a positive number" if positive else "a number")
        return float(found)

    def number_or_none(self, *keys: str) -> float | None:
        """A positive number, or None."""
        return None if self.get(*keys) is None else self.number(*keys)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        found = self.get(key)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self.wrong(key, found, "true or false")
        return found

    def activation(self, *keys: str, default: str) -> Activation:
        """An activation by its name there."""
        found = self.get(*keys)
        found = default if found is None else found
        for theirs, ours in _ACTIVATIONS:
            if theirs == found:
                return ours
        raise self.wrong(keys[0], found, "one of " + ", ".join(name for name, _ in _ACTIVATIONS))

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` positive numbers."""
        found = self.get(key)
        good = isinstance(found, list) and all(
            isinstance(one, (int, float)) and not isinstance(one, bool) and math.isfinite(one) and one > 0
            for one in found
        )
        if not good or len(found) != length:
            raise self.wrong(key, found, f"a list of {length} positive numbers")
        return tuple(float(one) for one in found)

    def indices(self, key: str, below: int) -> frozenset[int]:
        """A list of layer numbers; missing means none."""
        found = self.get(key)
        found = [] if found is None else found
        if not isinstance(found, list) or not all(type(one) is int and 0 <= one < below for one in found):
            raise self.wrong(key, found, f"a list of layer numbers below {below}")
        return frozenset(found)

    def fixed(self, key: str, *allowed: Any) -> None:
        """Refuse any value of ``key`` but these; missing is allowed."""
        found = self.get(key)
        if found is not None and found not in allowed:
            raise self.wrong(key, found, " or ".join(repr(one) for one in allowed) + ", or no such key")

    def part(self, key: str) -> Settings | None:
        """The object under ``key``, or None."""
        found = self.get(key)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise self.wrong(key, found, "an object or null")
        return Settings(found, f"{self.what}, {key}")

    def divided(self, total: int, what: str, by: int, by_what: str) -> int:
        """``total / by``, which must come out even."""
        if total % by:
            raise ConfigError(f"{what}={total} in the config of {self.what} is not a multiple of {by_what}={by}")
        return total // by

    def wrong(self, key: str, found: Any, expected: str) -> ConfigError:
        """The error that names ``key``, what it holds and what it may hold."""
        return ConfigError(f"{key}={str(found)[:200]!s} in the config of {self.what}: expected {expected}")


def windows(settings: Settings, layers: int, window: int | None, default: list[bool]) -> list[int | None]:
    """Each layer's window by ``layer_types``; without that key layers where ``default`` is True have it."""
    kinds = settings.get("layer_types")
    if kinds is None:
        sliding = default
    else:
        names = ("sliding_attention", "full_attention")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in names for kind in kinds):
            raise settings.wrong("layer_types", kinds, f"{layers} times one of {' and '.join(names)}")
        sliding = [kind == names[0] for kind in kinds]
    if any(sliding) and window is None:
        raise settings.wrong("sliding_window", window, "a whole number, as some layers slide")
    return [window if slides else None for slides in sliding]
