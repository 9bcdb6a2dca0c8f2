"""Runs a program with torch, operation by operation, on any device: the reference of every native kernel.

DeepSpeed Inference section 3.1. On the CPU all arithmetic is fp32 whatever the weights' format; on CUDA 16-bit weights
multiply in their own dtype. Not batch-invariant: torch picks another product order for another number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace

import torch

from trivium.base.errors import ConfigError
from trivium.kernels.batch import check
from trivium.kernels.program import (
    Attend,
    Batch,
    Cache,
    Combine,
    Embed,
    Experts,
    Gated,
    HeadLinear,
    Linear,
    Norm,
    Operation,
    Output,
    Program,
    Rope,
    Rows,
    Span,
)
from trivium.kernels.torch_attention import attend
from trivium.kernels.torch_experts import choose, run_experts
from trivium.kernels.torch_linear import activate, multiply, norm, rotate


@dataclass(kw_only=True)
class _Step:
    """One run's registers, and the routing it hands out."""

    batch: Batch
    caches: Sequence[Cache]
    registers: list[torch.Tensor | None]
    widths: tuple[int, ...]
    rows: int
    device: torch.device
    routing: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def read(self, span: Span) -> torch.Tensor:
        register = self.registers[span.register]
        if register is None:
            raise ConfigError(f"the program reads register {span.register} before anything wrote it")
        return register[:, span.start : span.start + span.width]

    def write(self, span: Span, value: torch.Tensor) -> None:
        register = self.registers[span.register]
        if register is None or register.shape[0] != value.shape[0]:
            register = torch.zeros(value.shape[0], self.widths[span.register], device=self.device)
            self.registers[span.register] = register
        register[:, span.start : span.start + span.width] = value


class TorchExecutor:
    """The program's step in torch; see `trivium.kernels.executor.Executor`."""

    def __init__(self, program: Program, *, device: str | torch.device = "cpu") -> None:
        self._device = torch.device(device)
        self._program = program if self._device.type == "cpu" else _move_program(program, self._device)
        self._run: dict[type[Operation], Callable[[_Step, Operation], None]] = _OPERATIONS

    @property
    def name(self) -> str:
        """The backend and its device."""
        return f"torch {self._device.type}"

    @property
    def batch_invariant(self) -> bool:
        """Never: torch's products depend on the number of rows."""
        return False

    @torch.no_grad()
    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
        """One step; see `Executor.run`."""
        program = self._program
        check(program, batch, caches)
        step = _Step(
            batch=batch,
            caches=caches,
            registers=[None] * len(program.widths),
            widths=program.widths,
            rows=len(batch.token_ids),
            device=self._device,
        )
        for operation in program.operations:
            run = self._run.get(type(operation))
            if run is None:
                raise ConfigError(f"{type(operation).__name__}: not an operation that the torch backend has")
            run(step, operation)
        return Output(
            logits=step.read(program.logits).clone(),
            hidden=step.read(program.hidden).clone(),
            routing=tuple(step.routing[layer] for layer in sorted(step.routing)),
        )


def _move_program(program: Program, device: torch.device) -> Program:
    return replace(program, operations=tuple(_move_operation(op, device) for op in program.operations))


def _move_operation(operation: Operation, device: torch.device) -> Operation:
    moved = _move(operation, device)
    return moved if isinstance(moved, Operation) else operation


def _move(value: object, device: torch.device) -> object:
    """``value`` with every tensor inside on ``device``."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_move(item, device) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _move(getattr(value, f.name), device) for f in fields(value)})
    return value


def _embed(step: _Step, op: Embed) -> None:
    value = op.table[step.batch.token_ids.long().to(op.table.device)].float() * op.scale
    if op.positions is not None:
        at = (step.batch.positions.long() + op.position_offset).to(op.positions.device)
        value = value + op.positions[at].float()
    step.write(op.out, value)


def _norm(step: _Step, op: Norm) -> None:
    step.write(op.out, norm(step.read(op.x), op))


def _linear(step: _Step, op: Linear) -> None:
    out = multiply(step.read(op.x), op.weight)
    if op.bias is not None:
        out = out + op.bias
    out = activate(op.activation, out) * op.scale
    step.write(op.out, out if op.add is None else out + step.read(op.add))


def _gated(step: _Step, op: Gated) -> None:
    x = step.read(op.x)
    gate, up = multiply(x, op.gate), multiply(x, op.up)
    gate = gate if op.gate_bias is None else gate + op.gate_bias
    up = up if op.up_bias is None else up + op.up_bias
    step.write(op.out, activate(op.activation, gate) * up)


def _head_linear(step: _Step, op: HeadLinear) -> None:
    x = step.read(Span(op.x.register, op.x.start, op.x.width))
    for head, matrix in enumerate(op.weights):
        part = x[:, head * op.x_stride : head * op.x_stride + matrix.columns]
        step.write(Span(op.out.register, op.out.start + head * op.out_stride, matrix.rows), multiply(part, matrix))


def _rope(step: _Step, op: Rope) -> None:
    step.write(op.x, rotate(step.read(op.x), step.batch.positions.long().to(step.device), op))


def _attend(step: _Step, op: Attend) -> None:
    v = None if op.v is None else step.read(op.v)
    q, k = step.read(op.q).contiguous(), step.read(op.k)
    step.write(
        op.out, attend(q, k.contiguous(), None if v is None else v.contiguous(), op, step.batch, step.caches[op.cache])
    )


def _combine(step: _Step, op: Combine) -> None:
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
    else:
        value = activate(op.kind, a)
    step.write(op.out, value)


def _experts(step: _Step, op: Experts) -> None:
    replayed = None if step.batch.routing is None else step.batch.routing[op.layer]
    chosen, weights = choose(step.read(op.logits), op.gate, replayed)
    step.routing[op.layer] = (chosen.cpu(), weights.cpu())
    value = run_experts(step.read(op.x), op, chosen, weights)
    step.write(op.out, value if op.add is None else value + step.read(op.add))


def _rows(step: _Step, op: Rows) -> None:
    step.write(op.out, step.read(op.x)[step.batch.output_rows.long().to(step.device)])


_OPERATIONS: dict[type[Operation], Callable[[_Step, Operation], None]] = {
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
