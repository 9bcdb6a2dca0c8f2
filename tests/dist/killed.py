"""Ranks of which the last dies in a collective, for tests/dist/test_comm.py: ``python -m tests.dist.killed HOW FOLDER``.

They wait for each other in FOLDER before they meet: the shortest of their limits is not for loading torch on a busy machine.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import trivium as tv
from tests.dist.cases import die

if __name__ == "__main__":
    folder, size = Path(sys.argv[2]), int(os.environ["WORLD_SIZE"])
    (folder / os.environ["RANK"]).touch()
    while len(list(folder.iterdir())) < size:
        time.sleep(0.01)
    mesh = tv.init(device="cpu", timeout_s=8.0 if sys.argv[1] == "stop" else 300.0)
    said = die(mesh, sys.argv[1])
    sys.stdout.write(f"rank {mesh.rank} was told after {said}\n")
    sys.stdout.flush()
    sys.exit(1)
