"""One SHA-256 for all weights of a model, whatever its stage and number of ranks: equal weights, equal line."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from trivium import zero


def weights_sha256(model: nn.Module) -> str:
    """The hash of names and bytes of every parameter and buffer, in the order of their names. Collective.

    ``model`` is sharded; one unit at a time is gathered.
    """
    return sha256_of(zero.iter_full(model))


def sha256_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The same hash of (canonical name, whole tensor) pairs in any order, such as a bare module's."""
    lines = []
    for name, tensor in tensors:
        # A copy: storage that numpy has seen can never be released again.
        data = tensor.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8).numpy()
        lines.append(f"{name} {hashlib.sha256(data.data).hexdigest()}\n")
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
