"""What of a model and its optimizers this rank keeps: parameters, their states, buffers and groups, by name.

ZeRO section 5.1: optimizer states are cut exactly like the parameters they belong to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from trivium.base.errors import CheckpointError
from trivium.checkpoint import strict_json
from trivium.dist.shard import Entry, ShardMap, shard_map_of, whole_map

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """This rank's view. ``module_states`` are the modules that keep an extra state of their own."""

    entries: dict[str, Entry]
    publish: Callable[[], None]
    buffers: dict[str, torch.Tensor]
    module_states: dict[str, nn.Module]
    optimizers: tuple[torch.optim.Optimizer, ...]
    places: dict[str, tuple[int, int]]

    def state_of(self, entry: Entry) -> dict[str, Any]:
        """The optimizer's state of this rank's piece of ``entry``; empty when there is none."""
        place = self.places.get(entry.name)
        if place is None or entry.piece is None:
            return {}
        states = self.optimizers[place[0]].state
        return dict(states[entry.piece.tensor]) if entry.piece.tensor in states else {}


def layout_of(model: nn.Module, optimizer: Optimizers, *, rank: int) -> Layout:
    """The layout of ``model``, sharded or not, and its optimizers. Rank 0 writes what is not sharded."""
    if optimizer is None:
        optimizers: tuple[torch.optim.Optimizer, ...] = ()
    else:
        optimizers = (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else tuple(optimizer)
    shard_map = map_of(model, writes=rank == 0)
    _check_readable(shard_map)
    return Layout(
        entries=shard_map.entries,
        publish=shard_map.publish,
        buffers=_buffers(model),
        module_states={
            plain(name): module
            for name, module in model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        },
        optimizers=optimizers,
        places=_places(shard_map, optimizers),
    )


def plain(name: str) -> str:
    """``name`` without the wrappers that torch.compile and activation checkpointing put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def map_of(model: nn.Module, *, writes: bool) -> ShardMap:
    """The shard map of ``model``; where only parts of it are sharded, theirs and the rest whole, in one."""
    found = shard_map_of(model)
    if found is not None:
        return _plain_map(found.entries.values(), [found.publish])
    parts = [(prefix, part) for prefix, module in model.named_modules() if (part := shard_map_of(module)) is not None]
    if not parts:
        return _plain_map(whole_map(model, writes=writes).entries.values(), [])
    entries: list[Entry] = []
    covered: set[str] = set()
    for prefix, part in parts:
        for entry in part.entries.values():
            names = tuple(f"{prefix}.{name}" for name in entry.names)
            if not covered.isdisjoint(names):
                continue
            covered.update(names)
            entries.append(replace(entry, names=names))
    for entry in whole_map(model, writes=writes).entries.values():
        if covered.isdisjoint(entry.names):
            entries.append(entry)
    order = {name: i for i, (name, _) in enumerate(model.named_parameters(remove_duplicate=False))}
    entries.sort(key=lambda entry: order.get(entry.name, len(order)))
    return _plain_map(entries, [part.publish for _, part in parts])


def _plain_map(entries: Any, publishers: list[Callable[[], None]]) -> ShardMap:
    renamed = [replace(entry, names=tuple(dict.fromkeys(plain(name) for name in entry.names))) for entry in entries]

    def publish() -> None:
        for one in publishers:
            one()

    return ShardMap(entries={entry.name: entry for entry in renamed}, publish=publish)


def _check_readable(shard_map: ShardMap) -> None:
    for entry in shard_map.entries.values():
        tensor = None if entry.piece is None else entry.piece.tensor
        if tensor is None:
            continue
        if tensor.device.type == "meta":
            raise CheckpointError(
                f"parameter {entry.name} is on the meta device: materialise the model first "
                "(zero.shard does, or model.to_empty)"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"parameter {entry.name} is released (its shards belong to a larger module): pass the module "
                "that was given to zero.shard"
            )


def _buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The persistent buffers by name, each tensor once."""
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is None or name in module._non_persistent_buffers_set or id(buffer) in seen:
                continue
            seen.add(id(buffer))
            found[plain(f"{prefix}.{name}" if prefix else name)] = buffer
    return found


def _places(shard_map: ShardMap, optimizers: tuple[torch.optim.Optimizer, ...]) -> dict[str, tuple[int, int]]:
    """(optimizer, group) of each parameter that this rank holds a piece of and that is in a group."""
    owners: dict[int, tuple[int, int]] = {}
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            for tensor in group["params"]:
                owners[id(tensor)] = (i, j)
    return {
        entry.name: owners[id(entry.piece.tensor)]
        for entry in shard_map.entries.values()
        if entry.piece is not None and id(entry.piece.tensor) in owners
    }


def hyper_parameters(optimizers: tuple[torch.optim.Optimizer, ...]) -> list[list[dict[str, Any]]]:
    """Every group without its parameters, encoded as JSON."""
    return [
        [
            {
                key: strict_json.encode(value, f"param_groups[{j}][{key!r}] of {type(optimizer).__name__}")
                for key, value in group.items()
                if key not in ("params", "param_names")
            }
            for j, group in enumerate(optimizer.param_groups)
        ]
        for i, optimizer in enumerate(optimizers)
    ]


def split_states(entry: Entry, states: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Each state as (name, kind, value), of the kinds of `manifest.StateRecord`."""
    if entry.piece is None:
        return
    tensor = entry.piece.tensor
    for name, value in states.items():
        where = f"optimizer state {name!r} of parameter {entry.name}"
        if "/" in name or "\0" in name:
            raise CheckpointError(f"{where}: the name of a state may not hold '/' or NUL")
        if not isinstance(value, torch.Tensor) or value.dim() == 0:
            yield name, "value", strict_json.encode(value, where)
        elif value.numel() == tensor.numel():
            yield name, "range", value
        elif tensor.shape == entry.shape:
            yield name, "whole", value
        else:
            raise CheckpointError(
                f"{where} has {value.numel()} elements, its piece {tensor.numel()}: it cannot be cut. "
                "Shard this optimizer by whole parameter"
            )
