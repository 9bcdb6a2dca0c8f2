"""PyTorch's FSDP2: `fully_shard` on the embedding, every block, and norm with head, as torchtitan applies it."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trivium.bench.contestant import Contestant, Plain
from trivium.models import Decoder


def build(model: Decoder, learning_rate: float, device: torch.device, ranks: int, *, reshard: bool) -> Contestant:
    """``model`` sharded; ``reshard``: parameters are freed after forward (ZeRO-3), else kept until after backward."""
    mesh = init_device_mesh(device.type, (ranks,))
    fully_shard(model.embed, mesh=mesh, reshard_after_forward=reshard)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard([model.norm, model.head], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    return Plain(model, torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True))
