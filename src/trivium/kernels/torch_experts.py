"""Choosing experts and running them in torch: the reference of the native kernels.

DeepSpeed-MoE section 5.4: the choice as a dense token-to-expert table. T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import torch

from trivium.kernels.program import Experts, Gate
from trivium.kernels.torch_linear import activate, multiply


def choose(logits: torch.Tensor, gate: Gate, replayed: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, E] → experts int32 and weights fp32, both [T, K], best first; ``replayed`` ones are kept."""
    if gate.scores == "softmax":
        scores = torch.softmax(logits, dim=1)
    elif gate.scores == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = logits
    chosen = _best(scores, gate) if replayed is None else replayed.long().to(logits.device)
    weights = scores.gather(1, chosen)
    if gate.scores == "chosen":
        weights = torch.softmax(weights, dim=1)
    if gate.renormalise:
        weights = weights / (weights.sum(dim=1, keepdim=True) + gate.renormalise_eps)
    return chosen.int(), weights * gate.scale


def _best(scores: torch.Tensor, gate: Gate) -> torch.Tensor:
    ranked = scores if gate.correction is None else scores + gate.correction.to(scores.device)
    if gate.groups > 1:
        grouped = ranked.view(ranked.shape[0], gate.groups, -1)
        top = grouped.topk(min(2, grouped.shape[2]) if gate.group_by == "top2" else 1, dim=2).values.sum(dim=2)
        kept = _first_best(top, gate.top_groups)
        eligible = torch.zeros_like(top, dtype=torch.bool).scatter_(1, kept, True)
        ranked = grouped.masked_fill(~eligible[:, :, None], float("-inf")).flatten(1)
    return _first_best(ranked, gate.top_k)


def _first_best(values: torch.Tensor, count: int) -> torch.Tensor:
    """The indices of the ``count`` highest per row, best first, the lower index first among equals."""
    # NaN sorts above every number in torch; a poisoned token still gets experts that exist.
    return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :count]


def run_experts(x: torch.Tensor, operation: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ over each token's chosen experts of weight · expert(x): [T, out.width]."""
    parts = x.new_zeros(*chosen.shape, operation.out.width)
    for expert_id in torch.unique(chosen).tolist():
        token, place = torch.nonzero(chosen == expert_id, as_tuple=True)
        parts[token, place] = _one_expert(x[token], operation, expert_id)
    return (parts * weights[:, :, None]).sum(dim=1)


def _one_expert(x: torch.Tensor, operation: Experts, expert_id: int) -> torch.Tensor:
    expert = operation.experts[expert_id]
    up = _biased(multiply(x, expert.up), expert.up_bias)
    if expert.gate is None:
        inner = activate(operation.activation, up)
    else:
        gate = _biased(multiply(x, expert.gate), expert.gate_bias)
        if operation.clamp is not None:
            gate = gate.clamp(max=operation.clamp)
            up = up.clamp(-operation.clamp, operation.clamp)
            inner = (up + 1.0) * (gate * torch.sigmoid(1.702 * gate))
        else:
            inner = activate(operation.activation, gate) * up
    return _biased(multiply(inner, expert.down), expert.down_bias)


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x if bias is None else x + bias.to(x.device)
