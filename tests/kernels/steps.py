"""Small programs and batches for the kernels' tests, and the tolerance of each format in one place."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from trivium.kernels import build, registry
from trivium.kernels.draws import Sampler
from trivium.kernels.executor import Executor
from trivium.kernels.matrix import Format, Layout, Matrix, pack
from trivium.kernels.program import (
    Attend,
    Batch,
    Cache,
    CacheSpec,
    Embed,
    Expert,
    Experts,
    Gate,
    Gated,
    Linear,
    Norm,
    Operation,
    Output,
    Program,
    Rope,
    Rows,
    Span,
)

FORMATS: tuple[tuple[Format, int], ...] = (
    ("float32", 0),
    ("bfloat16", 0),
    ("float16", 0),
    ("int8", 0),
    ("int8", 32),
    ("int8", 64),
    ("int8", 128),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
)
# Largest difference from the reference, over the largest magnitude, of one operation on equal inputs: all arithmetic is
# fp32, and quantised products are whole numbers, so only the order of additions differs.
TOLERANCE = 5e-6
BLOCK = 16

INT = torch.int32


def variants() -> tuple[str, ...]:
    """The native variants that run here, built first where a compiler is there and they are not."""
    if not registry.native_variants() and build.find_compiler() is not None:
        build.build()
    return registry.native_variants()


NATIVE = [
    pytest.param(name, marks=[] if name in variants() else pytest.mark.skip(reason="not for this CPU or compiler"))
    for name in build.variants()
]


def grid(*axes: Sequence[Any]) -> list[Any]:
    """Every variant with every combination of the axes' values; `generic`, slow and without code of its own in what
    such grids vary, with a third of them in which every value of every axis stays.
    """
    cells = []
    for variant in NATIVE:
        for places in itertools.product(*(range(len(axis)) for axis in axes)):
            if variant.values[0] == "generic" and sum(places) % 3:
                continue
            values = [axis[place] for axis, place in zip(axes, places, strict=True)]
            flat = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
            cells.append(pytest.param(*variant.values, *flat, marks=variant.marks))
    return cells


def native(program: Program, variant: str, threads: int = 1) -> Executor:
    return registry.executor(program, backend=f"native:{variant}", threads=threads)


def sampler(variant: str, threads: int = 1) -> Sampler:
    """A native variant's sampler, of the smallest program."""
    found = native(over(torch.zeros(1, 8), (), (), Span(0, 0, 8)), variant, threads).sampler
    assert found is not None
    return found


def matrix(rows: int, columns: int, format: Format, group: int, layout: Layout, seed: int = 0) -> Matrix:
    generator = torch.Generator().manual_seed(seed + rows * 7919 + columns)
    weight = torch.randn(rows, columns, generator=generator) / columns**0.5
    return pack(weight, format, group=group, layout=layout)


def vector(size: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + size))


def over(
    x: torch.Tensor, widths: tuple[int, ...], operations: tuple[Operation, ...], out: Span, moe_layers: int = 0
) -> Program:
    """Register 0 holds x's rows (token t: row t); then ``operations``; ``out`` is the result."""
    last = len(widths) + 1
    return Program(
        widths=(x.shape[1], *widths, out.width),
        operations=(
            Embed(out=Span(0, 0, x.shape[1]), table=x.contiguous()),
            *operations,
            Rows(x=out, out=Span(last, 0, out.width)),
        ),
        caches=(),
        logits=Span(last, 0, out.width),
        hidden=Span(last, 0, out.width),
        num_moe_layers=moe_layers,
    )


def rows_batch(tokens: int) -> Batch:
    """Token t in a sequence of its own."""
    index = torch.arange(tokens, dtype=INT)
    return Batch(
        token_ids=index,
        positions=torch.zeros(tokens, dtype=INT),
        sequences=index.clone(),
        block_tables=torch.zeros(tokens, 1, dtype=INT),
        output_rows=index.clone(),
    )


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == wanted.shape
    assert torch.isfinite(wanted).all()
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))
    assert error <= tolerance, f"{error:.2e} > {tolerance:.0e}"


def compare(make: Callable[[Layout], Program], variant: str, tokens: int, tolerance: float = TOLERANCE) -> None:
    """One program, both backends, one, two and five threads (more than there are panels, often)."""
    batch = rows_batch(tokens)
    wanted = registry.executor(make("plain"), backend="torch").run(batch, ())
    one = native(make("panels"), variant).run(batch, ())
    close(one.logits, wanted.logits, tolerance)
    for threads in (2, 5):
        assert torch.equal(one.logits, native(make("panels"), variant, threads).run(batch, ()).logits)


def decoder(
    format: Format, group: int, layout: Layout, *, moe: bool = False, window: int | None = None, latent: bool = False
) -> Program:
    """Two blocks with attention and a gated MLP or experts, vocabulary 50, a head, all odd enough."""
    dim, heads, kv, head, ffn, vocabulary = 72, 4, 1 if latent else 2, 20, 100, 50
    value = 12 if latent else head
    qkv = heads * head + kv * head + (0 if latent else kv * value)
    table = torch.rand(600, head, generator=torch.Generator().manual_seed(5))
    operations: list[Operation] = [Embed(out=Span(0, 0, dim), table=vector(vocabulary * dim).view(vocabulary, dim))]
    for layer in range(2):
        normed = Span(1, 0, dim)
        norm = Norm(x=Span(0, 0, dim), out=normed, group=dim, kind="rms", eps=1e-6, weight=vector(dim, layer))
        operations += [
            norm,
            Linear(x=normed, out=Span(2, 0, qkv), weight=matrix(qkv, dim, format, group, layout, layer)),
            Rope(x=Span(2, 0, (heads + kv) * head), heads=heads + kv, head_dim=head, table=table),
            Attend(
                q=Span(2, 0, heads * head),
                k=Span(2, heads * head, kv * head),
                v=None if latent else Span(2, (heads + kv) * head, kv * value),
                out=Span(3, 0, heads * value),
                cache=layer,
                heads=heads,
                kv_heads=kv,
                head_dim=head,
                value_dim=value,
                scale=head**-0.5,
                window=window,
            ),
            Linear(
                x=Span(3, 0, heads * value),
                out=Span(0, 0, dim),
                weight=matrix(dim, heads * value, format, group, layout, layer),
                add=Span(0, 0, dim),
            ),
            norm,
        ]
        if moe:
            operations += _experts(dim, ffn, format, group, layout, layer)
        else:
            operations += [
                Gated(
                    x=normed,
                    out=Span(4, 0, ffn),
                    gate=matrix(ffn, dim, format, group, layout, layer),
                    up=matrix(ffn, dim, format, group, layout, layer + 9),
                    activation="silu",
                ),
                Linear(
                    x=Span(4, 0, ffn),
                    out=Span(0, 0, dim),
                    weight=matrix(dim, ffn, format, group, layout, layer),
                    add=Span(0, 0, dim),
                ),
            ]
    operations += [
        Norm(x=Span(0, 0, dim), out=Span(1, 0, dim), group=dim, kind="layer", eps=1e-5, weight=vector(dim)),
        Rows(x=Span(1, 0, dim), out=Span(6, 0, dim)),
        Linear(x=Span(6, 0, dim), out=Span(5, 0, vocabulary), weight=matrix(vocabulary, dim, format, group, layout)),
    ]
    spec = CacheSpec(kv_heads=kv, head_dim=head, value_dim=0 if latent else value, window=window)
    return Program(
        widths=(dim, dim, qkv, heads * value, ffn, vocabulary, dim, 8),
        operations=tuple(operations),
        caches=(spec, spec),
        logits=Span(5, 0, vocabulary),
        hidden=Span(6, 0, dim),
        num_moe_layers=2 if moe else 0,
    )


def _experts(dim: int, ffn: int, format: Format, group: int, layout: Layout, layer: int) -> list[Operation]:
    def expert(number: int) -> Expert:
        seed = 100 * layer + 10 * number
        return Expert(
            up=matrix(ffn, dim, format, group, layout, seed),
            gate=matrix(ffn, dim, format, group, layout, seed + 1),
            down=matrix(dim, ffn, format, group, layout, seed + 2),
        )

    return [
        Linear(x=Span(1, 0, dim), out=Span(7, 0, 8), weight=matrix(8, dim, "float32", 0, layout, layer)),
        Experts(
            x=Span(1, 0, dim),
            out=Span(0, 0, dim),
            logits=Span(7, 0, 8),
            experts=tuple(expert(number) for number in range(8)),
            gate=Gate(top_k=3, scores="softmax", renormalise=True),
            activation="silu",
            layer=layer,
            add=Span(0, 0, dim),
        ),
    ]


def caches(program: Program, dtype: torch.dtype = torch.float32, block: int = BLOCK) -> tuple[Cache, ...]:
    """Pages that hold NaN, or garbage, until they are written."""
    blocks = 8 * (12 * BLOCK // block)

    def pages(heads: int, width: int) -> torch.Tensor:
        filled = torch.full((blocks, heads, block, width), 100.0 if dtype == torch.int8 else float("nan"))
        return filled.to(dtype)

    def one(spec: CacheSpec) -> Cache:
        scales = None if dtype != torch.int8 else torch.full((blocks, spec.kv_heads, block), float("nan"))
        return Cache(
            keys=pages(spec.kv_heads, spec.head_dim),
            values=pages(spec.kv_heads, spec.value_dim) if spec.value_dim else None,
            key_scales=scales,
            value_scales=scales.clone() if scales is not None and spec.value_dim else None,
        )

    return tuple(one(spec) for spec in program.caches)


def batch_of(*chunks: tuple[int, int, int], vocabulary: int = 50, block: int = BLOCK) -> Batch:
    """Chunks (request, first position, tokens); request r's tokens and its blocks are the same in every batch."""
    tokens, positions, sequences, tables = [], [], [], []
    length = 12 * BLOCK
    for row, (request, start, count) in enumerate(chunks):
        generator = torch.Generator().manual_seed(request)
        whole = torch.randint(0, vocabulary, (length,), generator=generator, dtype=INT)
        tokens.append(whole[start : start + count])
        positions.append(torch.arange(start, start + count, dtype=INT))
        sequences.append(torch.full((count,), row, dtype=INT))
        # Neither adjacent nor in order.
        tables.append(torch.arange(length // block, dtype=INT).flip(0) * 8 + request % 8)
    total = sum(count for _, _, count in chunks)
    return Batch(
        token_ids=torch.cat(tokens),
        positions=torch.cat(positions),
        sequences=torch.cat(sequences),
        block_tables=torch.stack(tables),
        output_rows=torch.arange(total, dtype=INT),
    )


def run(
    executor: Executor, program: Program, *steps: Batch, dtype: torch.dtype = torch.float32, block: int = BLOCK
) -> list[Output]:
    """The steps one after the other over one set of caches."""
    held = caches(program, dtype, block)
    return [executor.run(step, held) for step in steps]


def routing_of(output: Output) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Per MoE layer experts and weights [T, K]; of a program without experts none."""
    return () if output.routing is None else output.routing.by_layer()
