"""Grouped-query attention whose inner product is an argument: training passes causal attention, inference a paged one.

Shapes: B batch, T sequence, H query heads, K key/value heads (H a multiple of K), D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from trivium.nn.linear import Linear
from trivium.nn.rope import document_starts, rotate


class Attend(Protocol):
    """Scaled dot-product attention over the keys that the caller keeps; new keys and values come with the queries."""

    def __call__(self, q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, *, layer: int) -> torch.Tensor:
        """Return [B, H, T, D]. ``layer`` is the calling layer's index, by which a cache finds its pages."""
        ...


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one layer keeps per token at inference: kind and shape; the scheduler and the planner count by it."""

    kind: Literal["paged", "windowed", "latent"]
    kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Elements of keys and values kept for each token."""
        return 2 * self.kv_heads * self.head_dim


def causal(documents_BT: torch.Tensor | None = None) -> Attend:
    """Causal attention; with documents each token sees only its own run of equal ids.

    The mask, bool [B, 1, T, T], is built once here and shared by all layers. Without documents no mask is built.
    """
    mask = None if documents_BT is None else document_mask(documents_BT)

    def attend(q_BHTD: torch.Tensor, k_BKTD: torch.Tensor, v_BKTD: torch.Tensor, *, layer: int) -> torch.Tensor:
        grouped = q_BHTD.shape[1] != k_BKTD.shape[1]
        return F.scaled_dot_product_attention(
            q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
        )

    return attend


def document_mask(documents_BT: torch.Tensor) -> torch.Tensor:
    """Bool [B, 1, T, T], True where the query (row) may see the key (column): not later, and in the same run of ids."""
    runs_BT = document_starts(documents_BT).cumsum(dim=1)
    same_BTT = runs_BT[:, :, None] == runs_BT[:, None, :]
    return same_BTT.tril()[:, None]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; four projections without bias.

    Weights: q [heads·head_dim, dim], k and v [kv_heads·head_dim, dim], o [dim, heads·head_dim]. The number of heads is
    read off the projections' outputs, so that a projection may hold only this rank's heads.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        layer: int = 0,
        init_std: float = 0.02,
        out_init_std: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = head_dim
        self.cache = CacheSpec(kind="paged", kv_heads=kv_heads, head_dim=head_dim)
        out_std = init_std if out_init_std is None else out_init_std
        self.q = Linear(dim, heads * head_dim, init_std=init_std, device=device, dtype=dtype)
        self.k = Linear(dim, kv_heads * head_dim, init_std=init_std, device=device, dtype=dtype)
        self.v = Linear(dim, kv_heads * head_dim, init_std=init_std, device=device, dtype=dtype)
        self.o = Linear(heads * head_dim, dim, init_std=out_std, device=device, dtype=dtype)

    def forward(
        self,
        x_BTC: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        """Mix [B, T, dim] → [B, T, dim]; ``rotary`` are the cosines and sines of `trivium.nn.rope.rotary`."""
        cos, sin = rotary
        q_BHTD = rotate(self._split(self.q(x_BTC)), cos, sin)
        k_BKTD = rotate(self._split(self.k(x_BTC)), cos, sin)
        v_BKTD = self._split(self.v(x_BTC))
        mixed_BHTD = attend(q_BHTD, k_BKTD, v_BKTD, layer=self.layer)
        out: torch.Tensor = self.o(mixed_BHTD.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_BTC: torch.Tensor) -> torch.Tensor:
        batch, sequence, _ = x_BTC.shape
        return x_BTC.view(batch, sequence, -1, self.head_dim).transpose(1, 2)
