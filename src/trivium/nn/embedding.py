"""Token embedding that knows how to initialise its own table."""

from __future__ import annotations

import torch
from torch import nn


class Embedding(nn.Embedding):
    """Integer ids to vectors, [...] → [..., dim]. The table is [vocabulary, dim], drawn from N(0, init_std²)."""

    init_std: float

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        *,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.init_std = init_std  # before super().__init__, which calls reset_parameters
        super().__init__(vocabulary, dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw the table anew from torch's default generator."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.init_std)
