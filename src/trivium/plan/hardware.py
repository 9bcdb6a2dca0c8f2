"""How much memory one rank has on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a rank may fill here; ``source`` says where the number is from."""

    memory_bytes: int
    source: str


def this_machine(ranks: int = 1) -> Machine:
    """A GPU's memory per rank where there is one, else this machine's memory divided among ``ranks``."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        return Machine(memory_bytes=int(found.total_memory), source=f"{found.name} of this machine")
    total = host_memory_bytes()
    shared = f", {ranks} ranks on it" if ranks > 1 else ""
    return Machine(memory_bytes=total // ranks, source=f"memory of this machine{shared}")


def host_memory_bytes() -> int:
    """Physical memory, or what this process's container allows, whichever is less."""
    total = int(psutil.virtual_memory().total)
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total
