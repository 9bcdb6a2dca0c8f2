"""transformers' MoE layer (Qwen3-MoE's: softmax, top-k renormalised, SwiGLU), its grouped path or its eager loop."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock


class Block(nn.Module):
    """The block with a leading batch dimension of one."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_TC: torch.Tensor) -> torch.Tensor:
        """[T, C] → [T, C]."""
        out: torch.Tensor = self.block(x_TC[None])[0]
        return out


def build(
    router_EC: torch.Tensor, experts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], top_k: int, path: str
) -> nn.Module:
    """The block with these weights; ``path``: ``grouped_mm`` or ``eager``."""
    inner, dim = experts[0][0].shape
    config = Qwen3MoeConfig(
        hidden_size=dim,
        moe_intermediate_size=inner,
        num_experts=len(experts),
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = path
    block = Qwen3MoeSparseMoeBlock(config)
    with torch.no_grad():
        block.gate.weight.copy_(router_EC)
        for number, (gate, up, down) in enumerate(experts):
            block.experts.gate_up_proj[number].copy_(torch.cat([gate, up]))
            block.experts.down_proj[number].copy_(down)
    return Block(block)
