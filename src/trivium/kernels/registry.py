"""Picks what runs a program: the native kernels where they are built and fit the machine, else torch, and says so."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Literal

import torch

from trivium.base.errors import ConfigError
from trivium.kernels import build
from trivium.kernels.executor import Executor
from trivium.kernels.matrix import Layout, Matrix
from trivium.kernels.native_executor import NativeExecutor, open_library
from trivium.kernels.program import Gated, Linear, Operation, Program
from trivium.kernels.torch_executor import TorchExecutor

Backend = Literal["auto", "native", "torch"]
# Bits of trivium_features() in native/features.cpp.
_NEEDS = {"avx2": 1, "avx512": 2, "amx": 4}


def available() -> tuple[str, ...]:
    """Backends that can run here, best first."""
    return ("native", "torch") if native_variants() else ("torch",)


def native_variants() -> tuple[str, ...]:
    """Variants of the native kernels that are built and that this CPU runs, best first."""
    built = [name for name in build.variants() if build.library(name).exists()]
    probe = build.library(build.FEATURES)
    if not built or not probe.exists():
        return ()
    features = ctypes.CDLL(str(probe)).trivium_features()
    return tuple(name for name in built if features & _NEEDS.get(name, 0) == _NEEDS.get(name, 0))


def layout(backend: str = "auto") -> Layout:
    """The layout in which that backend reads matrices (`matrix.pack`'s argument)."""
    return "panels" if _resolve(backend, torch.device("cpu")) == "native" else "plain"


def explain() -> str:
    """One line: what runs here, and what is lost where the native kernels do not."""
    found = native_variants()
    if found and found[0] != "generic":
        return f"kernels: native {found[0]}"
    if found:
        return (
            "kernels: native, but without this CPU's vector instructions (the compiler that built them was too old, or "
            "the CPU has none that they know): several times slower than they could be"
        )
    lost = "generation is several times slower, and answers may depend on the batch"
    if build.find_compiler() is None:
        return (
            f"kernels: torch alone, no C++ compiler was there to build the native ones ({lost}); install g++ or clang"
        )
    return f"kernels: torch alone, the native ones are not built ({lost}): python -m trivium.kernels.build"


def lost() -> str | None:
    """`explain`'s line where a CPU runs slower here than it could; None where nothing is lost."""
    found = native_variants()
    return None if found and found[0] != "generic" else explain()


def executor(
    program: Program,
    *,
    backend: str = "auto",
    threads: int | None = None,
    device: str | torch.device = "cpu",
    max_sequences: int = 64,
) -> Executor:
    """``program`` bound to a backend. ``threads``: of the native kernels; None: one per core this process may use.
    ``max_sequences``: of the largest decode step that is captured on CUDA.

    "native:avx2" and the like name a variant. On "auto" matrices in panels run natively, plain ones in torch.

    Raises:
        ConfigError: an unknown backend, or one that cannot run here or on that device; fewer than one thread.
    """
    if threads is not None and threads < 1:
        raise ConfigError(f"threads={threads}: expected 1 or more, or none given for all cores")
    if _resolve(backend, torch.device(device), program) == "torch":
        return TorchExecutor(program, device=device, max_sequences=max_sequences)
    variant = backend.partition(":")[2] or native_variants()[0]
    if variant not in native_variants():
        raise ConfigError(f"backend {backend!r}: this machine runs {', '.join(native_variants())}")
    return NativeExecutor(
        program, open_library(build.library(variant)), variant, usable_cores() if threads is None else threads
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _resolve(backend: str, device: torch.device, program: Program | None = None) -> str:
    backend = backend.partition(":")[0]
    if backend not in ("auto", "native", "torch"):
        raise ConfigError(f"backend {backend!r}: expected auto, native or torch")
    if backend == "native" and "native" not in available():
        raise ConfigError(f"backend 'native': {explain()}")
    if backend == "native" and device.type != "cpu":
        raise ConfigError(f"backend 'native' runs on the CPU, not on {device}: leave it at auto or name torch")
    if backend != "auto":
        return backend
    plain = program is not None and any(
        matrix.layout == "plain" for op in program.operations for matrix in _matrices_of(op)
    )
    return available()[0] if device.type == "cpu" and not plain else "torch"


def _matrices_of(operation: Operation) -> list[Matrix]:
    if isinstance(operation, Linear):
        return [operation.weight]
    return [operation.gate] if isinstance(operation, Gated) else []
