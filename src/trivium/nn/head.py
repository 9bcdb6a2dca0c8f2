"""The output projection, and the loss behind it computed without ever holding the whole batch's logits.

Logits of B·T tokens and V words are often the largest tensor of a step. Above ``chunk_tokens`` tokens the loss walks
over chunks and keeps only one number per token (the log of the partition sum); backward recomputes a chunk's logits.
The projection and its loss are one module call, so a sharded head is gathered once for all chunks.
Shapes: N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F

from trivium.base.errors import ConfigError
from trivium.nn.linear import Linear

IGNORE_INDEX = -100
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
        self, input: torch.Tensor, targets: torch.Tensor | None = None, reduction: Reduction = "mean"
    ) -> torch.Tensor:
        """[..., dim] → logits [..., vocabulary]; with integer targets [...] their cross-entropy, at least fp32.

        Targets equal to -100 count nothing. ``reduction``: "mean" over the tokens that count (NaN when there are none,
        as in torch), "sum", or "none" for one value per token, shaped like ``targets``.
        """
        if targets is None:
            return super().forward(input)
        if reduction not in ("mean", "sum", "none"):
            raise ConfigError(f"reduction={reduction!r}: expected 'mean', 'sum' or 'none'")
        if targets.shape != input.shape[:-1]:
            raise ConfigError(f"targets have shape {tuple(targets.shape)}, the tokens {tuple(input.shape[:-1])}")
        losses_N = self._losses(input.flatten(0, -2), targets.flatten())
        if reduction == "none":
            return losses_N.view(targets.shape)
        total = losses_N.sum()
        return total if reduction == "sum" else total / (targets != IGNORE_INDEX).sum()

    def _losses(self, x_NC: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
        weight_VC = self.weight
        if torch.is_autocast_enabled(x_NC.device.type):
            dtype = torch.get_autocast_dtype(x_NC.device.type)
            x_NC, weight_VC = x_NC.to(dtype), weight_VC.to(dtype)
        with torch.autocast(x_NC.device.type, enabled=False):
            if x_NC.shape[0] <= self.chunk_tokens:
                logits_NV = _at_least_fp32(F.linear(x_NC, weight_VC))
                return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")
            losses_N: torch.Tensor = _ChunkedLoss.apply(x_NC, weight_VC, targets_N, self.chunk_tokens)  # type: ignore[no-untyped-call]
            return losses_N


class _ChunkedLoss(torch.autograd.Function):
    """Per-token cross-entropy of ``x Wᵀ``, chunk by chunk; the gradient of the weight is summed in at least fp32."""

    @staticmethod
    def forward(
        ctx: Any, x_NC: torch.Tensor, weight_VC: torch.Tensor, targets_N: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        lse_parts, losses = [], []
        for x_nC, target_n in zip(torch.split(x_NC, chunk), torch.split(targets_N, chunk), strict=True):
            logits_nV = _at_least_fp32(F.linear(x_nC, weight_VC))
            lse_n = logits_nV.logsumexp(dim=-1)
            ignored_n = target_n == IGNORE_INDEX
            picked_n = logits_nV.gather(1, target_n.masked_fill(ignored_n, 0)[:, None])[:, 0]
            losses.append((lse_n - picked_n).masked_fill(ignored_n, 0.0))
            lse_parts.append(lse_n)
        ctx.chunk = chunk
        ctx.save_for_backward(x_NC, weight_VC, targets_N, torch.cat(lse_parts))
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x_NC, weight_VC, targets_N, lse_N = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = torch.empty_like(x_NC) if wants_x else None
        grad_weight = torch.zeros_like(weight_VC, dtype=lse_N.dtype) if wants_weight else None
        for start in range(0, x_NC.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            x_nC, target_n = x_NC[part], targets_N[part]
            ignored_n = target_n == IGNORE_INDEX
            slope_nV = _at_least_fp32(F.linear(x_nC, weight_VC)).sub_(lse_N[part, None]).exp_()
            index_n1 = target_n.masked_fill(ignored_n, 0)[:, None]
            slope_nV.scatter_add_(1, index_n1, torch.full_like(index_n1, -1, dtype=slope_nV.dtype))
            slope_nV.mul_(grad_N[part].masked_fill(ignored_n, 0.0)[:, None])
            slope_nV = slope_nV.to(weight_VC.dtype)
            if grad_x is not None:
                torch.mm(slope_nV, weight_VC, out=grad_x[part])
            if grad_weight is not None:
                _add_product(grad_weight, slope_nV.t(), x_nC)
        return grad_x, None if grad_weight is None else grad_weight.to(weight_VC.dtype), None, None


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
