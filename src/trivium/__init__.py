"""Trivium: train models larger than a device, give them experts, and serve them.

Rooms (``trivium.zero``, ``trivium.checkpoint``, …) load when first named; ``import trivium`` alone does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trivium.dist.launch import init as init
    from trivium.dist.launch import shutdown as shutdown

__version__ = "0.1.0"

_ROOMS = (
    "activation",
    "base",
    "bench",
    "checkpoint",
    "cli",
    "dist",
    "inference",
    "kernels",
    "memory",
    "models",
    "moe",
    "nn",
    "parallel",
    "plan",
    "serve",
    "train",
    "zero",
)
_LAUNCH = ("init", "shutdown")

__all__ = ["__version__", "init", "shutdown"]


def __getattr__(name: str) -> Any:
    if name in _LAUNCH:
        return getattr(importlib.import_module("trivium.dist.launch"), name)
    if name not in _ROOMS:
        raise AttributeError(f"module 'trivium' has no attribute {name!r}; rooms: {', '.join(_ROOMS)}")
    try:
        return importlib.import_module(f"trivium.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"trivium.{name}":
            raise
        raise AttributeError(f"trivium.{name} is not part of trivium {__version__} yet") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAUNCH, *_ROOMS})
