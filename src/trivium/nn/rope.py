"""Rotary position embedding from integer positions, computed on the fly: no table, no buffer, no state.

Llama's half-rotation convention: dimension i of a head is paired with dimension i + head_dim / 2. Shapes: B batch,
T sequence, H heads, D head dimension.
"""

from __future__ import annotations

import torch


def rotary(positions_BT: torch.Tensor, head_dim: int, theta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for integer positions, each fp32 [B, 1, T, head_dim / 2]; compute once, use in every layer."""
    exponents = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents
    angles_B1TD = positions_BT.to(torch.float32)[:, None, :, None] * frequencies
    return angles_B1TD.cos(), angles_B1TD.sin()


def rotate(x_BHTD: torch.Tensor, cos_B1TD: torch.Tensor, sin_B1TD: torch.Tensor) -> torch.Tensor:
    """Turn queries or keys [B, H, T, D] by their positions' angles; fp32 inside for 16-bit inputs, the dtype stays."""
    first, second = x_BHTD.chunk(2, dim=-1)
    turned = torch.cat(
        (first * cos_B1TD - second * sin_B1TD, second * cos_B1TD + first * sin_B1TD),
        dim=-1,
    )
    return turned.to(x_BHTD.dtype)


def restarting_positions(documents_BT: torch.Tensor) -> torch.Tensor:
    """Positions [B, T] that start from 0 in every run of equal document ids."""
    index_T = torch.arange(documents_BT.shape[1], device=documents_BT.device)
    starts_BT = torch.where(document_starts(documents_BT), index_T, 0)
    return index_T - starts_BT.cummax(dim=1).values


def document_starts(documents_BT: torch.Tensor) -> torch.Tensor:
    """Bool [B, T]: True where a run of equal document ids begins."""
    first_B1 = torch.ones_like(documents_BT[:, :1], dtype=torch.bool)
    return torch.cat((first_B1, documents_BT[:, 1:] != documents_BT[:, :-1]), dim=1)
