"""The output projection, and the loss behind it computed without ever holding the whole batch's logits.

Logits of B·T tokens and V words are often the largest tensor of a step. Above ``chunk_tokens`` tokens the loss walks
over chunks and keeps none of them; backward recomputes each chunk's logits. A batch that fits in one chunk is not
recomputed: one buffer of its logits becomes its softmax and then its gradient, in place.
The projection and its loss are one module call, so a sharded head is gathered once for all chunks.
Shapes: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from trivium.base.errors import ConfigError
from trivium.nn.linear import Linear
from trivium.nn.soft_loss import IGNORE_INDEX as IGNORE_INDEX
from trivium.nn.soft_loss import SoftLoss, SoftTargets

_SOFT_SHARE = 4  # a chunk of distillation has about so many buffers of logits where the plain loss has one
Reduction = Literal["mean", "sum", "none"]


class Head(Linear):
    """Projection to the vocabulary without bias, weight [vocabulary, dim]; with targets, its cross-entropy.

    ``chunk_tokens`` bounds how many tokens' logits exist at once when a loss is asked for.
    """

    def __init__(
        self,
        dim: int,
        vocabulary: int,
        *,
        chunk_tokens: int = 1024,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={chunk_tokens}: expected at least 1 token")
        super().__init__(dim, vocabulary, init_std=init_std, device=device, dtype=dtype)
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        input: torch.Tensor,
        targets: torch.Tensor | None = None,
        reduction: Reduction = "mean",
        soft: SoftTargets | None = None,
    ) -> torch.Tensor:
        """[..., dim] → logits [..., vocabulary]; with integer targets [...] their cross-entropy, at least fp32.

        Targets equal to -100 count nothing. ``reduction``: "mean" over the tokens that count (NaN when there are none,
        as in torch), "sum", or "none" for one value per token, shaped like ``targets``. With ``soft``, a teacher's
        distribution beside the targets: [3], the total that has a gradient, the cross-entropy and the divergence.
        """
        if targets is None:
            return super().forward(input)
        if reduction not in ("mean", "sum", "none"):
            raise ConfigError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
        if targets.shape != input.shape[:-1]:
            raise ConfigError(f"targets have shape {tuple(targets.shape)}, the tokens {tuple(input.shape[:-1])}")
        if soft is not None:
            return self._soft(input.flatten(0, -2), targets.flatten(), reduction, soft)
        losses_N = self._losses(input.flatten(0, -2), targets.flatten())
        if reduction == "none":
            return losses_N.view(targets.shape)
        total = losses_N.sum()
        return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()

    def _soft(
        self, x_NC: torch.Tensor, targets_N: torch.Tensor, reduction: Reduction, soft: SoftTargets
    ) -> torch.Tensor:
        if reduction == "none":
            raise ConfigError("reduction='none' with a teacher: expected 'mean' or 'sum'")
        x_NC, weight_VC = self._cast(x_NC)
        chunk = max(1, self.chunk_tokens // _SOFT_SHARE)
        with torch.autocast(x_NC.device.type, enabled=False):
            parts = SoftLoss.apply(x_NC, weight_VC, targets_N, soft, chunk)  # type: ignore[no-untyped-call]
        sums_3 = torch.stack(parts)
        return sums_3 if reduction == "sum" else sums_3 / (targets_N != IGNORE_INDEX).sum()

    def _cast(self, x_NC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Input and weight in autocast's type, where it is on."""
        if not torch.is_autocast_enabled(x_NC.device.type):
            return x_NC, self.weight
        dtype = torch.get_autocast_dtype(x_NC.device.type)
        return x_NC.to(dtype), self.weight.to(dtype)

    def _losses(self, x_NC: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        x_NC, weight_VC = self._cast(x_NC)
        with torch.autocast(x_NC.device.type, enabled=False):
            losses_N: torch.Tensor = _TokenLoss.apply(x_NC, weight_VC, targets_N, self.chunk_tokens)  # type: ignore[no-untyped-call]
        return losses_N


class _TokenLoss(torch.autograd.Function):
    """Per-token cross-entropy of ``x Wᵀ``, chunk by chunk; the gradient of the weight is summed in at least fp32.

    A batch of one chunk keeps its softmax, which backward overwrites; a second backward recomputes it, as chunks do.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NC: torch.Tensor, weight_VC: torch.Tensor, targets_N: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        losses, softmax = [], None
        for x_nC, target_n in zip(torch.split(x_NC, chunk), torch.split(targets_N, chunk), strict=True):
            softmax = None  # the last chunk's goes before the next one's comes
            loss_n, softmax = _loss_and_softmax(x_nC, weight_VC, target_n)
            losses.append(loss_n)
        ctx.chunk = chunk
        ctx.kept = softmax if len(losses) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(x_NC, weight_VC, targets_N)
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_NC, weight_VC, targets_N = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        kept, ctx.kept = ctx.kept, None
        grad_x = torch.empty_like(x_NC) if wants_x else None
        grad_weight: torch.Tensor | None = None
        for start in range(0, x_NC.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            x_nC, target_n = x_NC[part], targets_N[part]
            numerator_nV, denominator_n1 = kept or _loss_and_softmax(x_nC, weight_VC, target_n)[1]
            slope_nV = _slope(numerator_nV, denominator_n1, target_n, grad_N[part]).to(weight_VC.dtype)
            if grad_x is not None:
                torch.mm(slope_nV, weight_VC, out=grad_x[part])
            if wants_weight:
                grad_weight = _add_product(grad_weight, slope_nV.t(), x_nC, grad_N.dtype)
            del numerator_nV, slope_nV  # before the next chunk's come
        return grad_x, None if grad_weight is None else grad_weight.to(weight_VC.dtype), None, None


def _loss_and_softmax(
    x_nC: torch.Tensor, weight_VC: torch.Tensor, target_n: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Losses, and the softmax as a numerator [n, V] and a denominator [n, 1]; one buffer of logits, overwritten."""
    logits_nV = F.linear(x_nC, weight_VC)
    if logits_nV.dtype != torch.float64:
        logits_nV = logits_nV.float()
    ignored_n1 = (target_n == IGNORE_INDEX)[:, None]
    picked_n1 = logits_nV.gather(1, target_n[:, None].masked_fill(ignored_n1, 0))
    top_n1 = logits_nV.amax(dim=-1, keepdim=True)
    numerator_nV = logits_nV.sub_(top_n1).exp_()
    denominator_n1 = numerator_nV.sum(dim=-1, keepdim=True)
    loss_n1 = (denominator_n1.log() + top_n1 - picked_n1).masked_fill(ignored_n1, 0.0)
    return loss_n1[:, 0], (numerator_nV, denominator_n1)


def _slope(
    numerator_nV: torch.Tensor, denominator_n1: torch.Tensor, target_n: torch.Tensor, grad_n: torch.Tensor
) -> torch.Tensor:
    """The loss's gradient by the logits, ``(softmax − one-hot) · grad``, written over the numerator."""
    ignored_n1 = (target_n == IGNORE_INDEX)[:, None]
    grad_n1 = grad_n[:, None].masked_fill(ignored_n1, 0.0)
    slope_nV = numerator_nV.mul_(grad_n1 / denominator_n1)
    return slope_nV.scatter_add_(1, target_n[:, None].masked_fill(ignored_n1, 0), -grad_n1)


def _add_product(
    total: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    if total is None:
        return (left @ right).to(dtype)
    if total.dtype == left.dtype:
        return total.addmm_(left, right)
    return total.add_(left @ right)
