"""Native norms, rotations, element-wise operations and embeddings against their torch references."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch

from tests.kernels.steps import NATIVE, close, compare, grid, native, over, rows_batch, vector
from trivium.kernels import registry
from trivium.kernels.matrix import Layout
from trivium.kernels.program import Combine, Embed, Norm, Operation, Program, Rope, Rows, Span


def check(variant: str, x: torch.Tensor, out: Span, *operations: Operation) -> None:
    def make(layout: Layout) -> Program:
        return over(x, (x.shape[1],), operations, out)

    compare(make, variant, x.shape[0])


@pytest.mark.parametrize(
    ("variant", "kind", "width", "group", "own"),
    grid(("rms", "layer"), [(64, 64), (70, 70), (330, 330), (100, 20), (7, 7)], (False, True)),
)
def test_norm(variant: str, kind: Literal["rms", "layer"], width: int, group: int, own: bool) -> None:
    size = width if own else group
    x = 1.5 + vector(3 * width).view(3, width)
    norm = Norm(
        x=Span(0, 0, width),
        out=Span(1, 0, width),
        group=group,
        kind=kind,
        eps=1e-5,
        weight=vector(size),
        bias=vector(size, 2),
        offset=1.0,
    )
    check(variant, x, Span(1, 0, width), norm)
    check(variant, x, Span(1, 0, width), replace(norm, weight=None, bias=None))
    check(variant, x, Span(0, 0, width), replace(norm, out=Span(0, 0, width)))


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "turned", "first"), [(64, 64, 0), (20, 20, 0), (40, 12, 28), (34, 14, 0)])
def test_rope(variant: str, interleaved: bool, head_dim: int, turned: int, first: int) -> None:
    tokens, heads = 5, 3
    x = vector(tokens * heads * head_dim).view(tokens, -1)
    table = torch.rand(50, turned, generator=torch.Generator().manual_seed(1))
    rope = Rope(
        x=Span(0, 0, heads * head_dim),
        heads=heads,
        head_dim=head_dim,
        table=table,
        interleaved=interleaved,
        first=first,
    )
    program = over(x, (), (rope,), Span(0, 0, heads * head_dim))
    batch = replace(rows_batch(tokens), positions=torch.tensor([0, 49, 3, 7, 20], dtype=torch.int32))
    wanted = registry.executor(program, backend="torch").run(batch, ()).logits
    close(native(program, variant).run(batch, ()).logits, wanted)


@pytest.mark.parametrize(
    ("variant", "width", "kind"),
    grid((33, 5000), ("add", "multiply", "scale", "clip", "softcap", "silu", "gelu", "tanh")),
)
def test_combine(variant: str, width: int, kind: str) -> None:
    x = 3 * vector(2 * 2 * width).view(2, 2 * width)
    b = Span(0, width, width) if kind in ("add", "multiply") else None
    combine = Combine(kind=kind, a=Span(0, 0, width), b=b, out=Span(1, 3, width), scale=1.3)  # type: ignore[arg-type]
    check(variant, x, Span(1, 3, width), combine)


@pytest.mark.parametrize("variant", NATIVE)
def test_combine_spreads_one_column(variant: str) -> None:
    combine = Combine(kind="multiply", a=Span(0, 1, 30), b=Span(0, 0, 1), out=Span(1, 0, 30))
    check(variant, vector(4 * 31).view(4, 31), Span(1, 0, 30), combine)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embedding_and_rows(variant: str, dtype: torch.dtype) -> None:
    width = 37
    embed = Embed(
        out=Span(0, 0, width),
        table=vector(9 * width).view(9, width).to(dtype),
        scale=3.0,
        positions=vector(12 * width).view(12, width).to(dtype),
        position_offset=2,
    )
    program = Program(
        widths=(width, width),
        operations=(embed, Rows(x=Span(0, 0, width), out=Span(1, 0, width))),
        caches=(),
        logits=Span(1, 0, width),
        hidden=Span(1, 0, 5),
    )
    batch = replace(
        rows_batch(4),
        token_ids=torch.tensor([8, 0, 3, 3], dtype=torch.int32),
        positions=torch.tensor([9, 0, 1, 2], dtype=torch.int32),
        output_rows=torch.tensor([3, 0], dtype=torch.int32),
    )
    wanted = registry.executor(program, backend="torch").run(batch, ())
    got = native(program, variant, 2).run(batch, ())
    close(got.logits, wanted.logits, 1e-7)
    close(got.hidden, wanted.hidden, 1e-7)
