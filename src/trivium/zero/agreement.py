"""What all ranks must have alike before a model is cut: its shape, its values, its units, the optimizers over it.

ZeRO section 5 takes data parallelism's identical replicas for granted; here that is checked, before any payload:
dense parameters over all data-parallel ranks, experts over those that hold the same ones.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import torch
import xxhash
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from trivium.base.errors import ConfigError, MismatchError
from trivium.dist.comm import Comm
from trivium.dist.mesh import Mesh
from trivium.zero.placement import ZeroConfig
from trivium.zero.units import FlatKey, UnitSpec, axis_of

Group = tuple[str, tuple[int, ...]]
"""An axis, and the places among the data-parallel ranks of those that hold the same parameters along it."""


def check_model(model: nn.Module) -> None:
    """Raise ConfigError for parameters that cannot be cut, by name: of lazy modules, complex, with sparse gradients."""
    for name, param in model.named_parameters():
        if is_lazy(param):
            raise ConfigError(f"{name} has no shape yet (a lazy module): run the model once before shard")
        if param.is_complex():
            raise ConfigError(
                f"{name} is {param.dtype}: only real parameters can be sharded; keep torch.view_as_real of it and "
                "view it as complex in forward"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse and module.weight.requires_grad:
            raise ConfigError(
                f"{name or 'the model'} is {type(module).__name__}(sparse=True), whose gradient is sparse: a reduction "
                "adds dense ones; build it with sparse=False"
            )


def listed(optimizer: object) -> list[Optimizer]:
    """One optimizer, several or none as a list. Raises ConfigError for what is no torch.optim.Optimizer."""
    many: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
    many = [] if optimizer is None else many
    for one in many:
        if not isinstance(one, Optimizer):
            raise ConfigError(
                f"shard got {type(one).__name__} as an optimizer: expected a torch.optim.Optimizer, a list of them or "
                "None"
            )
    return many


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise ConfigError when an optimizer holds a parameter of another model, or one that another optimizer holds."""
    names = {id(param): name for name, param in model.named_parameters()}
    seen: set[int] = set()
    for one in optimizers:
        for group in one.param_groups:
            for param in group["params"]:
                if id(param) not in names:
                    raise ConfigError(
                        f"{type(one).__name__} holds a parameter of shape {tuple(param.shape)} that is not in the model"
                    )
                if id(param) in seen:
                    raise ConfigError(f"{names[id(param)]} is in two optimizers or groups: give each parameter to one")
                seen.add(id(param))


def agree_on_model(model: nn.Module, optimizers: Sequence[Optimizer], mesh: Mesh, config: ZeroConfig) -> list[Group]:
    """The same names, shapes and dtypes on all ranks that hold the same parameters, the same configuration and kinds of
    optimizers on all. Returns the groups of ranks that hold the same."""
    parameters = [
        [name, str(param.dtype), list(param.shape), param.requires_grad, axis_of(model, name)]
        for name, param in model.named_parameters()
    ]
    axes = {axis: list(mesh.comm(axis).ranks) for axis in sorted({"dp", *(str(row[4]) for row in parameters)})}
    comm = mesh.comm("dp")
    everyone = comm.all_gather_json({"axes": axes, "parameters": parameters})
    owner: dict[tuple[str, str], int] = {}
    groups = _groups(comm, everyone)
    for axis, members in groups:
        lists = [[row for row in everyone[place]["parameters"] if row[4] == axis] for place in members]
        what = "the model's parameter" if axis == "dp" else f"the parameter (reduced over {axis}, not dp)"
        _require_same_rows([comm.ranks[place] for place in members], lists, what)
        for name, *_ in lists[0]:
            other = owner.setdefault((axis, name), comm.ranks[members[0]])
            if other != comm.ranks[members[0]]:
                raise MismatchError(
                    f"{name} is reduced over {axis}, but ranks {other} and {comm.ranks[members[0]]}, which are in "
                    "different groups of that axis, both have it: name experts by their global number"
                )
    comm.require_equal(repr(config), "the [zero] configuration")
    comm.require_equal([type(one).__name__ for one in optimizers], "the list of optimizers")
    return groups


def _groups(comm: Comm, everyone: Sequence[dict[str, Any]]) -> list[Group]:
    found: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for place, told in enumerate(everyone):
        for axis, group in told["axes"].items():
            found.setdefault((axis, tuple(group)), []).append(place)
    for (axis, ranks), places in found.items():
        present = [comm.ranks[place] for place in places]
        if sorted(ranks) != sorted(present):
            name = next((row[0] for row in everyone[places[0]]["parameters"] if row[4] == axis), "nothing")
            raise MismatchError(
                f"{name} is reduced over axis {axis} by ranks {list(ranks)}, but of the data-parallel ranks only "
                f"{present} have such parameters: build the same model, with the same ep of each layer, on every rank"
            )
    return [(axis, tuple(map(comm.ranks.index, ranks))) for axis, ranks in found]


def _require_same_rows(ranks: Sequence[int], lists: Sequence[list[Any]], what: str) -> None:
    for rank, rows in zip(ranks, lists, strict=True):
        for mine, theirs in zip(lists[0], rows, strict=False):
            if mine != theirs:
                raise MismatchError(
                    f"{what} differs across ranks: rank {ranks[0]} has {mine!r}, rank {rank} has {theirs!r}"
                )
        if len(rows) != len(lists[0]):
            raise MismatchError(
                f"the number of parameters differs across ranks: rank {ranks[0]} has {len(lists[0])}, "
                f"rank {rank} has {len(rows)}; {_first_extra(lists[0], rows)}"
            )


def _first_extra(one: list[Any], other: list[Any]) -> str:
    longer = max(one, other, key=len)
    return f"the first that only one has is {longer[min(len(one), len(other))][0]}"


def agree_on_units(specs: Sequence[UnitSpec], mesh: Mesh, groups: Sequence[Group]) -> list[dict[FlatKey, int]]:
    """The same modules gathered together everywhere, and the same parameters under each optimizer where ranks hold the
    same ones.

    Returns, for each unit, the flats that any rank has, in one order on all, each with the most parameters that a rank
    has in it. A rank that has no such parameters has the flat all the same, empty.
    """
    comm = mesh.comm("dp")
    keys = [{_key_text(key): key for key in spec.flats} for spec in specs]
    described = [
        [spec.name, [[text, len(spec.flats[key]), _number(spec.flats[key])] for text, key in by_text.items()]]
        for spec, by_text in zip(specs, keys, strict=True)
    ]
    everyone = comm.all_gather_json(described)
    lists = [[name for name, _ in told] for told in everyone]
    for place in range(max(map(len, lists))):
        if len({names[place] if place < len(names) else None for names in lists}) > 1:
            mine = specs[place] if place < len(specs) else None
            inside = None if mine is None else [mine.name, *(name for names in mine.flats.values() for name in names)]
            comm.require_equal(inside, f"unit {place} (a module and its parameters, gathered together)")
    table = []
    for number, spec in enumerate(specs):
        by_rank = [{text: (count, crc) for text, count, crc in told[number][1]} for told in everyone]
        texts = dict.fromkeys(text for flats in by_rank for text in flats)
        for text in texts:
            for axis, members in groups:
                if axis == json.loads(text)[0] and len({by_rank[place].get(text) for place in members}) > 1:
                    here = [names for key, names in spec.flats.items() if _key_text(key) == text]
                    raise MismatchError(
                        f"the unit {spec.name or 'the root'} has different parameters under an optimizer on ranks "
                        f"{[comm.ranks[place] for place in members]} (axis, dtype, device, trained, optimizer, cut: "
                        f"{text}); here {here}"
                    )
        table.append(
            {
                keys[number].get(text) or _key_of(text, mesh): max(flats.get(text, (0, 0))[0] for flats in by_rank)
                for text in texts
            }
        )
    return table


def _key_text(key: FlatKey) -> str:
    """What of a key must be alike on all ranks, as JSON."""
    dtype = str(key.dtype).removeprefix("torch.")
    return json.dumps([key.axis, dtype, key.device.type, key.trainable, key.optimizer, key.cut])


def _key_of(text: str, mesh: Mesh) -> FlatKey:
    axis, dtype, _, trainable, optimizer, cut = json.loads(text)
    return FlatKey(getattr(torch, dtype), mesh.device, trainable, optimizer, cut, axis)


def _number(names: Sequence[str]) -> int:
    return zlib.crc32("\n".join(names).encode())


def agree_on_values(model: nn.Module, mesh: Mesh) -> None:
    """The same bits in every parameter on all data-parallel ranks that hold it; meta parameters get theirs later."""
    comm = mesh.comm("dp")
    if comm.size == 1:
        return
    mine = {name: _fingerprint(param) for name, param in model.named_parameters() if not param.is_meta}
    first: dict[str, tuple[int, int]] = {}
    for rank, fingerprints in zip(comm.ranks, comm.all_gather_json(mine), strict=True):
        for name, fingerprint in fingerprints.items():
            known, other = first.setdefault(name, (fingerprint, rank))
            if known != fingerprint:
                raise MismatchError(
                    f"{name} has other values on rank {rank} than on rank {other}: build the model "
                    "from the same seed or checkpoint on every rank, or on the meta device"
                )


def _fingerprint(parameter: torch.Tensor) -> int:
    data = parameter.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data)
