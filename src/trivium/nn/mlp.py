"""SwiGLU feed-forward: the decoder's MLP and, one per expert, an MoE layer's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from trivium.nn.linear import Linear


class MLP(nn.Module):
    """``down(silu(gate(x)) * up(x))``, no biases. Weights: gate and up [ffn_dim, dim], down [dim, ffn_dim]."""

    def __init__(
        self,
        dim: int,
        ffn_dim: int,
        *,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        out_std = init_std if out_init_std is None else out_init_std
        self.gate = Linear(dim, ffn_dim, init_std=init_std, device=device, dtype=dtype)
        self.up = Linear(dim, ffn_dim, init_std=init_std, device=device, dtype=dtype)
        self.down = Linear(ffn_dim, dim, init_std=out_std, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] → [..., dim]."""
        out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out
