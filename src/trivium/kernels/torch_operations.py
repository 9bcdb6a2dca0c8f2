"""Every operation of a program in torch, on registers on one device: no host decision but in what a step brings along.

DeepSpeed Inference section 3.1. T tokens of a step, R rows wanted, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from trivium.base.errors import ConfigError
from trivium.kernels.program import (
    Attend,
    Cache,
    Combine,
    Embed,
    Experts,
    Gated,
    HeadLinear,
    Linear,
    Norm,
    Operation,
    Program,
    Rope,
    Rows,
    Span,
)
from trivium.kernels.torch_experts import choose
from trivium.kernels.torch_linear import activate, multiply, norm, rotate

# (q, k, v, operation, cache) → out [T, heads · value_dim], keys and values written into the cache.
AttendStep = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, Attend, Cache], torch.Tensor]
# (x, operation, chosen, weights) → [T, out.width].
MixStep = Callable[[torch.Tensor, Experts, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class Step:
    """One run's inputs, int64 on the device, and its registers; ``attend`` and ``mix`` know what else the step is.

    ``output_rows`` None: every token's row, in order. ``replay``: choices of experts per MoE layer.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    output_rows: torch.Tensor | None
    caches: Sequence[Cache]
    attend: AttendStep
    mix: MixStep
    replay: tuple[torch.Tensor, ...] | None = None
    registers: list[torch.Tensor | None] = field(default_factory=list)
    routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    widths: tuple[int, ...] = ()

    def read(self, span: Span) -> torch.Tensor:
        """A view of the span's columns: [T, width], or [R, width] after `Rows`."""
        register = self.registers[span.register]
        if register is None:
            raise ConfigError(f"the program reads register {span.register} before anything wrote it")
        return register[:, span.start : span.start + span.width]

    def write(self, span: Span, value: torch.Tensor) -> None:
        """``value`` into the span; it becomes the register where it fills it, so it must be no view of another."""
        width = self.widths[span.register]
        if span.width == width:
            self.registers[span.register] = value
            return
        register = self.registers[span.register]
        if register is None or register.shape[0] != value.shape[0]:
            register = torch.zeros(value.shape[0], width, device=value.device)
            self.registers[span.register] = register
        register[:, span.start : span.start + span.width] = value


def run_operations(program: Program, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """All operations in order; (logits [R, V], hidden [R, dim]), views of registers.

    Raises:
        ConfigError: an operation that this backend does not know, or a register read before it was written.
    """
    step.registers = [None] * len(program.widths)
    step.widths = program.widths
    for operation in program.operations:
        run = _OPERATIONS.get(type(operation))
        if run is None:
            raise ConfigError(f"{type(operation).__name__}: not an operation that the torch backend has")
        run(step, operation)
    return step.read(program.logits), step.read(program.hidden)


def _embed(step: Step, op: Embed) -> None:
    value = op.table[step.token_ids].float()
    if op.scale != 1.0:
        value = value * op.scale
    if op.positions is not None:
        value = value + op.positions[step.positions + op.position_offset].float()
    step.write(op.out, value)


def _norm(step: Step, op: Norm) -> None:
    step.write(op.out, norm(step.read(op.x), op))


def _linear(step: Step, op: Linear) -> None:
    out = multiply(step.read(op.x), op.weight)
    if op.bias is not None:
        out = out + op.bias
    out = activate(op.activation, out)
    if op.scale != 1.0:
        out = out * op.scale
    step.write(op.out, out if op.add is None else out + step.read(op.add))


def _gated(step: Step, op: Gated) -> None:
    x = step.read(op.x)
    gate, up = multiply(x, op.gate), multiply(x, op.up)
    gate = gate if op.gate_bias is None else gate + op.gate_bias
    up = up if op.up_bias is None else up + op.up_bias
    step.write(op.out, activate(op.activation, gate) * up)


def _head_linear(step: Step, op: HeadLinear) -> None:
    x = step.read(op.x)
    for head, matrix in enumerate(op.weights):
        part = x[:, head * op.x_stride : head * op.x_stride + matrix.columns]
        step.write(Span(op.out.register, op.out.start + head * op.out_stride, matrix.rows), multiply(part, matrix))


def _rope(step: Step, op: Rope) -> None:
    rotate(step.read(op.x), step.positions, op)


def _attend(step: Step, op: Attend) -> None:
    v = None if op.v is None else step.read(op.v)
    step.write(op.out, step.attend(step.read(op.q), step.read(op.k), v, op, step.caches[op.cache]))


def _combine(step: Step, op: Combine) -> None:
    a = step.read(op.a)
    if op.b is not None:
        b = step.read(op.b)
        value = a + op.scale * b if op.kind == "add" else op.scale * a * b
    elif op.kind == "scale":
        value = op.scale * a
    elif op.kind == "clip":
        value = a.clamp(-op.scale, op.scale)
    elif op.kind == "softcap":
        value = op.scale * torch.tanh(a / op.scale)
    elif op.kind == "none":
        value = a.clone()
    else:
        value = activate(op.kind, a)
    step.write(op.out, value)


def _experts(step: Step, op: Experts) -> None:
    chosen, weights = choose(step.read(op.logits), op.gate, None if step.replay is None else step.replay[op.layer])
    step.routing[op.layer] = chosen, weights
    value = step.mix(step.read(op.x), op, chosen, weights)
    step.write(op.out, value if op.add is None else value + step.read(op.add))


def _rows(step: Step, op: Rows) -> None:
    x = step.read(op.x)
    step.write(op.out, x.clone() if step.output_rows is None else x[step.output_rows])


_OPERATIONS: dict[type[Operation], Callable[[Step, Operation], None]] = {
    Embed: _embed,  # type: ignore[dict-item]
    Norm: _norm,  # type: ignore[dict-item]
    Linear: _linear,  # type: ignore[dict-item]
    Gated: _gated,  # type: ignore[dict-item]
    HeadLinear: _head_linear,  # type: ignore[dict-item]
    Rope: _rope,  # type: ignore[dict-item]
    Attend: _attend,  # type: ignore[dict-item]
    Combine: _combine,  # type: ignore[dict-item]
    Experts: _experts,  # type: ignore[dict-item]
    Rows: _rows,  # type: ignore[dict-item]
}
