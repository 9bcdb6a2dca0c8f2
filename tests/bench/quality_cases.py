"""What a rank runs for the tests of ``trivium bench quality``."""

from __future__ import annotations

from typing import Any

import torch

from trivium import zero
from trivium.models import DecoderConfig, build


def beginnings(mesh: Any, shapes: dict[str, DecoderConfig], seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """The weights with which the trainer begins a model of each shape."""
    found = {}
    for arm, shape in shapes.items():
        model = build(shape, device="meta", seed=seed, mesh=mesh)
        zero.shard(model, None, mesh, stage=0, seed=seed)
        found[arm] = {name: value.clone() for name, value in zero.full_state_dict(model).items()}
    return found
