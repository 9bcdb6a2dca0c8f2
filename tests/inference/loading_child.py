"""Load a folder in a process of its own and tell how much memory that took at most, beside the packed weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    from trivium.inference import weights

    folder, quantize = sys.argv[1], sys.argv[2]
    choice: Any = None if quantize == "none" else quantize
    weights.load(folder + "-small", quantize=choice)  # whatever is loaded or started once
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    loaded = weights.load(folder, quantize=choice)
    peak = kilobytes("VmHWM")
    print(json.dumps({"extra": (peak - before) * 1024, "weights": loaded.weight_bytes}))


def kilobytes(key: str) -> int:
    """A line of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{key}:")))


if __name__ == "__main__":
    main()
