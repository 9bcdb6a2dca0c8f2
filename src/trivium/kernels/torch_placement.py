"""A program's tensors on a device: each copied there once, experts side by side, and copied again when they change.

DeepSpeed Inference section 3.1. E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar, cast

import torch

from trivium.base.errors import ConfigError
from trivium.kernels.matrix import Format, Matrix
from trivium.kernels.program import Expert, Experts, Operation, Program

T = TypeVar("T")
_FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ExpertStack:
    """A layer's experts in one tensor per part: matrices [E, rows, columns], biases [E, rows]; None: they have none."""

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None
    up_bias: torch.Tensor | None
    gate_bias: torch.Tensor | None
    down_bias: torch.Tensor | None

    def of(self, experts: torch.Tensor) -> ExpertStack:
        """A stack of copies of these ``experts`` (whole numbers [N]), in their order."""
        return ExpertStack(
            up=self.up[experts],
            down=self.down[experts],
            gate=None if self.gate is None else self.gate[experts],
            up_bias=None if self.up_bias is None else self.up_bias[experts],
            gate_bias=None if self.gate_bias is None else self.gate_bias[experts],
            down_bias=None if self.down_bias is None else self.down_bias[experts],
        )


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A program whose tensors are copies on one device. ``stacks``: by MoE layer, where its experts are stacked.
    ``formats``: of the matrices that are in no stack.
    """

    program: Program
    stacks: dict[int, ExpertStack]
    pairs: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    formats: frozenset[Format] = frozenset()

    def refresh(self) -> None:
        """Copy every tensor anew, into the memory it has: what was captured with these addresses stays right."""
        for source, target in self.pairs:
            target.copy_(source)


def place(program: Program, device: torch.device) -> Placed:
    """``program`` on ``device``: a tensor that it names twice is there once, float experts that are alike stacked."""
    mover = _Mover(device)
    operations = tuple(mover.operation(operation) for operation in program.operations)
    return Placed(
        program=replace(program, operations=operations),
        stacks=mover.stacks,
        pairs=tuple(mover.pairs),
        formats=frozenset(mover.formats),
    )


def stackable(operation: Experts) -> bool:
    """Whether all experts are plain float matrices of one format and shape, with the same biases."""
    first = operation.experts[0].up
    alike = len({_kind(expert) for expert in operation.experts}) == 1
    return alike and first.layout == "plain" and first.format in _FLOATS


def _kind(expert: Expert) -> tuple[object, ...]:
    matrices = (expert.up, expert.down, expert.gate)
    biases = (expert.up_bias, expert.gate_bias, expert.down_bias)
    return (
        *(
            None if matrix is None else (matrix.format, matrix.layout, matrix.rows, matrix.columns)
            for matrix in matrices
        ),
        *(None if bias is None else (bias.dtype, bias.shape) for bias in biases),
    )


class _Mover:
    """Copies values to a device and remembers which tensor came from which."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[tuple[object, ...], torch.Tensor] = {}
        self.pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.stacks: dict[int, ExpertStack] = {}
        self.formats: set[Format] = set()

    def operation(self, operation: Operation) -> Operation:
        if isinstance(operation, Experts) and stackable(operation):
            return self._stacked(operation)
        return self._moved(operation)

    def _moved(self, value: T) -> T:
        """``value`` with every tensor inside copied."""
        if isinstance(value, Matrix):
            self.formats.add(value.format)
        moved: object = value
        if isinstance(value, torch.Tensor):
            moved = self._copied(value)
        elif isinstance(value, tuple):
            moved = tuple(self._moved(item) for item in value)
        elif is_dataclass(value) and not isinstance(value, type):
            moved = replace(value, **{f.name: self._moved(getattr(value, f.name)) for f in fields(value)})
        return cast(T, moved)

    def _copied(self, source: torch.Tensor) -> torch.Tensor:
        key = (source.data_ptr(), source.dtype, source.shape, source.stride())
        if key not in self._known or not source.numel():
            self._known[key] = source.to(self._device, copy=True)
            self.pairs.append((source, self._known[key]))
        return self._known[key]

    def _stacked(self, operation: Experts) -> Experts:
        experts = operation.experts
        ups = self._stack([expert.up.data for expert in experts])
        downs = self._stack([expert.down.data for expert in experts])
        gates = self._stack([None if expert.gate is None else expert.gate.data for expert in experts])
        biases = {
            name: self._stack([getattr(expert, name) for expert in experts])
            for name in ("up_bias", "gate_bias", "down_bias")
        }
        if ups is None or downs is None:
            raise ConfigError(f"MoE layer {operation.layer}: no experts")
        self.stacks[operation.layer] = ExpertStack(up=ups, down=downs, gate=gates, **biases)
        placed = tuple(
            Expert(
                up=replace(expert.up, data=ups[number]),
                down=replace(expert.down, data=downs[number]),
                gate=None if expert.gate is None or gates is None else replace(expert.gate, data=gates[number]),
                **{name: None if stack is None else stack[number] for name, stack in biases.items()},
            )
            for number, expert in enumerate(experts)
        )
        return replace(self._moved(replace(operation, experts=())), experts=placed)

    def _stack(self, parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        found = [part for part in parts if part is not None]
        if not found:
            return None
        stack = torch.empty(len(found), *found[0].shape, dtype=found[0].dtype, device=self._device)
        for source, target in zip(found, stack, strict=True):
            target.copy_(source)
            self.pairs.append((source, target))
        return stack
