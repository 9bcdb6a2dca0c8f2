"""One dense layer of the decoder, and the attention half that every layer has.

Shapes: B batch, T sequence, C model width.
"""

from __future__ import annotations

import torch
from torch import nn

from trivium.models.config import DecoderConfig
from trivium.nn import MLP, Attend, Attention, RMSNorm

Rotary = tuple[torch.Tensor, torch.Tensor]


class AttentionHalf(nn.Module):
    """``x + attention(norm(x))``, and the norm of the feed-forward half that a subclass adds."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(
            config.dim,
            config.heads,
            config.kv_head_count,
            config.head_size,
            layer=layer,
            init_std=config.init_std,
            out_init_std=config.residual_init_std,
            device=device,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)

    def attended(self, x_BTC: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        """[B, T, C] → [B, T, C], before the feed-forward half."""
        out_BTC: torch.Tensor = x_BTC + self.attention(self.attention_norm(x_BTC), rotary, attend)
        return out_BTC


class Block(AttentionHalf):
    """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype)
        self.mlp = MLP(
            config.dim,
            config.ffn_dim,
            init_std=config.init_std,
            out_init_std=config.residual_init_std,
            device=device,
            dtype=dtype,
        )

    def forward(self, x_BTC: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        """[B, T, C] → [B, T, C]."""
        x_BTC = self.attended(x_BTC, rotary, attend)
        out_BTC: torch.Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return out_BTC
