"""Bring every token to its experts and the outputs back: a dense token→expert table, here or across ranks.

DeepSpeed-MoE section 5.4: gathers and scatters of cost T·K·C where one-hot einsums cost T·E·capacity·C.

T tokens, K choices, C model width, E experts, R = kept choices (rows), sorted by expert, then token.

[Note: no atomics]
A gather's usual backward adds rows into place in any order on a GPU. Each choice has its own row here, so both
directions are gathers, summed over K in order: the same bits every time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import xxhash
from torch import nn

from trivium.base.errors import MismatchError, NonFiniteError
from trivium.dist.exchange import Coordinated, Exchange, Home, Send
from trivium.moe.experts import Experts
from trivium.moe.routing import Routing

_NON_FINITE, _OTHER = 1, 2  # what a rank that has failed says in place of 0


@dataclass(frozen=True, kw_only=True)
class Table:
    """``tokens_R``: whose row it is; ``slots_R``: which of the T·K choices; ``rows_TK``: the row of a choice, -1: none;
    ``counts``: rows per expert.
    """

    tokens_R: torch.Tensor
    slots_R: torch.Tensor
    rows_TK: torch.Tensor
    counts: tuple[int, ...]


def table(routing: Routing, num_experts: int) -> Table:
    """The table of a routing, by one stable sort."""
    num_tokens, top_k = routing.experts_TK.shape
    experts = routing.experts_TK.masked_fill(~routing.kept_TK, num_experts).view(-1)  # dropped ones sort to the end
    counts: list[int] = torch.bincount(experts, minlength=num_experts + 1).tolist()
    num_rows = sum(counts[:num_experts])
    slots_R = torch.argsort(experts, stable=True)[:num_rows]
    rows = torch.full_like(experts, -1)
    rows[slots_R] = torch.arange(num_rows, device=experts.device)
    return Table(
        tokens_R=slots_R // top_k,
        slots_R=slots_R,
        rows_TK=rows.view(num_tokens, top_k),
        counts=tuple(counts[:num_experts]),
    )


def owners(num_experts: int, num_ranks: int) -> list[range]:
    """The experts of each rank, neighbours together; the first ranks hold one more where they do not divide."""
    share, more = divmod(num_experts, num_ranks)
    starts = [rank * share + min(rank, more) for rank in range(num_ranks + 1)]
    return [range(starts[rank], starts[rank + 1]) for rank in range(num_ranks)]


def run_local(x_TC: torch.Tensor, routing: Routing, num_experts: int, experts: Experts) -> torch.Tensor:
    """[T, C] → [T, C] where this rank holds all experts. Sends nothing."""
    plan = table(routing, num_experts)
    plain = experts.plain(x_TC, plan.counts)
    if plain is not None and routing.weights_TK.dtype == x_TC.dtype:
        weights_R = routing.weights_TK.reshape(-1).index_select(0, plan.slots_R)
        return experts.fused(x_TC, weights_R, plan.tokens_R, [n for n in plan.counts if n], *plain)
    rows_RC: torch.Tensor = Scatter.apply(x_TC, plan)  # type: ignore[no-untyped-call]
    out: torch.Tensor = Combine.apply(experts(rows_RC, plan.counts), routing.weights_TK, plan)  # type: ignore[no-untyped-call]
    return out


def run_across(
    x_TC: torch.Tensor, routing: Routing, num_experts: int, experts: Experts, exchange: Exchange
) -> torch.Tensor:
    """[T, C] → [T, C] where expert ranges lie on the owners of ``exchange``. Collective, forward and backward.

    Ranks may have any number of tokens, also none; a rank that has none still calls it, and backward. A flat exchange
    sends twice the bytes of the rows whose expert lives elsewhere, in forward and again in backward, and E + 3 integers
    to each of the others; a coordinated one one integer more, a digest of tokens and choice.
    """
    plan, ranges = table(routing, num_experts), owners(num_experts, exchange.owners)
    counts_SE = _agree(exchange, x_TC, routing, plan.counts)
    mine = ranges[exchange.owner]
    counts_SO = [[sum(row[r.start : r.stop]) for r in ranges] for row in counts_SE]
    counts_Se = [row[mine.start : mine.stop] for row in counts_SE]
    anchor = x_TC.new_zeros((), requires_grad=torch.is_grad_enabled() and _trains(x_TC, routing, experts))
    sent_RC: torch.Tensor = Scatter.apply(x_TC, plan)  # type: ignore[no-untyped-call]
    rows_RC: torch.Tensor = Send.apply(sent_RC, anchor, exchange, counts_SO, "dispatch")  # type: ignore[no-untyped-call]
    flat = torch.tensor(counts_Se, dtype=torch.int64).view(-1)
    labels = torch.arange(len(mine)).repeat(exchange.sources).repeat_interleave(flat)
    order_R = torch.argsort(labels, stable=True).to(x_TC.device)
    back_RC = _run_received(rows_RC, order_R, [sum(column) for column in zip(*counts_Se, strict=True)], experts)
    home_RC: torch.Tensor = Home.apply(back_RC, anchor, exchange, counts_SO, "combine")  # type: ignore[no-untyped-call]
    out: torch.Tensor = Combine.apply(home_RC, routing.weights_TK, plan)  # type: ignore[no-untyped-call]
    return out


def _run_received(
    rows_RC: torch.Tensor, order_R: torch.Tensor, counts: Sequence[int], experts: Experts
) -> torch.Tensor:
    """Rows in the order they came in → their outputs in that order; ``order_R`` sorts them by expert."""
    plain = experts.plain(rows_RC, counts)
    if plain is not None:
        return experts.fused(rows_RC, None, order_R, [n for n in counts if n], *plain)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    sorted_RC: torch.Tensor = Permute.apply(rows_RC, order_R, inverse_R)  # type: ignore[no-untyped-call]
    back_RC: torch.Tensor = Permute.apply(experts(sorted_RC, counts), inverse_R, order_R)  # type: ignore[no-untyped-call]
    return back_RC


def refuse(exchange: Exchange, num_experts: int, error: Exception) -> None:
    """Tell the other ranks, which wait in `run_across`, that this one has met ``error`` and will not come."""
    kind = _NON_FINITE if isinstance(error, NonFiniteError) else _OTHER
    status = kind + 4 * exchange.ranks[exchange.source]
    exchange.agree([status, 0, 0, *[0] * exchange.compares, *[0] * num_experts], "dispatch.counts")


def _agree(exchange: Exchange, x_TC: torch.Tensor, routing: Routing, counts: Sequence[int]) -> list[list[int]]:
    """Every source's rows per expert; raises, on all, if one has met an error or brings rows of another width."""
    alike = [_digest(x_TC, routing.experts_TK, routing.kept_TK)] if exchange.compares else []
    numbers = exchange.agree([0, x_TC.shape[1], x_TC.element_size(), *alike, *counts], "dispatch.counts")
    for row in numbers:
        rank, kind = divmod(row[0], 4)
        if kind == _NON_FINITE:
            raise NonFiniteError(f"the router's logits are not finite on rank {rank}; its own message names the row")
        if kind == _OTHER:
            raise MismatchError(f"rank {rank} has failed before its tokens were sent; its own message says why")
        if kind == Coordinated.APART:
            raise MismatchError(
                f"the tensor-parallel ranks beginning with rank {rank} route different tokens: a coordinated exchange "
                "needs identical ones on them; give them the same batch, or use exchange='flat'"
            )
    for rank, row in zip(exchange.ranks, numbers, strict=True):
        if row[1:3] != numbers[0][1:3]:
            raise MismatchError(
                f"an MoE layer runs on rows of {numbers[0][1]} elements of {numbers[0][2]} bytes on rank "
                f"{exchange.ranks[0]} and of {row[1]} elements of {row[2]} bytes on rank {rank}: "
                "use one dtype on all ranks"
            )
    return [row[3 + len(alike) :] for row in numbers]


def _digest(*tensors: torch.Tensor) -> int:
    """63 bits of the bytes of ``tensors``, which are copied to the host for it: the price of a coordinated exchange."""
    digest = xxhash.xxh3_64()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.intdigest() >> 1


def _trains(x_TC: torch.Tensor, routing: Routing, experts: nn.Module) -> bool:
    return (
        x_TC.requires_grad
        or routing.weights_TK.requires_grad
        or any(parameter.requires_grad for parameter in experts.parameters())
    )


def _sum_choices(rows_RC: torch.Tensor, plan: Table, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """[T, C]: each token's rows, times their weights, added in the order of its choices."""
    num_tokens, top_k = plan.rows_TK.shape
    same = weights_TK is None or weights_TK.dtype == rows_RC.dtype
    if same and rows_RC.shape[0] and rows_RC.dtype in (torch.float32, torch.float64):
        return _sum_bags(rows_RC, plan, weights_TK)
    dtype = rows_RC.dtype if weights_TK is None else torch.promote_types(rows_RC.dtype, weights_TK.dtype)
    out_TC = rows_RC.new_zeros((num_tokens, rows_RC.shape[1]), dtype=dtype)
    whole = rows_RC.shape[0] == num_tokens * top_k
    for choice in range(top_k):
        rows_T = plan.rows_TK[:, choice]
        tokens_T = None if whole else (rows_T >= 0).nonzero().view(-1)
        part_TC = rows_RC.index_select(0, rows_T if tokens_T is None else rows_T[tokens_T])
        if weights_TK is not None:
            weights_T = weights_TK[:, choice] if tokens_T is None else weights_TK[tokens_T, choice]
            part_TC = part_TC * weights_T[:, None]
        if tokens_T is None:
            out_TC += part_TC
        else:  # every token at most once: no two rows meet
            out_TC.index_add_(0, tokens_T, part_TC.to(dtype))
    return out_TC.to(rows_RC.dtype)


def _sum_bags(rows_RC: torch.Tensor, plan: Table, weights_TK: torch.Tensor | None) -> torch.Tensor:
    """`_sum_choices` in one pass without a temporary; a token's choices are a bag."""
    num_tokens, top_k = plan.rows_TK.shape
    if rows_RC.shape[0] == num_tokens * top_k:
        return F.embedding_bag(plan.rows_TK, rows_RC, mode="sum", per_sample_weights=weights_TK)
    kept_TK = plan.rows_TK >= 0
    sizes_T = kept_TK.sum(1)
    weights = None if weights_TK is None else weights_TK[kept_TK]
    offsets_T = sizes_T.cumsum(0) - sizes_T
    return F.embedding_bag(plan.rows_TK[kept_TK], rows_RC, offsets_T, mode="sum", per_sample_weights=weights)


class Scatter(torch.autograd.Function):
    """Tokens to rows: [T, C] → [R, C]. See [Note: no atomics]."""

    @staticmethod
    def forward(ctx: Any, x_TC: torch.Tensor, plan: Table) -> torch.Tensor:
        """Copy every token once for each of its kept choices."""
        ctx.plan = plan
        return x_TC.index_select(0, plan.tokens_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Add up a token's rows."""
        return _sum_choices(grad_RC, ctx.plan, None), None


class Combine(torch.autograd.Function):
    """Rows to tokens: [R, C] and weights [T, K] → [T, C], the weighted sum, in the weights' precision."""

    @staticmethod
    def forward(ctx: Any, rows_RC: torch.Tensor, weights_TK: torch.Tensor, plan: Table) -> torch.Tensor:
        """A token without a kept choice gets zeros."""
        ctx.save_for_backward(rows_RC, weights_TK)
        ctx.plan = plan
        return _sum_choices(rows_RC, plan, weights_TK)

    @staticmethod
    def backward(ctx: Any, grad_TC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the rows and of the weights; zero for a dropped choice's weight."""
        rows_RC, weights_TK = ctx.saved_tensors
        plan: Table = ctx.plan
        grad_RC = grad_TC.index_select(0, plan.tokens_R)
        weights = torch.zeros_like(weights_TK).view(-1)
        weights[plan.slots_R] = (rows_RC * grad_RC).sum(1, dtype=weights_TK.dtype)
        scaled_RC = grad_RC * weights_TK.reshape(-1)[plan.slots_R][:, None]
        return scaled_RC.to(rows_RC.dtype), weights.view_as(weights_TK), None


class Permute(torch.autograd.Function):
    """Rows in another order; the backward gathers by the inverse."""

    @staticmethod
    def forward(ctx: Any, rows_RC: torch.Tensor, order_R: torch.Tensor, inverse_R: torch.Tensor) -> torch.Tensor:
        """Row i of the result is row ``order_R[i]``."""
        ctx.inverse_R = inverse_R
        return rows_RC.index_select(0, order_R)

    @staticmethod
    def backward(ctx: Any, grad_RC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The same rows in their old order."""
        return grad_RC.index_select(0, ctx.inverse_R), None, None
