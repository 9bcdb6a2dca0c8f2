"""DeepSpeed's MoE layer, drop-free or with a capacity, its random choices off where it lets one turn them off."""

from __future__ import annotations

import torch
from deepspeed.moe.experts import Experts
from deepspeed.moe.sharded_moe import MOELayer, TopKGate
from torch import nn


class Layer(nn.Module):
    """The layer without its leftovers."""

    def __init__(self, layer: MOELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C] → [T, C]."""
        out: torch.Tensor = self.layer(x_TC, None)
        return out


def build(router_EC: torch.Tensor, experts: list[nn.Module], top_k: int, capacity_factor: float | None) -> nn.Module:
    """The layer with this router and these experts; no capacity factor: drop-free."""
    num_experts, dim = router_EC.shape
    gate = TopKGate(
        dim,
        num_experts,
        top_k,
        capacity_factor=1.0 if capacity_factor is None else capacity_factor,
        min_capacity=4,
        drop_tokens=capacity_factor is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    with torch.no_grad():
        gate.wg.weight.copy_(router_EC)
    held = Experts(experts[0], num_experts)
    held.deepspeed_experts = nn.ModuleList(experts)
    return Layer(MOELayer(gate, held, "ep_size_1", 1, num_experts))
