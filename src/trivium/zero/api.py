"""Shard a model and its optimizer over the data-parallel ranks: `shard`, and what one does with the result.

ZeRO section 5 (ZeRO-DP), stages 0 to 3, for any nn.Module.

Communication plan, per micro-batch and Ψ parameters: stages 0 to 2 send 2Ψ(N-1)/N elements per rank, stage 3 sends
3Ψ(N-1)/N;
gathers are prefetched, reductions overlap the rest of backward.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.base import log
from trivium.base.errors import ConfigError, MismatchError
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Entry, Piece, ShardMap, attach_shard_map, shard_map_of
from trivium.memory.meter import Meter
from trivium.memory.pages import recycled_pages
from trivium.zero.agreement import agree_on_model, agree_on_units, agree_on_values, check_optimizers
from trivium.zero.conductor import Meeting
from trivium.zero.engine import Engine
from trivium.zero.flat import Comms, Flat
from trivium.zero.hooks import install
from trivium.zero.materialize import Init, fill_buffers, fill_flat, replace_meta
from trivium.zero.optimizer import ZeroOptimizer, cut_of, take_segments
from trivium.zero.placement import Cut, ZeroConfig, lay_out
from trivium.zero.scale import LossScale
from trivium.zero.unit import Unit
from trivium.zero.units import Units, UnitSpec, assign, names_by_identity, shared_units


@dataclass(kw_only=True)
class ZeroMap(ShardMap):
    """The shard map of a module that `shard` cut, with the engine behind it."""

    engine: Engine


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
    optimizers = [] if optimizer is None else [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    check_optimizers(model, optimizers)
    agree_on_model(model, optimizers, mesh, config)
    owner: dict[int, tuple[int, Cut]] = {}
    for number, one in enumerate(optimizers):
        cut = cut_of(one, elementwise)
        for group in one.param_groups:
            owner.update((id(param), (number, cut)) for param in group["params"])
    specs = assign(model, units, owner)
    agree_on_units(specs, mesh)
    agree_on_values(model, specs, mesh)
    meter = Meter()
    replaced = replace_meta(model, mesh.device)
    fill_buffers(model, mesh.device, init, seed)
    built = _build(model, specs, mesh, config, meter, init, seed, replaced)
    scale = _loss_scale(config, built)
    engine = Engine(built, mesh.channel(mesh.comm("dp"), "control"), config, meter, scale)
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


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """A module's parameters whole, at any stage: readable, and writable if every rank writes the same. Collective."""
    engine = engine_of(module)
    mine = {id(param) for param in module.parameters()}
    units = [unit for unit in engine.units if any(id(param) in mine for flat in unit.flats for param in flat.params)]
    with _visited(engine, units):
        yield
        with torch.no_grad():
            for unit in units:
                for flat in unit.flats:
                    flat.absorb()


def iter_full(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical name and whole value of every parameter, one unit gathered at a time, then buffers. Collective.

    The tensor is a view that is valid until the next one is asked for. Order is by unit.
    """
    engine = engine_of(model)
    names = {id(param): name for name, param in model.named_parameters()}
    for unit in engine.units:
        inside = [(names[id(param)], param) for flat in unit.flats for param in flat.params if id(param) in names]
        if inside:
            with _visited(engine, [unit]):
                for name, param in inside:
                    yield name, param.detach()
    yield from model.named_buffers()


def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """On rank 0 exactly the bare module's ``state_dict`` (tied names twice, buffers too) as host tensors; elsewhere {}.

    Collective; gathers one unit at a time.
    """
    engine = engine_of(model)
    first = engine.control.rank == 0
    values: dict[str, Any] = {name: tensor.cpu().clone() for name, tensor in iter_full(model) if first}
    if not first:
        return {}
    for canonical, names in names_by_identity(model).items():
        values.update((name, values[canonical]) for name in names)
    values.update((name, buffer.cpu().clone()) for name, buffer in model.named_buffers(remove_duplicate=False))
    return {key: values[key] if extra is None else extra() for key, extra in _state_keys(model)}


def engine_of(module: nn.Module) -> Engine:
    """The engine of a sharded module or of a module inside one."""
    found = shard_map_of(module)
    if not isinstance(found, ZeroMap):
        raise ConfigError(f"this {type(module).__name__} is not sharded: call trivium.zero.shard first")
    return found.engine


def meter_of(module: nn.Module) -> Meter:
    """Bytes held for a sharded module on this rank, by category."""
    return engine_of(module).meter


@contextmanager
def _visited(engine: Engine, units: Sequence[Unit]) -> Iterator[None]:
    """Hold ``units`` gathered and pinned inside the block."""
    wanted = zlib.crc32(repr([unit.number for unit in units]).encode())
    for rank, row in enumerate(engine.conductor.meet(Meeting.VISIT, [wanted])):
        if row[1] != wanted:
            raise MismatchError(
                f"ranks gather different modules: rank {engine.control.ranks[rank]} others than rank "
                f"{engine.control.ranks[engine.control.rank]}, which gathers {[unit.name or 'root' for unit in units]}"
            )
    held = [unit.held for unit in units]
    for unit in units:
        unit.pins += 1
        if not unit.whole:
            unit.start_gather("visit")
            unit.finish_gather()
    try:
        yield
    finally:
        for unit, was_held in zip(units, held, strict=True):
            unit.pins -= 1
            if not was_held:
                unit.release()


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
    for number, spec in enumerate(specs):
        flats = []
        for key, names in spec.flats.items():
            comms = _comms(mesh, key.axis, config)
            params = [parameters[name] for name in names]
            if params[0].device.type != mesh.device.type:
                raise ConfigError(
                    f"{names[0]} is on {params[0].device}, the mesh on {mesh.device}: call model.to(mesh.device) first"
                )
            layout = lay_out(
                [p.numel() for p in params], comms.inside.size, key.dtype.itemsize, key.cut, comms.across.size
            )
            flat = Flat(params, names, layout, config.row, comms, key.optimizer, key.cut == "parameter", meter, pages)
            fill_flat(model, flat, init, seed, replaced)
            flats.append(flat)
        units.append(Unit(number, spec.name, spec.module, flats, spec.name in keep))
    return units


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


def _state_keys(model: nn.Module) -> Iterator[tuple[str, Callable[[], Any] | None]]:
    """The keys of the bare module's ``state_dict``; what gives a module's extra state comes with its key."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        dot = f"{prefix}." if prefix else ""
        for name, param in module._parameters.items():
            if param is not None:
                yield dot + name, None
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield dot + name, None
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield dot + "_extra_state", module.get_extra_state
