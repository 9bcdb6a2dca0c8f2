"""Cross-entropy and divergence from a teacher in one pass over chunks of tokens: the loss of distillation.

DeepSpeed-MoE section 4.2 (mixture of students). Neither model's logits are ever held for more than a chunk: a chunk's
gradients are computed right after its loss, while the teacher's weights are at hand, and kept for backward in their
place: [N, C] and [V, C].
Shapes: N tokens, n tokens of a chunk, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trivium.base.errors import ConfigError

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class SoftTargets:
    """A teacher's opinion of the same tokens.

    ``logits(start, stop)``: the teacher's logits [stop - start, V] of flattened tokens. The loss is ``hard_weight`` ·
    cross-entropy + ``soft_weight`` · T² · KL(teacher ‖ student), both distributions at temperature T: T² keeps the size
    of the gradient where T moves it.
    """

    logits: Callable[[int, int], torch.Tensor]
    hard_weight: float = 1.0
    soft_weight: float = 1.0
    temperature: float = 1.0


class SoftLoss(torch.autograd.Function):
    """(total, cross-entropy, divergence), sums over the tokens that count; only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: torch.Tensor, weight_VC: torch.Tensor, targets_N: torch.Tensor, soft: SoftTargets, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Losses, and at once the gradients by ``x_NC`` and ``weight_VC``."""
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_NC.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=x_NC.device)
        grad_x = torch.empty_like(x_NC) if wants_x else None
        grad_weight = torch.zeros(weight_VC.shape, dtype=wide, device=x_NC.device) if wants_weight else None
        for start in range(0, x_NC.shape[0], chunk):
            stop = min(start + chunk, x_NC.shape[0])
            x_nC = x_NC[start:stop]
            loss_2, slope_nV = _chunk(F.linear(x_nC, weight_VC), targets_N[start:stop], soft, start, stop, wide)
            sums += loss_2
            slope_nV = slope_nV.to(weight_VC.dtype)
            if grad_x is not None:
                torch.mm(slope_nV, weight_VC, out=grad_x[start:stop])
            if grad_weight is not None:
                grad_weight += slope_nV.t() @ x_nC
            del slope_nV
        ctx.grads = (grad_x, None if grad_weight is None else grad_weight.to(weight_VC.dtype))
        hard, soft_part = sums.unbind()
        total = soft.hard_weight * hard + soft.soft_weight * soft_part
        hard, soft_part = hard.clone(), soft_part.clone()
        ctx.mark_non_differentiable(hard, soft_part)
        return total, hard, soft_part

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, *unused: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """What forward kept, times the gradient of the total."""
        kept, ctx.grads = ctx.grads, None
        if kept is None:
            raise ConfigError("a distillation loss keeps its gradients for one backward: run the forward again")
        return (*(None if one is None else one.mul_(grad.to(one.dtype)) for one in kept), None, None, None)


def _chunk(
    logits_nV: torch.Tensor, target_n: torch.Tensor, soft: SoftTargets, start: int, stop: int, wide: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy, divergence) [2] of a chunk, and the total's slope by its logits [n, V]."""
    counts_n1 = (target_n != IGNORE_INDEX)[:, None]
    safe_n1 = target_n[:, None].masked_fill(~counts_n1, 0)
    logits_nV = logits_nV.to(wide)
    log_own_nV = logits_nV.log_softmax(-1)
    hard = -(log_own_nV.gather(1, safe_n1) * counts_n1).sum()
    slope_nV = log_own_nV.exp_().mul_(soft.hard_weight)
    slope_nV.scatter_add_(1, safe_n1, torch.full_like(safe_n1, -soft.hard_weight, dtype=wide))
    heat = soft.temperature
    log_own_nV = logits_nV.div_(heat).log_softmax(-1)
    log_teacher_nV = soft.logits(start, stop).to(wide).div(heat).log_softmax(-1)
    teacher_nV = log_teacher_nV.exp()
    divergence = heat**2 * (teacher_nV * log_teacher_nV.sub_(log_own_nV) * counts_n1).sum()
    slope_nV.add_(log_own_nV.exp_().sub_(teacher_nV), alpha=soft.soft_weight * heat)
    return torch.stack([hard, divergence]), slope_nV.mul_(counts_n1)
