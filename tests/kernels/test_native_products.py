"""Every native product against its torch reference: all formats, odd shapes, both sides of every tile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.steps import FORMATS, NATIVE, compare, grid, matrix, native, over, rows_batch, vector
from trivium.kernels.matrix import Format, Layout, Matrix, arrange
from trivium.kernels.program import Activation, Expert, Experts, Gate, Gated, HeadLinear, Linear, Norm, Program, Span

# Tokens 1 to 6 and 16, 17 are the edges of register blocks and tiles; 257 is past a block of tokens.
SIZES = ((1, 64, 64), (3, 33, 70), (5, 200, 130), (6, 129, 64), (17, 96, 65), (33, 257, 10), (17, 704, 70))
ACTIVATIONS: tuple[Activation, ...] = (
    "silu",
    "gelu",
    "gelu_tanh",
    "quick_gelu",
    "relu",
    "relu2",
    "sigmoid",
    "tanh",
)


@pytest.mark.parametrize(("variant", "format", "group", "tokens", "columns", "rows"), grid(FORMATS, SIZES))
def test_linear(variant: str, format: Format, group: int, tokens: int, columns: int, rows: int) -> None:
    x = vector(tokens * columns).view(tokens, columns)

    def make(layout: Layout) -> Program:
        weight = matrix(rows, columns, format, group, layout)
        return over(x, (rows,), (Linear(x=Span(0, 0, columns), out=Span(1, 0, rows), weight=weight),), Span(1, 0, rows))

    compare(make, variant, tokens)


@pytest.mark.parametrize(("variant", "format", "group", "tokens", "columns"), grid(FORMATS, (1, 3), (200, 330)))
def test_linear_behind_a_norm(variant: str, format: Format, group: int, tokens: int, columns: int) -> None:
    """The norm prepares the product's inputs, each thread pieces of its rows."""
    x = vector(tokens * columns).view(tokens, columns)
    whole, rows = Span(0, 0, columns), 70
    for normed in (Span(1, 0, columns), whole):

        def make(layout: Layout, normed: Span = normed) -> Program:
            norm = Norm(x=whole, out=normed, group=columns, kind="rms", eps=1e-6, weight=vector(columns))
            linear = Linear(x=normed, out=Span(2, 0, rows), weight=matrix(rows, columns, format, group, layout))
            return over(x, (columns, rows), (norm, linear), Span(2, 0, rows))

        compare(make, variant, tokens)


@pytest.mark.parametrize(("variant", "format", "group", "tokens"), grid(FORMATS, (2, 17)))
def test_what_is_no_number_stays_in_its_row(variant: str, format: Format, group: int, tokens: int) -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = vector(tokens * 200).view(tokens, 200)
        x[1, 133] = bad
        weight = matrix(70, 200, format, group, "panels")
        linear = Linear(x=Span(0, 0, 200), out=Span(1, 0, 70), weight=weight)
        got = native(over(x, (70,), (linear,), Span(1, 0, 70)), variant).run(rows_batch(tokens), ()).logits
        assert not got[1].isfinite().any()
        assert got[torch.arange(tokens) != 1].isfinite().all()


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("format", "group"), [("float16", 0), ("bfloat16", 0), ("int8", 0), ("int4", 32)])
def test_more_tokens_and_inputs_than_a_block(variant: str, format: Format, group: int) -> None:
    tokens, columns, rows = 257, 300, 70
    x = vector(tokens * columns).view(tokens, columns)

    def make(layout: Layout) -> Program:
        weight = matrix(rows, columns, format, group, layout)
        return over(x, (rows,), (Linear(x=Span(0, 0, columns), out=Span(1, 0, rows), weight=weight),), Span(1, 0, rows))

    compare(make, variant, tokens)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_follows_a_product(variant: str, activation: Activation) -> None:
    x = 3 * vector(3 * 40).view(3, 40)

    def make(layout: Layout) -> Program:
        weight = matrix(70, 40, "float32", 0, layout)
        first = Linear(
            x=Span(0, 0, 40),
            out=Span(1, 10, 70),
            weight=weight,
            bias=vector(70),
            activation=activation,
            scale=0.7,
        )
        again = replace(first, add=Span(1, 10, 70), activation="none")
        return over(x, (90,), (first, again), Span(1, 10, 70))

    compare(make, variant, 3)


def asymmetric(rows: int, columns: int, group: int, layout: Layout) -> Matrix:
    """int4 with zero points of its own, as AWQ and GPTQ store it."""
    plain = matrix(rows, columns, "int4", group, "plain")
    generator = torch.Generator().manual_seed(8)
    zeros = torch.randint(0, 16, (rows, -(-columns // group)), generator=generator, dtype=torch.uint8)
    return arrange(replace(plain, zeros=zeros), layout)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 4, 19])
def test_zero_points(variant: str, group: int, tokens: int) -> None:
    x = vector(tokens * 200).view(tokens, 200)

    def make(layout: Layout) -> Program:
        weight = asymmetric(66, 200, group, layout)
        return over(x, (66,), (Linear(x=Span(0, 0, 200), out=Span(1, 0, 66), weight=weight),), Span(1, 0, 66))

    compare(make, variant, tokens)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("tokens", [2, 7])
def test_scales_in_fp32(variant: str, tokens: int) -> None:
    """Groups too small for fp16 keep fp32 scales."""
    x = vector(tokens * 64).view(tokens, 64)

    def make(layout: Layout) -> Program:
        small = matrix(64, 64, "float32", 0, "plain").data * 1e-7
        from trivium.kernels.matrix import pack

        weight = pack(small, "int4", group=32, layout=layout)
        assert weight.scales is not None
        assert weight.scales.dtype == torch.float32
        return over(x, (64,), (Linear(x=Span(0, 0, 64), out=Span(1, 0, 64), weight=weight),), Span(1, 0, 64))

    compare(make, variant, tokens)


@pytest.mark.parametrize(("variant", "format", "group", "tokens"), grid(FORMATS, (1, 9)))
def test_gated(variant: str, format: Format, group: int, tokens: int) -> None:
    x = vector(tokens * 72).view(tokens, 72)

    def make(layout: Layout) -> Program:
        gated = Gated(
            x=Span(0, 0, 72),
            out=Span(1, 0, 100),
            gate=matrix(100, 72, format, group, layout),
            up=matrix(100, 72, format, group, layout, 5),
            activation="gelu_tanh",
            gate_bias=vector(100, 3),
            up_bias=vector(100, 4),
        )
        return over(x, (100,), (gated,), Span(1, 0, 100))

    compare(make, variant, tokens)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("format", "group"), [("float32", 0), ("bfloat16", 0), ("int8", 0), ("int4", 64)])
@pytest.mark.parametrize("tokens", [1, 7])
def test_head_linear(variant: str, format: Format, group: int, tokens: int) -> None:
    """Three heads of 24 columns, 40 apart, into 70 each, 80 apart."""
    x = vector(tokens * 120).view(tokens, 120)

    def make(layout: Layout) -> Program:
        heads = HeadLinear(
            x=Span(0, 0, 120),
            out=Span(1, 0, 240),
            weights=tuple(matrix(70, 24, format, group, layout, seed) for seed in range(3)),
            x_stride=40,
            out_stride=80,
        )
        return over(x, (240,), (heads,), Span(1, 0, 230))

    def padded(layout: Layout) -> Program:
        # The columns between heads are never written: ask for head 1 alone.
        return replace_out(make(layout), Span(1, 80, 70))

    compare(padded, variant, tokens)


def replace_out(program: Program, out: Span) -> Program:
    rows = program.operations[-1]
    last = Span(2, 0, out.width)
    return replace(
        program,
        widths=(*program.widths[:2], out.width),
        operations=(*program.operations[:-1], replace(rows, x=out, out=last)),  # type: ignore[call-arg]
        logits=last,
        hidden=last,
    )


GATES = (
    Gate(top_k=2, scores="softmax", renormalise=True),
    Gate(top_k=3, scores="softmax", scale=1.5),
    Gate(top_k=3, scores="chosen"),
    Gate(
        top_k=4,
        scores="sigmoid",
        renormalise=True,
        renormalise_eps=1e-20,
        scale=2.5,
        correction=vector(12, 2),
        groups=4,
        top_groups=2,
    ),
    Gate(top_k=2, scores="softmax", groups=3, top_groups=1, group_by="max"),
)


@pytest.mark.parametrize(
    ("variant", "gate", "tokens", "format", "group"),
    grid(GATES, [(1, "float32", 0), (7, "bfloat16", 0), (40, "int8", 0)]),
)
def test_experts(variant: str, gate: Gate, tokens: int, format: Format, group: int) -> None:
    x = vector(tokens * 84).view(tokens, 84)

    def make(layout: Layout) -> Program:
        def expert(seed: int) -> Expert:
            return Expert(
                up=matrix(70, 72, format, group, layout, seed),
                gate=matrix(70, 72, format, group, layout, seed + 50),
                down=matrix(72, 70, format, group, layout, seed + 99),
                up_bias=vector(70, seed),
                gate_bias=vector(70, seed + 1),
                down_bias=vector(72, seed),
            )

        experts = Experts(
            x=Span(0, 0, 72),
            out=Span(1, 0, 72),
            logits=Span(0, 72, 12),
            experts=tuple(expert(seed) for seed in range(12)),
            gate=gate,
            activation="silu",
            layer=0,
            add=Span(0, 0, 72),
        )
        return over(x, (72,), (experts,), Span(1, 0, 72), moe_layers=1)

    # Quantised: an input that lies between two whole numbers may fall to either side of it.
    compare(make, variant, tokens, 5e-6 if format != "int8" else 5e-3)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("gated", "clamp"), [(True, 0.5), (False, None)])
def test_experts_of_other_kinds(variant: str, gated: bool, clamp: float | None) -> None:
    x = vector(9 * 38).view(9, 38)

    def make(layout: Layout) -> Program:
        def expert(seed: int) -> Expert:
            gate = matrix(20, 32, "float32", 0, layout, seed + 50) if gated else None
            up, down = matrix(20, 32, "float32", 0, layout, seed), matrix(32, 20, "float32", 0, layout, seed)
            return Expert(up=up, gate=gate, down=down)

        experts = Experts(
            x=Span(0, 0, 32),
            out=Span(1, 0, 32),
            logits=Span(0, 32, 6),
            experts=tuple(expert(seed) for seed in range(6)),
            gate=Gate(top_k=2, scores="chosen"),
            activation="relu",
            clamp=clamp,
            layer=0,
        )
        return over(x, (32,), (experts,), Span(1, 0, 32), moe_layers=1)

    compare(make, variant, 9)
