"""PyTorch's DistributedDataParallel: everything replicated, gradients all-reduced in buckets."""

from __future__ import annotations

import torch
from torch.nn.parallel import DistributedDataParallel

from trivium.bench.contestant import Contestant, Plain
from trivium.models import Decoder


def build(model: Decoder, learning_rate: float) -> Contestant:
    """``model`` under DDP; gradients are views of its buckets, which saves it one copy of them."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    return Plain(wrapped, torch.optim.AdamW(wrapped.parameters(), lr=learning_rate, fused=True))
