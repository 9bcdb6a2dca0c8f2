"""Where the engine listens: module calls, gradients at a unit's outputs and inputs, and accumulated gradients.

ZeRO section 5.3 and 7.2.2. Invisible to torch.compile: each hook is a graph break it is told not to trace.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook
from torch.utils import _pytree

from trivium.zero.engine import Engine
from trivium.zero.unit import Unit


def install(engine: Engine) -> None:
    """Hook ``engine`` into its modules and parameters."""
    root = engine.units[0]
    for unit in engine.units:
        module, is_root = unit.module, unit is root
        before: Callable[..., None] = torch.compiler.disable(partial(_before, engine, unit, is_root))  # type: ignore[no-untyped-call]
        after: Callable[..., None] = torch.compiler.disable(partial(_after, engine, unit, is_root))  # type: ignore[no-untyped-call]
        module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
        module.register_forward_hook(after, with_kwargs=False)
        for flat in unit.flats:
            if flat.trainable:
                for index, param in enumerate(flat.params):
                    arrive = partial(_arrive, engine, unit, flat, index)
                    param.register_post_accumulate_grad_hook(torch.compiler.disable(arrive))  # type: ignore[no-untyped-call]


def _before(engine: Engine, unit: Unit, is_root: bool, module: nn.Module, args: Any, kwargs: Any) -> None:
    if is_root:
        engine.begin_forward()
    engine.enter(unit)
    if torch.is_grad_enabled() and not engine.recomputing and unit.sharded:
        inputs = _differentiable((args, kwargs))
        if inputs:
            unit.pending_inputs += 1
            register_multi_grad_hook(inputs, lambda grads: engine.pass_inputs(unit))


def _after(engine: Engine, unit: Unit, is_root: bool, module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled():
        outputs = _differentiable(output)
        if outputs:
            register_multi_grad_hook(outputs, lambda grad: engine.enter_backward(unit), mode="any")
            if is_root and engine.scale.value != 1.0 and not engine.recomputing:
                for tensor in outputs:
                    tensor.register_hook(lambda grad: grad * engine.scale.value)  # type: ignore[no-untyped-call]
    engine.leave(unit)
    if is_root:
        engine.end_forward()


def _arrive(engine: Engine, unit: Unit, flat: Any, index: int, param: torch.Tensor) -> None:
    engine.arrive(unit, flat, index)


def _differentiable(value: Any) -> list[torch.Tensor]:
    """The tensors in a nest of containers that gradients flow through."""
    leaves = _pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
