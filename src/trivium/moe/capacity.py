"""How many tokens an expert takes, and which ones it turns away.

DeepSpeed-MoE section 3.1: capacity factor; a dropped token passes through the residual connection around the layer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch

from trivium.base.errors import ConfigError

Policy = Literal["position", "score", "random"]


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """``factor`` × the even share of choices, at least ``minimum``; ``policy`` says whom a full expert drops.

    ``position``: first choices come before second ones, earlier tokens before later ones. ``score``: the greater
    weight comes first, ties by position. ``random`` (random token selection): first choices come before second ones,
    tokens in an order drawn anew in each step; in eval as ``position``. Weights of the choices that stay are not
    changed.
    """

    factor: float
    minimum: int = 4
    policy: Policy = "position"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor > 0):
            raise ConfigError(f"capacity_factor={self.factor}: expected a number above 0, or None to drop nothing")
        if self.minimum < 1:
            raise ConfigError(f"min_capacity={self.minimum}: expected 1 or more")
        if self.policy not in ("position", "score", "random"):
            raise ConfigError(f"drop_policy={self.policy!r}: expected 'position', 'score' or 'random'")


def capacity(num_tokens: int, num_experts: int, top_k: int, config: CapacityConfig) -> int:
    """Choices one expert takes out of a rank's ``num_tokens · top_k`` of one micro-batch; exact arithmetic."""
    share = Fraction(num_tokens * top_k, num_experts) * Fraction(str(config.factor))
    return max(config.minimum, math.ceil(share))


def keep(
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    num_experts: int,
    limit: int,
    policy: Policy,
    drawn_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """bool [T, K]: True for the first ``limit`` choices of each expert in the order of ``policy``.

    ``drawn_T``: for ``random``, the tokens' random numbers, of which the least goes first; None: by position.
    """
    num_tokens, top_k = experts_TK.shape
    experts = experts_TK.t().reshape(-1)  # all first choices, then all second ones
    order = torch.arange(experts.numel(), device=experts.device)
    if policy == "score":
        order = torch.argsort(weights_TK.detach().t().reshape(-1), descending=True, stable=True)
    elif policy == "random" and drawn_T is not None:
        places_T = torch.argsort(drawn_T, stable=True)
        order = (order.view(top_k, num_tokens)[:, places_T]).reshape(-1)
    order = order[torch.argsort(experts[order], stable=True)]
    loads = torch.bincount(experts, minlength=num_experts)
    starts = loads.cumsum(0) - loads
    places = torch.arange(experts.numel(), device=experts.device) - starts[experts[order]]
    kept = torch.empty_like(experts, dtype=torch.bool)
    kept[order] = places < limit
    return kept.view(top_k, num_tokens).t().contiguous()
