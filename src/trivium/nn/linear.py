"""Linear maps that know how to initialise their own weights, so that a meta-device build fills in module by module."""

from __future__ import annotations

import torch
from torch import nn


class Linear(nn.Linear):
    """``y = x Wᵀ (+ b)`` with weights drawn from a normal distribution.

    ``init_std`` is the standard deviation of the weights [out_features, in_features]; a bias starts at zero.
    """

    init_std: float

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.init_std = init_std  # before super().__init__, which calls reset_parameters
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draw this module's own parameters anew from torch's default generator."""
        if self.weight.is_meta:  # nothing to draw, and drawing nothing is slow
            return
        with torch.no_grad():
            self.weight.normal_(0.0, self.init_std)
            if self.bias is not None:
                self.bias.zero_()
