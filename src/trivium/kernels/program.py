"""A step of a language model as a flat list of operations on numbered registers: what backends run in one call.

DeepSpeed Inference section 3.1: a list without Python between its operations is what lets a backend fuse across them.

Shapes: T tokens of a step (of all its requests, flat), R rows whose logits are wanted, V vocabulary, S sequences.
Registers are fp32 [T, width] (after `Rows` [R, width]); an operation reads and writes `Span`s of columns of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from trivium.kernels.matrix import Matrix

Activation = Literal["none", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"]


@dataclass(frozen=True)
class Span:
    """Columns ``start … start + width`` of a register."""

    register: int
    start: int
    width: int


class Operation:
    """Base of all operations. Every subclass is a frozen, keyword-only dataclass: data, no behaviour."""


@dataclass(frozen=True, kw_only=True)
class Embed(Operation):
    """out = scale · table[token] + positions[position + position_offset] (the latter when there is such a table).

    ``table`` is [V, width], ``positions`` [P, width], in their storage dtype.
    """

    out: Span
    table: torch.Tensor
    scale: float = 1.0
    positions: torch.Tensor | None = None
    position_offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Norm(Operation):
    """RMS or layer norm of ``x``, in groups of ``group`` columns (a head's width for norms per head; else x.width).

    out = normalised · (offset + weight) + bias; ``weight`` and ``bias`` fp32: [group], or [x.width] when each
    column has its own (norms per head with separate weights), or None.
    """

    x: Span
    out: Span
    group: int
    kind: Literal["rms", "layer"]
    eps: float
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Linear(Operation):
    """out = activation(x · weightᵀ + bias) · scale, plus ``add`` (a span of out's width) when given."""

    x: Span
    out: Span
    weight: Matrix
    bias: torch.Tensor | None = None
    activation: Activation = "none"
    scale: float = 1.0
    add: Span | None = None


@dataclass(frozen=True, kw_only=True)
class Gated(Operation):
    """out = activation(x · gateᵀ + gate_bias) ∘ (x · upᵀ + up_bias): the first half of a gated MLP."""

    x: Span
    out: Span
    gate: Matrix
    up: Matrix
    activation: Activation
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HeadLinear(Operation):
    """Per head h: out[h] = x[h] · weights[h]ᵀ (latent attention's absorbed projections).

    ``x`` holds ``len(weights)`` heads, head h at column ``x.start + h · x_stride``; ``out`` likewise.
    """

    x: Span
    out: Span
    weights: tuple[Matrix, ...]
    x_stride: int
    out_stride: int


@dataclass(frozen=True, kw_only=True)
class Rope(Operation):
    """Rotate, in place, ``heads`` heads of ``head_dim`` columns (``x.width = heads · head_dim``).

    Of each head the columns ``first … first + 2·D`` turn, by angles ``table[position]``: fp32 [P, 2·D], D cosines,
    then D sines (any scaling and attention factor is folded in). ``interleaved`` pairs (0,1),(2,3)…; else (i, i + D).
    """

    x: Span
    heads: int
    head_dim: int
    table: torch.Tensor
    interleaved: bool = False
    first: int = 0


@dataclass(frozen=True, kw_only=True)
class Attend(Operation):
    """Write this step's keys and values into cache ``cache``, then causal attention of each query over its sequence.

    ``q`` is heads · head_dim wide, ``k`` kv_heads · head_dim, ``v`` kv_heads · value_dim (None: the first
    ``value_dim`` columns of each key are the value: a latent cache), ``out`` heads · value_dim. A query at position
    p sees positions max(0, p − window + 1) … p. Scores are scale · q·k, then softcap · tanh(s / softcap), then
    + slopes[h] · (key position − query position) + biases[h, key position] (fp32 [heads, P]: falcon's rounded slopes);
    ``sinks`` [heads] joins the softmax's denominator alone.
    """

    q: Span
    k: Span
    v: Span | None
    out: Span
    cache: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    biases: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Combine(Operation):
    """Element-wise: ``add`` out = a + scale·b; ``multiply`` out = scale·a∘b (b of width 1 is spread over columns).

    With ``b`` None: ``scale`` out = scale·a; ``clip`` out = a clamped to ±scale; ``softcap`` out = scale·tanh(a/scale);
    any name of `Activation` out = activation(a).
    """

    kind: Literal["add", "multiply", "scale", "clip", "softcap"] | Activation
    a: Span
    out: Span
    b: Span | None = None
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Expert:
    """One expert's weights, anywhere in memory: a gated MLP, or a plain one when ``gate`` is None."""

    up: Matrix
    down: Matrix
    gate: Matrix | None = None
    up_bias: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Gate:
    """How a router's logits [T, E] become ``top_k`` experts and weights (DeepSpeed-MoE section 5.4).

    ``scores``: softmax over all experts, sigmoid of each, or softmax over the chosen (``"chosen"``). ``correction`` [E]
    is added for the choice alone. With ``groups`` > 1 only the ``top_groups`` groups (best by the sum of their two
    highest corrected scores, or the highest one when ``group_by`` is "max") stay eligible. Weights are the scores of
    the chosen, divided by their sum (+ ``renormalise_eps``) when ``renormalise``, times ``scale``. Equal scores: lower
    expert first.
    """

    top_k: int
    scores: Literal["softmax", "sigmoid", "chosen"]
    renormalise: bool = False
    renormalise_eps: float = 0.0
    scale: float = 1.0
    correction: torch.Tensor | None = None
    groups: int = 1
    top_groups: int = 1
    group_by: Literal["top2", "max"] = "top2"


@dataclass(frozen=True, kw_only=True)
class Experts(Operation):
    """out = Σ over a token's chosen experts of weight · expert(x), + ``add``. ``logits`` [.., E] come from a `Linear`.

    ``clamp`` is gpt-oss's gated activation: gate clamped above, up to ±clamp, (up + 1) · gate · sigmoid(1.702 · gate).
    ``layer`` is where the routing (experts int32 [T, K], weights fp32 [T, K]) is handed out, or replayed from.
    """

    x: Span
    out: Span
    logits: Span
    experts: tuple[Expert, ...]
    gate: Gate
    activation: Activation
    layer: int
    clamp: float | None = None
    add: Span | None = None


@dataclass(frozen=True, kw_only=True)
class Rows(Operation):
    """out[r] = x[output_rows[r]]: from here on registers written have R rows."""

    x: Span
    out: Span


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What one layer keeps per token: keys of kv_heads · head_dim, values of kv_heads · value_dim (0: latent).

    ``window``: tokens further back are never read again; None: all are.
    """

    kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None


@dataclass(frozen=True, kw_only=True)
class Program:
    """A model's step. ``logits`` is the span [R, V] that it ends in; ``hidden`` the last norm's output [R, dim]."""

    widths: tuple[int, ...]
    operations: tuple[Operation, ...]
    caches: tuple[CacheSpec, ...]
    logits: Span
    hidden: Span
    num_moe_layers: int = 0

    @property
    def top_k(self) -> tuple[int, ...]:
        """How many experts each MoE layer chooses per token."""
        layers = {op.layer: op.gate.top_k for op in self.operations if isinstance(op, Experts)}
        return tuple(layers[layer] for layer in sorted(layers))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One step's tokens, all int32 on the CPU, tokens of one sequence adjacent and in rising position.

    token_ids, positions, sequences [T] (``sequences[t]``: the token's row of ``block_tables``); block_tables [S, B]
    (entry p // block_size holds position p; unused: -1); output_rows [R]. ``routing``: replayed choices per MoE layer,
    (experts int32 [T, K]), or None.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    sequences: torch.Tensor
    block_tables: torch.Tensor
    output_rows: torch.Tensor
    routing: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Cache:
    """One layer's paged keys and values: [blocks, kv_heads, block_size, head_dim] and […, value_dim] (None: latent).

    fp32, bf16, or int8 with ``key_scales`` and ``value_scales`` fp32 [blocks, kv_heads, block_size].
    """

    keys: torch.Tensor
    values: torch.Tensor | None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRouting:
    """A step's choices of experts on the CPU: int32 experts and fp32 weights, one MoE layer after the other in one row.

    Each layer has ``rows`` times its ``top_k`` numbers, of which the first ``tokens`` rows are the step's.
    """

    experts: torch.Tensor
    weights: torch.Tensor
    top_k: tuple[int, ...]
    rows: int
    tokens: int

    def by_layer(self) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Per MoE layer experts and weights, both [T, K], in this memory."""
        sizes = [self.rows * top_k for top_k in self.top_k]
        layers = zip(self.top_k, torch.split(self.experts, sizes), torch.split(self.weights, sizes), strict=True)
        return tuple(
            (experts.view(self.rows, top_k)[: self.tokens], weights.view(self.rows, top_k)[: self.tokens])
            for top_k, experts, weights in layers
        )


@dataclass(frozen=True, kw_only=True)
class Output:
    """logits fp32 [R, V]; hidden fp32 [R, dim]; routing: None in a program without experts.

    ``recorded``: the step was captured for later ones too, so that its time says nothing about theirs.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    routing: StepRouting | None = None
    recorded: bool = False
