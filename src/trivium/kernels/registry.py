"""Picks what runs a program: the native kernels where they are built and fit the machine, else torch, and says so."""

from __future__ import annotations

from typing import Literal

import torch

from trivium.base.errors import ConfigError
from trivium.kernels.executor import Executor
from trivium.kernels.matrix import Layout
from trivium.kernels.program import Program
from trivium.kernels.torch_executor import TorchExecutor

Backend = Literal["auto", "native", "torch"]


def available() -> tuple[str, ...]:
    """Backends that can run here, best first."""
    return ("torch",)


def layout(backend: str = "auto") -> Layout:
    """The layout in which that backend reads matrices (`matrix.pack`'s argument)."""
    return "panels" if _resolve(backend, torch.device("cpu")) == "native" else "plain"


def explain() -> str:
    """One line: what runs here, and what is lost where the native kernels do not."""
    return "kernels: torch; the native kernels are not built"


def executor(
    program: Program, *, backend: str = "auto", threads: int | None = None, device: str | torch.device = "cpu"
) -> Executor:
    """``program`` bound to a backend. ``threads``: of the native kernels; None: one per core this process may use.

    Raises:
        ConfigError: an unknown backend, or one that cannot run here or on that device.
    """
    _resolve(backend, torch.device(device))
    return TorchExecutor(program, device=device)


def _resolve(backend: str, device: torch.device) -> str:
    if backend not in ("auto", "native", "torch"):
        raise ConfigError(f"backend {backend!r}: expected auto, native or torch")
    if backend == "native" and "native" not in available():
        raise ConfigError(f"backend 'native': {explain()}")
    if backend == "native" and device.type != "cpu":
        raise ConfigError(f"backend 'native' runs on the CPU, not on {device}: leave it at auto or name torch")
    return backend if backend != "auto" else (available()[0] if device.type == "cpu" else "torch")
