"""Latent attention as operations: only the latent is kept, the projections to and from it are absorbed.

DeepSpeed Inference section 3.1, region 2. Per head: q · (W_k c) = (W_kᵀ q) · c, and Σ p · (W_v c) = W_v (Σ p · c), so
that the cache holds kv_rank + rope numbers per token, whatever the number of heads.
"""

from __future__ import annotations

import torch

from trivium.inference.program_builder import Builder
from trivium.kernels.matrix import Matrix
from trivium.kernels.program import Attend, HeadLinear, Linear, Rope, Span
from trivium.models.architecture import Attention, Latent


def attend_latent(
    build: Builder, at: str, cache: int, attention: Attention, latent: Latent, x: Span, mixed: Span
) -> None:
    """Emit everything from the normed input ``x`` to ``mixed``, heads · value_dim wide."""
    q, kept = _project(build, at, attention, latent, x)
    _rotate(build, attention, latent, q, kept)
    heads, wide = attention.heads, latent.kv_rank + latent.rope
    queries = build.span("latent_queries", heads * wide)
    build.add(
        HeadLinear(
            x=Span(q.register, q.start, q.width),
            out=queries,
            weights=_heads(build, at + "k", latent.nope, heads, turned=True),
            x_stride=attention.head_dim,
            out_stride=wide,
        )
    )
    build.add(
        HeadLinear(
            x=Span(q.register, q.start + latent.nope, q.width - latent.nope),
            out=Span(queries.register, latent.kv_rank, queries.width - latent.kv_rank),
            weights=(build.identity(latent.rope),) * heads,
            x_stride=attention.head_dim,
            out_stride=wide,
        )
    )
    found = build.span("latent_mixed", heads * latent.kv_rank)
    build.add(
        Attend(
            q=queries,
            k=kept,
            v=None,
            out=found,
            cache=cache,
            heads=heads,
            kv_heads=1,
            head_dim=wide,
            value_dim=latent.kv_rank,
            scale=attention.scale,
            window=attention.window,
        )
    )
    build.add(
        HeadLinear(
            x=found,
            out=mixed,
            weights=_heads(build, at + "v", attention.value_dim, heads, turned=False),
            x_stride=latent.kv_rank,
            out_stride=attention.value_dim,
        )
    )


def _project(build: Builder, at: str, attention: Attention, latent: Latent, x: Span) -> tuple[Span, Span]:
    """Queries, and the latent with its rotary key behind it; their projections from x are one."""
    width = attention.heads * attention.head_dim
    first = width if latent.q_rank is None else latent.q_rank
    both = build.span("wide", first + latent.kv_rank + latent.rope)
    left, kept = Span(both.register, 0, first), Span(both.register, first, both.width - first)
    names = (at + ("q" if latent.q_rank is None else "q_a"), at + "kv_a")
    bias = None
    if attention.q_bias or attention.kv_bias:
        pieces = (
            names[0] + ".bias" if attention.q_bias else None,
            names[1] + ".bias" if attention.kv_bias else None,
        )
        bias = build.joined_vector(at + "qkv_a.bias", pieces, (left.width, kept.width))
    weight = build.matrix(at + "qkv_a.weight", tuple(f"{name}.weight" for name in names))
    build.add(Linear(x=x, out=both, weight=weight, bias=bias))
    q = left
    if latent.q_rank is not None:
        build.norm(at + "q_a_norm", latent.q_norm, left, left)
        q = build.span("queries", width)
        build.add(Linear(x=left, out=q, weight=build.matrix(at + "q.weight")))
    compressed = Span(kept.register, kept.start, latent.kv_rank)
    build.norm(at + "kv_a_norm", latent.kv_norm, compressed, compressed)
    return q, kept


def _rotate(build: Builder, attention: Attention, latent: Latent, q: Span, kept: Span) -> None:
    rope = attention.rope
    if rope is None:
        return
    table = build.rope(rope)
    for span, heads, first in ((q, attention.heads, latent.nope), (kept, 1, latent.kv_rank)):
        build.add(
            Rope(
                x=span,
                heads=heads,
                head_dim=span.width // heads,
                table=table,
                interleaved=rope.interleaved,
                first=first,
            )
        )


def _heads(build: Builder, name: str, rows: int, heads: int, *, turned: bool) -> tuple[Matrix, ...]:
    """One matrix per head of a weight [heads · rows, kv_rank], each turned where ``turned``."""

    def one(head: int) -> Matrix:
        def cut(parts: list[torch.Tensor]) -> torch.Tensor:
            part = parts[0][head * rows : (head + 1) * rows]
            return part.t().contiguous() if turned else part.contiguous()

        return build.matrix(f"{name}.{head}.weight", (name + ".weight",), cut)

    return tuple(one(head) for head in range(heads))
