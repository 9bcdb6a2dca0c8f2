"""Compiles the native kernels, one library per kind of CPU: at installation, or by ``python -m trivium.kernels.build``.

Uses the standard library alone, since it also runs where nothing is installed yet.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
FEATURES = "features"
ALWAYS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-w")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
X86: dict[str, tuple[str, ...]] = {
    "amx": (*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512": _AVX512,
    "avx2": _AVX2,
    "generic": ("-fno-tree-pre",),
}
ARM: dict[str, tuple[str, ...]] = {"neon": ("-march=armv8.2-a+dotprod",), "generic": ()}


def variants() -> dict[str, tuple[str, ...]]:
    """What can be built for this machine's kind, best first: name → compiler flags."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        return X86
    return ARM if machine in ("arm64", "aarch64") else {"generic": ()}


def library(variant: str, folder: Path = SOURCES) -> Path:
    """Where a variant's library lies. Its name holds a digest of the sources, so that a stale one is never loaded."""
    digest = hashlib.sha256()
    for path in sorted((*SOURCES.glob("*.h"), *SOURCES.glob("*.cpp"))):
        digest.update(path.read_bytes())
    digest.update(repr((ALWAYS, variants().get(variant))).encode())
    return folder / f"libtrivium_{variant}_{digest.hexdigest()[:12]}.so"


def find_compiler(named: str | None = None) -> str | None:
    """The C++ compiler: the one named, else the first that is there."""
    for name in (named, "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


def compile_variant(compiler: str, variant: str, folder: Path) -> str:
    """Builds one library into ``folder``, whole or not at all; returns what the compiler said if it failed, else ""."""
    target = library(variant, folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        fresh = Path(scratch) / target.name
        source = SOURCES / ("features.cpp" if variant == FEATURES else "trivium.cpp")
        command = [compiler, *ALWAYS, *variants().get(variant, ()), str(source), "-o", str(fresh)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return done.stderr.strip() or f"exit code {done.returncode}"
        for old in folder.glob(f"libtrivium_{variant}_*.so"):
            old.unlink(missing_ok=True)
        fresh.replace(target)
    return ""


def build(
    folder: Path = SOURCES, *, compiler: str | None = None, jobs: int = 1, only: list[str] | None = None
) -> list[str]:
    """Builds every variant (or ``only`` these), prints a line for each to standard error, returns those that built.

    A compiler too old for one kind of CPU loses that one alone. Without a compiler nothing is built and that is said.
    """
    found = find_compiler(compiler)
    if found is None:
        print("trivium: no C++ compiler (c++, g++ or clang++): the native kernels are not built", file=sys.stderr)
        return []
    names = [name for name in (FEATURES, *variants()) if only is None or name in (FEATURES, *only)]
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        errors = list(pool.map(lambda name: compile_variant(found, name, folder), names))
    for name, error in zip(names, errors, strict=True):
        word = f"not built: {error.splitlines()[0]}" if error else "built"
        print(f"trivium: native kernels, {name}: {word}", file=sys.stderr)
    return [name for name, error in zip(names, errors, strict=True) if not error and name != FEATURES]


if __name__ == "__main__":
    sys.exit(0 if build(only=sys.argv[1:] or None) else 1)
