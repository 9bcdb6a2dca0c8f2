"""Ranks of which the last dies in a collective, for tests/dist/test_comm.py: ``python -m tests.dist.killed HOW``."""

from __future__ import annotations

import sys

import trivium as tv
from tests.dist.cases import die

if __name__ == "__main__":
    mesh = tv.init(device="cpu", timeout_s=8.0 if sys.argv[1] == "stop" else 300.0)
    said = die(mesh, sys.argv[1])
    sys.stdout.write(f"rank {mesh.rank} was told after {said}\n")
    sys.stdout.flush()
    sys.exit(1)
