"""Native paged attention against its torch reference: windows, caps, slopes, sinks, latent and 8-bit caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.steps import NATIVE, batch_of, close, grid, native, run, vector
from trivium.kernels import registry
from trivium.kernels.program import Attend, CacheSpec, Embed, Program, Rows, Span

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


@pytest.mark.parametrize("variant", NATIVE)
def test_more_heads_than_rows_of_a_block(variant: str) -> None:
    """A latent cache with 70 heads on one key head, as in deepseek_v3."""
    program = attention(heads=70, kv_heads=1, head_dim=24, latent=16)
    steps = (batch_of((0, 0, 5), (1, 0, 1)), batch_of((0, 5, 1), (1, 1, 3)))
    wanted = run(registry.executor(program, backend="torch"), program, *steps)
    for mine, theirs in zip(run(native(program, variant, 2), program, *steps), wanted, strict=True):
        close(mine.logits, theirs.logits)


@pytest.mark.parametrize("variant", NATIVE)
def test_blocks_behind_a_window_may_be_gone(variant: str) -> None:
    program = attention(window=20)
    whole = batch_of((0, 0, 100))
    last = batch_of((0, 100, 1))
    gone = last.block_tables.clone()
    gone[0, :5] = -1
    executor = native(program, variant)
    kept = run(executor, program, whole, last)[1]
    freed = run(executor, program, whole, replace(last, block_tables=gone))[1]
    assert torch.equal(kept.logits, freed.logits)
