"""Trains without an end, for a test to kill: ``python -m tests.zero.endless STAGE``."""

from __future__ import annotations

import sys

import torch

import trivium as tv
from tests.zero import traffic_cases

if __name__ == "__main__":
    torch.set_num_threads(1)
    mesh = tv.init(device="cpu")
    model, optimizer = traffic_cases.start(mesh, bare={"dim": 64, "vocabulary": 500}, stage=int(sys.argv[1]))
    for number in range(1_000_000):
        traffic_cases.step(mesh, model, optimizer, number)
        if mesh.rank == 0:
            sys.stdout.write(f"step {number}\n")
            sys.stdout.flush()
