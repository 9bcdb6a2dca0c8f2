"""What the ranks run for the tests of ``trivium bench moe``."""

from __future__ import annotations

from typing import Any

from trivium.bench import moe_ranks
from trivium.dist.mesh import Mesh


def training(mesh: Any) -> tuple[int, int, list[float], list[float]]:
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=mesh.size)
    shape = {"experts": 4, "top_k": 2, "dim": 8, "ffn_dim": 8, "tokens": 20}
    found = moe_ranks.training(spread, {"shape": shape, "depth": 2, "warm_up": 1, "rounds": 2})
    return found["bytes"], found["formula_bytes"], found["step_s"], found["exchange_s"]
