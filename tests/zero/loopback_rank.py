"""One rank inside a network namespace of its own: prints what the kernel counted on lo. Run by test_traffic.py."""

from __future__ import annotations

import json
import sys
import warnings

import torch

import trivium as tv
from tests.zero import traffic_cases

if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    mesh = tv.init(device="cpu", nearby=False)
    found = traffic_cases.loopback(mesh)
    if mesh.rank == 0:
        sys.stdout.write("counted " + json.dumps(found) + "\n")
    tv.shutdown()
