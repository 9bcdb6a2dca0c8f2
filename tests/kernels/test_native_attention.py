"""Native paged attention against its torch reference: windows, caps, slopes, sinks, latent and 8-bit caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.steps import NATIVE, batch_of, close, grid, native, run, vector
from trivium.kernels import registry
from trivium.kernels.program import Attend, CacheSpec, Combine, Embed, Operation, Program, Rope, Rows, Span

VOCABULARY = 50
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one key head": {"kv_heads": 1},
    "every head its own": {"kv_heads": 6},
    "window": {"window": 37},
    "short window": {"window": 1},
    "softcap": {"softcap": 1.5, "scale": 1.0},
    "slopes": {"slopes": torch.linspace(0.01, 0.2, 6)},
    "sinks": {"sinks": torch.linspace(-2.0, 3.0, 6)},
    "biases": {"biases": vector(6 * 192).view(6, 192)},
    "latent": {"kv_heads": 1, "latent": 12},
    "wide": {"head_dim": 72, "value_dim": 130, "kv_heads": 2},
    "odd": {"head_dim": 21, "value_dim": 64},
    "wide latent": {"kv_heads": 1, "head_dim": 150, "latent": 130},
    "whole panels": {"head_dim": 64, "value_dim": 128},
    "whole panels, window": {"head_dim": 32, "value_dim": 64, "kv_heads": 1, "window": 37},
    "all": {"window": 50, "softcap": 3.0, "slopes": torch.linspace(0.0, 0.1, 6), "sinks": torch.ones(6)},
}


def attention(
    *, heads: int = 6, kv_heads: int = 3, head_dim: int = 20, value_dim: int = 20, latent: int = 0, **more: Any
) -> Program:
    """q, k and v are read off an embedding."""
    value_dim = latent or value_dim
    q, k, v = heads * head_dim, kv_heads * head_dim, 0 if latent else kv_heads * value_dim
    width, out = q + k + v, heads * value_dim
    scale = more.pop("scale", head_dim**-0.5)
    attend = Attend(
        q=Span(0, 0, q),
        k=Span(0, q, k),
        v=None if latent else Span(0, q + k, v),
        out=Span(1, 0, out),
        cache=0,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=scale,
        **more,
    )
    spec = CacheSpec(kv_heads=kv_heads, head_dim=head_dim, value_dim=0 if latent else value_dim, window=attend.window)
    return Program(
        widths=(width, out, out),
        operations=(
            Embed(out=Span(0, 0, width), table=vector(VOCABULARY * width).view(VOCABULARY, width)),
            attend,
            Rows(x=Span(1, 0, out), out=Span(2, 0, out)),
        ),
        caches=(spec,),
        logits=Span(2, 0, out),
        hidden=Span(2, 0, out),
    )


@pytest.mark.parametrize(("variant", "dtype", "kind"), grid([torch.float32, torch.bfloat16, torch.int8], list(KINDS)))
def test_attention(variant: str, dtype: torch.dtype, kind: str) -> None:
    program = attention(**KINDS[kind])
    steps = (
        batch_of((0, 0, 70), (1, 0, 1), (2, 0, 33)),
        batch_of((1, 1, 40), (0, 70, 1), (2, 33, 95)),
        batch_of((0, 71, 1), (1, 41, 1), (2, 128, 1)),
    )
    wanted = run(registry.executor(program, backend="torch"), program, *steps, dtype=dtype)
    for threads in (1, 2):
        got = run(native(program, variant, threads), program, *steps, dtype=dtype)
        for mine, theirs in zip(got, wanted, strict=True):
            close(mine.logits, theirs.logits)


@pytest.mark.parametrize("block", [1, 5, 8, 24, 48])
@pytest.mark.parametrize(("variant", "kind"), grid(list(KINDS)))
def test_blocks_of_any_size(variant: str, kind: str, block: int) -> None:
    program = attention(**KINDS[kind])
    steps = [
        batch_of(*chunks, block=block)
        for chunks in (((0, 0, 70), (1, 0, 1)), ((1, 1, 40), (0, 70, 1)), ((0, 71, 1), (1, 41, 1)))
    ]
    wanted = run(registry.executor(program, backend="torch"), program, *steps, dtype=torch.bfloat16, block=block)
    got = run(native(program, variant, 2), program, *steps, dtype=torch.bfloat16, block=block)
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine.logits, theirs.logits)


@pytest.mark.parametrize(("variant", "dtype", "kind"), grid([torch.float32, torch.bfloat16, torch.int8], list(KINDS)))
def test_few_queries_or_many(variant: str, dtype: torch.dtype, kind: str) -> None:
    """Few take values, and pairs of keys, as the cache holds them, many a copy in fp32: to the bit the same."""
    executor = native(program := attention(**KINDS[kind]), variant, 2)
    (whole,) = run(executor, program, batch_of((0, 0, 150)), dtype=dtype)
    ends = (60, 61, 62, 65, 68, 70, 74, 75, 128, 129, 149, 150)
    for block in (16, 5):
        parts = [batch_of((0, start, end - start), block=block) for start, end in zip((0, *ends), ends, strict=False)]
        got = run(executor, program, *parts, dtype=dtype, block=block)
        assert torch.equal(torch.cat([part.logits for part in got]), whole.logits)


@pytest.mark.parametrize(
    ("variant", "dtype", "block", "kv_heads", "table"),
    grid(
        [torch.float32, torch.bfloat16],
        [
            (5, 1, (10, 20, 30, 13)),
            (5, 3, (10, 20, 30, 11)),
            (4, 1, (8, 20, 30, 11)),
            (10, 2, (1, 3, 5, 7, 20, 30, 21)),
        ],
    ),
)
def test_blocks_that_look_adjacent(
    variant: str, dtype: torch.dtype, block: int, kv_heads: int, table: tuple[int, ...]
) -> None:
    """The sixteenth row lies fifteen behind the first, others between them elsewhere."""
    program = attention(kv_heads=kv_heads, head_dim=64, value_dim=64)
    count = len(table) * block // 16 * 16
    steps = [
        replace(batch_of((0, start, end - start), block=block), block_tables=torch.tensor([table], dtype=torch.int32))
        for start, end in ((0, count - 1), (count - 1, count))
    ]
    wanted = run(registry.executor(program, backend="torch"), program, *steps, dtype=dtype, block=block)
    got = run(native(program, variant), program, *steps, dtype=dtype, block=block)
    for mine, theirs in zip(got, wanted, strict=True):
        close(mine.logits, theirs.logits)


@pytest.mark.parametrize(("variant", "dtype"), grid([torch.float32, torch.bfloat16, torch.int8]))
def test_what_is_no_number_stays_with_those_that_see_it(variant: str, dtype: torch.dtype) -> None:
    ill = VOCABULARY - 1
    steps = [
        batch_of(*chunks, vocabulary=ill)
        for chunks in (((0, 0, 20), (1, 0, 20)), ((0, 20, 1), (1, 20, 1)), ((1, 21, 1), (0, 21, 1)))
    ]
    steps[1].token_ids[0] = ill
    program = attention(head_dim=64, value_dim=64)
    embed, *others = program.operations
    assert isinstance(embed, Embed)
    for bad in (float("nan"), float("inf")):
        table = embed.table.clone()
        table[ill] = bad
        executor = native(replace(program, operations=(replace(embed, table=table), *others)), variant, 2)
        first, second, third = run(executor, program, *steps, dtype=dtype)
        assert first.logits.isfinite().all()
        assert second.logits[0].isnan().all() and second.logits[1].isfinite().all()
        assert third.logits[0].isfinite().all() and third.logits[1].isnan().all()


@pytest.mark.parametrize("variant", NATIVE)
def test_more_heads_than_rows_of_a_block(variant: str) -> None:
    """A latent cache with 70 heads on one key head, as in deepseek_v3."""
    program = attention(heads=70, kv_heads=1, head_dim=24, latent=16)
    steps = (batch_of((0, 0, 5), (1, 0, 1)), batch_of((0, 5, 1), (1, 1, 3)))
    wanted = run(registry.executor(program, backend="torch"), program, *steps)
    for mine, theirs in zip(run(native(program, variant, 2), program, *steps), wanted, strict=True):
        close(mine.logits, theirs.logits)


@pytest.mark.parametrize(("variant", "dtype", "width"), grid([torch.float32, torch.bfloat16, torch.int8], [20, 64]))
def test_blocks_behind_a_window_may_be_gone(variant: str, dtype: torch.dtype, width: int) -> None:
    program = attention(window=20, value_dim=width)
    whole = batch_of((0, 0, 100))
    last = batch_of((0, 100, 1))
    gone = last.block_tables.clone()
    gone[0, :5] = -1
    executor = native(program, variant)
    kept = run(executor, program, whole, last, dtype=dtype)[1]
    freed = run(executor, program, whole, replace(last, block_tables=gone), dtype=dtype)[1]
    assert torch.equal(kept.logits, freed.logits)


TURNS: dict[str, dict[str, Any]] = {
    "whole heads": {"head_dim": 20, "columns": 20},
    "some columns": {"head_dim": 21, "columns": 14, "first": 5},
    "interleaved": {"head_dim": 40, "columns": 34, "first": 6, "interleaved": True, "window": 37},
    "whole panels": {"head_dim": 64, "columns": 64},
}


def turned(*, head_dim: int, columns: int, kept: str = "", **more: Any) -> Program:
    """`attention` behind a rotation of queries and keys; ``kept``: how much of the turned queries is read after it."""
    plain = attention(head_dim=head_dim, value_dim=head_dim, window=more.pop("window", None))
    embed, attend, rows = plain.operations
    assert isinstance(attend, Attend)
    heads, queries = attend.heads + attend.kv_heads, attend.q.width
    table = torch.rand(200, columns, generator=torch.Generator().manual_seed(3))
    rope = Rope(x=Span(0, 0, heads * head_dim), heads=heads, head_dim=head_dim, table=table, **more)
    keep: tuple[Operation, ...] = (
        Combine(kind="scale", a=attend.q, out=Span(3, 0, queries)),
        Rows(x=Span(3, 0, queries), out=Span(4, 0, queries)),
    )
    if kept == "rest":  # the first of them and the last of the keys are written anew before
        keep = (
            Combine(kind="scale", a=Span(1, 0, 7), out=Span(0, 0, 7)),
            Combine(kind="scale", a=Span(1, 0, 9), out=Span(0, heads * head_dim - 9, 9)),
            *keep,
        )
    return replace(
        plain,
        widths=(*plain.widths, queries, queries),
        operations=(embed, rope, attend, *(keep if kept else ()), rows),
        hidden=Span(4, 0, queries) if kept else plain.hidden,
    )


@pytest.mark.parametrize(
    ("variant", "dtype", "kind", "kept"),
    grid([torch.float32, torch.bfloat16, torch.int8], list(TURNS), ["whole", "rest"]),
)
def test_attention_turns_its_queries_and_keys_itself_where_nobody_else_reads_them(
    variant: str, dtype: torch.dtype, kind: str, kept: str
) -> None:
    """The same bits as from a rotation of its own; prompts of several blocks write all keys first.

    That it does is not seen from here: only that nobody can tell.
    """
    alone, among = turned(kept=kept, **TURNS[kind]), turned(**TURNS[kind])
    steps = (
        batch_of((0, 0, 70), (1, 0, 1), (2, 0, 33)),
        batch_of((1, 1, 40), (0, 70, 1)),
        batch_of((0, 71, 1), (1, 41, 1)),
    )
    wanted = run(registry.executor(alone, backend="torch"), alone, *steps, dtype=dtype)
    for threads in (1, 2):
        separate = run(native(alone, variant, threads), alone, *steps, dtype=dtype)
        together = run(native(among, variant, threads), among, *steps, dtype=dtype)
        for one, other, reference in zip(separate, together, wanted, strict=True):
            assert torch.equal(one.logits, other.logits)
            close(one.hidden, reference.hidden, 2e-6)
            close(one.logits, reference.logits, 2e-6 if dtype == torch.float32 else 0.05)
