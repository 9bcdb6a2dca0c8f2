"""ZeRO-DP: any nn.Module with its states sharded over the data-parallel ranks (ZeRO section 5)."""

from __future__ import annotations

from trivium.zero.api import full_state_dict, gathered, iter_full, meter_of, no_sync, shard
from trivium.zero.optimizer import ZeroOptimizer, clip_grad_norm_
from trivium.zero.placement import ZeroConfig

__all__ = [
    "ZeroConfig",
    "ZeroOptimizer",
    "clip_grad_norm_",
    "full_state_dict",
    "gathered",
    "iter_full",
    "meter_of",
    "no_sync",
    "shard",
]
