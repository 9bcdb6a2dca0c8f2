"""Make a model from its config, on a real device or, without a byte of weights, on the meta device."""

from __future__ import annotations

import torch

from trivium.models.config import DecoderConfig
from trivium.models.decoder import Decoder


def build(
    config: DecoderConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    seed: int | None = None,
) -> Decoder:
    """A fresh decoder. ``device="meta"`` allocates nothing: shapes only, to plan with or to fill in shard by shard.

    Weights are drawn from torch's default generator, or from ``seed``, which leaves that generator as it was.
    """
    if seed is None:
        return Decoder(config, device=device, dtype=dtype)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        return Decoder(config, device=device, dtype=dtype)
