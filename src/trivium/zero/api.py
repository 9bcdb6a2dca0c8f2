"""Shard a model and its optimizer over the data-parallel ranks: `shard`, and what one does with the result.

ZeRO section 5 (ZeRO-DP), stages 0 to 3, for any nn.Module.

Communication plan, per micro-batch and Ψ parameters: stages 0 to 2 send 2Ψ(N-1)/N elements per rank, stage 3 sends
3Ψ(N-1)/N;
gathers are prefetched, reductions overlap the rest of backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Entry, Piece, attach_shard_map, require_together, shard_map_of
from trivium.memory.meter import Meter
from trivium.memory.pages import recycled_pages
from trivium.zero.agreement import (
    agree_on_model,
    agree_on_units,
    agree_on_values,
    check_model,
    check_optimizers,
    listed,
)
from trivium.zero.engine import Engine
from trivium.zero.flat import Comms, Flat
from trivium.zero.hooks import install
from trivium.zero.materialize import Init, fill_buffers, fill_flat, replace_meta
from trivium.zero.optimizer import ZeroOptimizer, cut_of, take_segments
from trivium.zero.placement import Cut, ZeroConfig, lay_out
from trivium.zero.scale import LossScale
from trivium.zero.unit import Unit
from trivium.zero.units import FlatKey, Units, UnitSpec, assign, shared_units
from trivium.zero.usage import Places
from trivium.zero.whole import ZeroMap, engine_of, full_state_dict, gathered, iter_full

__all__ = ["engine_of", "full_state_dict", "gathered", "iter_full", "meter_of", "no_sync", "shard"]


@overload
def shard(
    model: nn.Module,
    optimizer: Sequence[Optimizer],
    mesh: Mesh,
    *,
    units: Units = ...,
    init: Init | None = ...,
    elementwise: bool = ...,
    seed: int = ...,
    config: ZeroConfig | None = ...,
    **options: Any,
) -> tuple[nn.Module, list[ZeroOptimizer]]: ...
@overload
def shard(
    model: nn.Module,
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    units: Units = ...,
    init: Init | None = ...,
    elementwise: bool = ...,
    seed: int = ...,
    config: ZeroConfig | None = ...,
    **options: Any,
) -> tuple[nn.Module, ZeroOptimizer]: ...
@overload
def shard(
    model: nn.Module,
    optimizer: None,
    mesh: Mesh,
    *,
    units: Units = ...,
    init: Init | None = ...,
    elementwise: bool = ...,
    seed: int = ...,
    config: ZeroConfig | None = ...,
    **options: Any,
) -> tuple[nn.Module, None]: ...
def shard(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    mesh: Mesh,
    *,
    units: Units = "auto",
    init: Init | None = None,
    elementwise: bool = False,
    seed: int = 0,
    config: ZeroConfig | None = None,
    **options: Any,
) -> tuple[nn.Module, ZeroOptimizer | list[ZeroOptimizer] | None]:
    """Cut ``model``'s states over the ranks of ``mesh``'s data axis; every rank must call it with the same model.

    Parameters inside a module with a `trivium.dist.shard.Placement` (experts) are cut over the ranks of its axis, which
    hold the same ones; the other ranks have others, under other names.

    Returns the same module object and the optimizer over this rank's segments (a list for a list, None for None).
    ``units``: which modules are gathered together: ``"auto"`` (elements of the outermost lists of layers, large
    embeddings and
    projections), a list of modules, or a predicate ``(name, module) -> bool``.
    ``init``: ``init(name, tensor)`` fills a parameter or buffer that is on the meta device; None: the modules' own
    ``reset_parameters``, seeded by (``seed``, name), so the values do not depend on the number of ranks.
    ``elementwise``: promise that an optimizer class unknown to torch updates each element on its own.
    ``options`` are the fields of `ZeroConfig`: stage, bucket_bytes, shard_size, keep_gathered, …
    Raises ConfigError, and MismatchError when the ranks' models differ.
    """
    config = _configure(config, options)
    if shard_map_of(model) is not None:
        raise ConfigError("this model is sharded already: shard a module once")
    require_together(model, "shard")
    optimizers = listed(optimizer)
    check_model(model)
    check_optimizers(model, optimizers)
    data = mesh.comm("dp")
    control = mesh.channel(data, "control")
    control.agree([], "shard", f"shard of {type(model).__name__}")
    groups = agree_on_model(model, optimizers, mesh, config)
    owner: dict[int, tuple[int, Cut]] = {}
    for number, one in enumerate(optimizers):
        cut = cut_of(one, elementwise)
        for group in one.param_groups:
            owner.update((id(param), (number, cut)) for param in group["params"])
    specs = assign(model, units, owner)
    table = agree_on_units(specs, mesh, groups)
    agree_on_values(model, mesh)
    meter = Meter()
    replaced = replace_meta(model, mesh.device)
    fill_buffers(model, mesh.device, init, seed)
    built = _build(model, specs, table, mesh, config, meter, init, seed, replaced)
    scale = _loss_scale(config, built)
    engine = Engine(built, data, control, config, meter, scale, _places(built, table, data))
    for number, one in enumerate(optimizers):
        take_segments(one, [flat for flat in engine.flats if flat.optimizer == number], replaced)
    install(engine)
    _attach(model, engine)
    wrapped = [ZeroOptimizer(one, number, engine) for number, one in enumerate(optimizers)]
    return model, None if optimizer is None else wrapped[0] if isinstance(optimizer, Optimizer) else wrapped


@contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside add up on this rank only; the first one outside reduces the sum. Holds whole gradients
    meanwhile."""
    engine = engine_of(model)
    before, engine.syncs = engine.syncs, False
    try:
        yield
    finally:
        engine.syncs = before


def meter_of(module: nn.Module) -> Meter:
    """Bytes held for a sharded module on this rank, by category."""
    return engine_of(module).meter


def _configure(config: ZeroConfig | None, options: dict[str, Any]) -> ZeroConfig:
    allowed = ZeroConfig.__dataclass_fields__
    for name in options:
        if name not in allowed:
            raise ConfigError(f"shard got an unknown option {name!r}: expected one of {', '.join(allowed)}")
    made = replace(config or ZeroConfig(), **options)
    if made.keep_gathered and not made.row.parameter:
        log.get().warning("zero.keep_gathered has no effect at stage %d: parameters are always whole", made.stage)
    return made


def _build(
    model: nn.Module,
    specs: Sequence[UnitSpec],
    table: Sequence[Mapping[FlatKey, int]],
    mesh: Mesh,
    config: ZeroConfig,
    meter: Meter,
    init: Init | None,
    seed: int,
    replaced: dict[int, nn.Parameter],
) -> list[Unit]:
    parameters = dict(model.named_parameters())
    keep = shared_units(model, specs)
    pages = recycled_pages(mesh.device)
    units = []
    for number, (spec, keys) in enumerate(zip(specs, table, strict=True)):
        flats = []
        for key in keys:
            comms, names = _comms(mesh, key.axis, config), spec.flats.get(key, [])
            params = [parameters[name] for name in names]
            if params and params[0].device.type != mesh.device.type:
                raise ConfigError(
                    f"{names[0]} is on {params[0].device}, the mesh on {mesh.device}: call model.to(mesh.device) first"
                )
            layout = lay_out(
                [p.numel() for p in params], comms.inside.size, key.dtype.itemsize, key.cut, comms.across.size
            )
            device = params[0].device if params else mesh.device
            flat = Flat(key, params, names, layout, config.row, comms, device, meter, pages)
            fill_flat(model, flat, init, seed, replaced)
            flats.append(flat)
        units.append(Unit(number, spec.name, spec.module, flats, spec.name in keep))
    return units


def _places(units: Sequence[Unit], table: Sequence[Mapping[FlatKey, int]], data: Comm) -> Places:
    flats = [flat for unit in units for flat in unit.flats if flat.trainable]
    counts = [count for keys in table for key, count in keys.items() if key.trainable]
    return Places(counts, [tuple(map(data.ranks.index, flat.comms.world.ranks)) for flat in flats])


def _comms(mesh: Mesh, axis: str, config: ZeroConfig) -> Comms:
    world = mesh.comm(axis)
    inside, across = mesh.split(axis, min(config.shard_size or world.size, world.size))
    return Comms(world=world, inside=mesh.channel(inside, "gather"), across=across)


def _loss_scale(config: ZeroConfig, units: Sequence[Unit]) -> LossScale:
    half = any(flat.dtype is torch.float16 and flat.trainable for unit in units for flat in unit.flats)
    if config.loss_scale == "dynamic" or (config.loss_scale == "auto" and half):
        return LossScale(value=2.0**16, dynamic=True)
    return LossScale(value=1.0 if config.loss_scale == "auto" else float(config.loss_scale))


def _attach(model: nn.Module, engine: Engine) -> None:
    """Give every module inside the map of its own parameters, under the names they have from there."""
    pieces: dict[int, tuple[Flat, Piece | None]] = {}
    for flat in engine.flats:
        for index, param in enumerate(flat.params):
            pieces[id(param)] = (flat, _piece(flat, index))
    publish = _publisher(engine)
    for module in model.modules():
        entries: dict[str, Entry] = {}
        by_id: dict[int, Entry] = {}
        for name, param in module.named_parameters(remove_duplicate=False):
            if id(param) in by_id:
                by_id[id(param)].names = (*by_id[id(param)].names, name)
                continue
            flat, piece = pieces[id(param)]
            entry = Entry(
                names=(name,),
                shape=param.shape,
                dtype=param.dtype,
                piece=piece,
                writes=flat.comms.across.rank == 0 and (flat.row.optimizer or flat.comm.rank == 0),
            )
            by_id[id(param)] = entries[name] = entry
        attach_shard_map(module, ZeroMap(entries=entries, publish=publish, engine=engine))


def _piece(flat: Flat, index: int) -> Piece | None:
    """What this rank holds of one parameter's most precise copy: its segment, all of it where the optimizer is
    replicated."""
    segment = flat.segments[index]
    if segment is None:
        return None
    if not flat.row.optimizer:
        return Piece(start=0, tensor=segment)
    overlap = flat.layout.overlap(index, flat.comm.rank)
    return None if overlap is None else Piece(start=overlap.start, tensor=segment)


def _publisher(engine: Engine) -> Callable[[], None]:
    @torch.no_grad()
    def publish() -> None:
        engine.release(keep=False)
        for flat in engine.flats:
            handle = flat.start_publish()
            if handle is not None:
                handle.wait()

    return publish
