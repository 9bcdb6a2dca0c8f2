"""Where the engine listens: module calls, gradients at a unit's outputs and inputs, and accumulated gradients.

ZeRO section 5.3 and 7.2.2. Invisible to torch.compile: each hook is a graph break it is told not to trace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from types import NoneType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree

from trivium.base.errors import ConfigError
from trivium.zero.engine import Engine
from trivium.zero.torch_private import backward_id, will_receive_gradient
from trivium.zero.unit import Unit


def install(engine: Engine) -> None:
    """Hook ``engine`` into its modules and parameters."""
    root = engine.units[0]
    for unit in engine.units:
        module, is_root = unit.module, unit is root
        before: Callable[..., None] = torch.compiler.disable(partial(_before, engine, unit, is_root))  # type: ignore[no-untyped-call]
        after: Callable[..., None] = torch.compiler.disable(partial(_after, engine, unit, is_root))  # type: ignore[no-untyped-call]
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=True)
        for flat in unit.flats:
            if flat.trainable:
                for index, param in enumerate(flat.params):
                    arrive = partial(_arrive, engine, unit, flat, index)
                    param.register_post_accumulate_grad_hook(torch.compiler.disable(arrive))  # type: ignore[no-untyped-call]

    homes = {id(param): unit for unit in engine.units for flat in unit.flats for param in flat.params}
    for module in root.module.modules():
        own = [homes[id(param)] for param in module._parameters.values() if param is not None]
        if own:
            module.register_state_dict_pre_hook(partial(_refuse_reading, own))  # type: ignore[no-untyped-call]
            module.register_load_state_dict_pre_hook(partial(_refuse_writing, own))  # type: ignore[no-untyped-call]


def _before(engine: Engine, unit: Unit, is_root: bool, module: nn.Module, args: Any, kwargs: Any) -> Any:
    if is_root:
        engine.begin_forward()
    unit.called = True
    engine.enter(unit)
    changed = None
    if is_root and engine.scale.value != 1.0 and torch.is_grad_enabled() and not engine.recomputing:
        args, kwargs = changed = _pytree.tree_map_only(
            torch.Tensor, lambda x: _unscaled(x, engine.scale.value) if x.requires_grad else x, (args, kwargs)
        )
    if torch.is_grad_enabled() and not engine.recomputing and unit.sharded:
        inputs = _differentiable((args, kwargs))
        if inputs:
            unit.pending_inputs += 1
            _AllDone(inputs, partial(engine.pass_inputs, unit))
    return changed


class _AllDone:
    """Runs ``then`` when the gradients of all of ``tensors`` that receive one in a backward pass are there.

    Like `torch.autograd.graph.register_multi_grad_hook`, but holds no node of the graph once backward has come by:
    a cycle of nodes and hooks would keep every step's graph until the garbage collector runs, in pieces all over the
    heap, which then grows by a tenth with each step.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], then: Callable[[], None]) -> None:
        self._then, self._number, self._left = then, len(tensors), 0
        self._nodes = [get_gradient_edge(tensor).node for tensor in tensors] if len(tensors) > 1 else []
        for tensor in tensors:
            tensor.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, gradient: torch.Tensor) -> None:
        if self._left == 0:
            self._left = sum(map(will_receive_gradient, self._nodes)) if self._nodes else self._number
            self._nodes.clear()
        self._left -= 1
        if self._left == 0:
            self._then()


class _FirstReached:
    """Runs ``then`` when the first gradient of any of ``tensors`` is there, once in a backward pass."""

    def __init__(self, tensors: Sequence[torch.Tensor], then: Callable[[], None]) -> None:
        self._then, self._pass = then, -1
        for tensor in tensors:
            tensor.register_hook(self)  # type: ignore[no-untyped-call]

    def __call__(self, gradient: torch.Tensor) -> None:
        if self._pass != backward_id():
            self._pass = backward_id()
            self._then()


class _Unscaled(torch.autograd.Function):
    """Passes a value into the model; its gradient leaves the model without the loss scale."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = scale
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.scale, None


def _unscaled(value: torch.Tensor, scale: float) -> torch.Tensor:
    passed: torch.Tensor = _Unscaled.apply(value, scale)  # type: ignore[no-untyped-call]
    return passed


def _after(engine: Engine, unit: Unit, is_root: bool, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
    hooked = True
    if torch.is_grad_enabled():
        outputs = _differentiable(output)
        hooked = bool(outputs) or not (unit.trainable or _differentiable((args, kwargs)))
        if outputs:
            _FirstReached(outputs, partial(engine.enter_backward, unit))
            if is_root and engine.scale.value != 1.0 and not engine.recomputing:
                for tensor in outputs:
                    tensor.register_hook(lambda grad: grad * engine.scale.value)  # type: ignore[no-untyped-call]
    engine.leave(unit, hooked=hooked)
    if is_root:
        engine.end_forward()


def _arrive(engine: Engine, unit: Unit, flat: Any, index: int, param: torch.Tensor) -> None:
    if not (unit.called or unit.whole):
        raise ConfigError(
            f"{flat.names[index]} was read, as NaN, while it was released: {unit.name} ({type(unit.module).__name__}) "
            "is a unit, gathered when it is called, and something read its parameters without ever calling it. Pass "
            "units= so that they belong to the module that reads them"
        )
    engine.arrive(unit, flat, index)


def _refuse_reading(units: Sequence[Unit], module: nn.Module, *args: Any) -> None:
    for unit in units:
        if not unit.whole:
            raise ConfigError(
                f"state_dict() of a model at stage 3: {unit.name or 'the root'} is sharded. Call it inside "
                "`with trivium.zero.gathered(model):`, or take trivium.zero.full_state_dict(model), which gathers one "
                "unit at a time"
            )


def _refuse_writing(units: Sequence[Unit], module: nn.Module, *args: Any) -> None:
    for unit in units:
        if not unit.pins and (unit.sharded or unit.has_master):
            raise ConfigError(
                f"load_state_dict() of a sharded model: {unit.name or 'the root'} is sharded or has an fp32 master "
                "that would not be changed. Call it on every rank inside `with trivium.zero.gathered(model):`"
            )


def _differentiable(value: Any) -> list[torch.Tensor]:
    """The tensors in a nest of containers, dataclasses and plain objects that gradients flow through."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    left = [value]
    while left:
        leaf = left.pop()
        if isinstance(leaf, torch.Tensor):
            if leaf.requires_grad:
                found.append(leaf)
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module | type | str | bytes | int | float | NoneType):
            seen.add(id(leaf))
            inside = _pytree.tree_leaves(leaf)
            left += inside if len(inside) != 1 or inside[0] is not leaf else getattr(leaf, "__dict__", {}).values()
    return found
