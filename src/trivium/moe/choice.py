"""Which experts a token's scores choose: the best, ties to the lower number, of the best groups only if so asked.

DeepSpeed-MoE section 3.1 (top-1, top-k). T tokens, E experts, K choices, G groups.
"""

from __future__ import annotations

import torch

from trivium.base.errors import ConfigError


def choose(scores_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ``top_k`` greatest of each row, greatest first, ties to the lower index. [T, E] → int64 [T, K]."""
    num_tokens, num_experts = scores_TE.shape
    more = min(top_k + 1, num_experts)
    if top_k > 1 and num_tokens:
        values_TM, best_TM = scores_TE.topk(more, dim=1)
        if not bool((values_TM[:, 1:] == values_TM[:, :-1]).any()):  # no tie inside or at the border: one answer only
            return best_TM[:, :top_k].contiguous()
    left_TE = scores_TE
    chosen: list[torch.Tensor] = []
    for choice in range(top_k):
        if choice:
            left_TE = left_TE.scatter(1, chosen[-1], float("-inf"))
        chosen.append(left_TE.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


def limit_to_groups(scores_TE: torch.Tensor, num_groups: int, top_groups: int) -> torch.Tensor:
    """bool [T, E]: the experts of each token's ``top_groups`` best groups of neighbours.

    A group's worth is the sum of its two best scores (of its one, where it has one); ties to the lower group.
    """
    num_tokens, num_experts = scores_TE.shape
    size = num_experts // num_groups
    worth_TG = scores_TE.view(num_tokens, num_groups, size).topk(min(2, size), dim=-1).values.sum(-1)
    allowed_TG = torch.zeros_like(worth_TG, dtype=torch.bool).scatter_(1, choose(worth_TG, top_groups), True)
    return allowed_TG.repeat_interleave(size, dim=1)


def check_groups(num_experts: int, top_k: int, num_groups: int, top_groups: int | None) -> int:
    """How many groups a token may choose from; ConfigError where the numbers do not go together."""
    if num_groups < 1 or num_experts % num_groups:
        raise ConfigError(f"gate.num_groups={num_groups}: expected a divisor of num_experts={num_experts}")
    if top_groups is None:
        if num_groups > 1:
            raise ConfigError(f"gate.num_groups={num_groups} needs gate.top_groups: 1 to {num_groups}")
        return 1
    if not 1 <= top_groups <= num_groups:
        raise ConfigError(f"gate.top_groups={top_groups}: expected 1 to gate.num_groups={num_groups}")
    if top_k > top_groups * (num_experts // num_groups):
        raise ConfigError(
            f"top_k={top_k} of {top_groups} groups of {num_experts // num_groups} experts: raise gate.top_groups or "
            "lower top_k"
        )
    return top_groups
