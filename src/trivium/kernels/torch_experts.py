"""Choosing experts and running them in torch: the reference of the native kernels, and a form without host decisions.

DeepSpeed-MoE section 5.4: the choice as a dense token-to-expert table. T tokens, E experts, K chosen per token.
"""

from __future__ import annotations

import torch

from trivium.kernels.program import Experts, Gate
from trivium.kernels.torch_linear import activate, multiply
from trivium.kernels.torch_placement import ExpertStack

_MOST_GATHERED_BYTES = 512 << 20


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
    ranked = scores if gate.correction is None else scores + gate.correction
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
    """Σ over each token's chosen experts of weight · expert(x): [T, out.width]. The host reads who was chosen."""
    parts = x.new_zeros(*chosen.shape, operation.out.width)
    for expert_id in torch.unique(chosen).tolist():
        token, place = torch.nonzero(chosen == expert_id, as_tuple=True)
        parts[token, place] = _one_expert(x[token], operation, expert_id)
    return (parts * weights[:, :, None]).sum(dim=1)


def run_stacked(
    x: torch.Tensor, operation: Experts, stack: ExpertStack, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """`run_experts` with shapes that do not depend on the choice: of few tokens the chosen experts' matrices are
    gathered (read, written and read again), of more every expert runs on every token."""
    tokens, top_k = chosen.shape
    experts = stack.up.shape[0]
    x = x if x.device.type == "cpu" else x.to(stack.up.dtype)  # once, not for every expert
    gathered = tokens * top_k * max(stack.up[0].nbytes, stack.down[0].nbytes)
    if 3 * tokens * top_k < experts and gathered <= _MOST_GATHERED_BYTES:
        picked = stack.of(chosen.long().flatten())
        each = x[:, None].expand(-1, top_k, -1).reshape(tokens * top_k, 1, -1)
        parts = _all_experts(each, operation, picked).view(tokens, top_k, -1)
    else:
        every = _all_experts(x.expand(experts, -1, -1), operation, stack)
        parts = every[chosen.long(), torch.arange(tokens, device=x.device)[:, None]]
    return (parts * weights[:, :, None]).sum(dim=1)


def _all_experts(x: torch.Tensor, operation: Experts, stack: ExpertStack) -> torch.Tensor:
    """x [N, t, columns], each through the expert in its place of ``stack``: [N, t, rows]."""
    up = _biased(_products(x, stack.up), stack.up_bias)
    gate = None if stack.gate is None else _biased(_products(x, stack.gate), stack.gate_bias)
    return _biased(_products(_inner(operation, gate, up), stack.down), stack.down_bias)


def _products(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """x [N, t, columns] · matrices [N, rows, columns]ᵀ in the dtypes of `torch_linear.multiply`."""
    if x.device.type != "cpu":
        return torch.bmm(x.to(matrices.dtype), matrices.transpose(1, 2)).float()
    return torch.bmm(x, matrices.float().transpose(1, 2))


def _one_expert(x: torch.Tensor, operation: Experts, expert_id: int) -> torch.Tensor:
    expert = operation.experts[expert_id]
    up = _biased(multiply(x, expert.up), expert.up_bias)
    gate = None if expert.gate is None else _biased(multiply(x, expert.gate), expert.gate_bias)
    return _biased(multiply(_inner(operation, gate, up), expert.down), expert.down_bias)


def _inner(operation: Experts, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """What stands between the projections."""
    if gate is None:
        return activate(operation.activation, up)
    if operation.clamp is None:
        return activate(operation.activation, gate) * up
    gate = gate.clamp(max=operation.clamp)
    return (up.clamp(-operation.clamp, operation.clamp) + 1.0) * (gate * torch.sigmoid(1.702 * gate))


def _biased(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``bias`` [rows] for x [t, rows], or [N, rows] for x [N, t, rows]."""
    return x if bias is None else x + (bias if bias.dim() == 1 else bias[:, None])
