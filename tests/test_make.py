"""What ``make`` says on a machine that lacks something, in a folder whose name has a space."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.worlds import ROOT

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
WITHOUT = {
    "venv": ('case "$2" in *ensurepip*) exit 1;; esac', "has no venv. Install it"),
    "3.10": (
        '[ "$1" = --version ] && echo Python 3.9.1 && exit\ncase "$2" in *version_info*) exit 1;; esac',
        "is Python 3.9.1; Trivium needs Python 3.10 or newer",
    ),
    "python": ("exit 127", "Install Python 3.10 or newer"),
}


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``make`` in a folder whose venv there is none of yet."""
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "src/trivium/kernels/build.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    shutil.copy(ROOT / "Makefile", folder)
    outside = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=outside, capture_output=True, text=True, timeout=240, check=False
    )


@needs_make
def test_the_demo_installs_what_its_last_lines_need(tmp_path: Path) -> None:
    done = make(tmp_path, "--dry-run", "demo")
    assert done.returncode == 0, done.stderr
    (install,) = [line for line in done.stdout.splitlines() if " -m pip " in line]
    assert install.endswith("-e '.[serve]'")


@needs_make
@pytest.mark.parametrize("target", ["demo", "test"])
@pytest.mark.parametrize("missing", WITHOUT)
def test_what_is_missing_is_told_with_what_to_install(tmp_path: Path, target: str, missing: str) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    lines, words = WITHOUT[missing]
    python = folder / "python"
    python.write_text(f'#!/bin/sh\n{lines}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    done = make(folder, target, "PYTHON=./python")
    assert done.returncode != 0 and words in done.stderr, done.stderr
    assert not (folder / ".venv").exists()
