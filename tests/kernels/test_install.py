"""Installing: with a compiler that is not there, or that fails, it succeeds all the same and says what is not built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import ROOT

pytest.importorskip("setuptools")


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("/nonexistent", "no C++ compiler (c++, g++ or clang++): the native kernels are not built"),
        ("FAILS", "native kernels, generic: not built: this machine is not supported"),
    ],
)
def test_installing_succeeds_without_native_kernels(tmp_path: Path, compiler: str, words: str) -> None:
    source, kernels = tmp_path / "source", "src/trivium/kernels"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "src/trivium/__init__.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    shutil.copytree(ROOT / kernels, source / kernels, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if compiler == "FAILS":
        fails = tmp_path / "c++"
        fails.write_text("#!/bin/sh\necho this machine is not supported >&2\nexit 1\n")
        fails.chmod(0o755)
        compiler = str(fails)
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [sys.executable, "setup.py", "build_py", "--build-lib", str(tmp_path / "built")],
        cwd=source, env={**os.environ, "CXX": compiler, "PATH": f"{tmp_path / 'empty'}{os.pathsep}/bin-not-there"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert words in done.stderr
    assert (tmp_path / "built/trivium/kernels/registry.py").exists()
    assert not list((tmp_path / "built").rglob("*.so"))
