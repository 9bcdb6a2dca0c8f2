"""``trivium plan``: what a run would take in bytes and traffic, before it is run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trivium.base import log
from trivium.base.errors import CapacityError, ConfigError
from trivium.base.units import format_bytes, format_count, parse_bytes
from trivium.cli.interrupts import load_torch
from trivium.cli.output import data_console, print_json, word_console

if TYPE_CHECKING:
    from rich.table import Table

    from trivium.models import DecoderConfig
    from trivium.plan.forecast import Plan, Setting
    from trivium.plan.inventory import Inventory

_NARROW = 64
"""Columns of the screen below which tables are drawn without lines."""
_ROWS = (
    ("parameters", "parameters"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("states", "= model states"),
    ("gathered", "gathered, peak"),
    ("buffers", "buffers"),
    ("sums", "running sums"),
    ("local_gradients", "own gradients"),
    ("activations", "activations"),
    ("total", "= peak"),
)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("plan", help="Say what a run would take in bytes and traffic before running it.")(plan)


def plan(
    config: Annotated[Path | None, typer.Argument(help="A training configuration, CONFIG.toml.")] = None,
    preset: Annotated[str | None, typer.Option(help="A named shape instead: 1m … 7.5b … 1t.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    stage: Annotated[int | None, typer.Option(help="ZeRO stage 0 to 3; default: the config's, or all.")] = None,
    memory: Annotated[str | None, typer.Option(help="Per rank, such as 80GB; exit 4 if it does not fit.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences per rank and micro-batch.")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches per step.")] = None,
    ep: Annotated[int | None, typer.Option(help="Ranks that share the experts of a layer.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Checkpoint the blocks' activations.")] = False,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of CONFIG, zero.bucket_bytes=1048576.")
    ] = None,
    paper: Annotated[bool, typer.Option("--paper", help="Print the paper's Tables 1 and 2 from its formulas.")] = False,
    serve: Annotated[str | None, typer.Option(help="Plan to serve a model's folder within --memory instead.")] = None,
    quantize: Annotated[str | None, typer.Option(help="With --serve: int8 or int4 weights.")] = None,
    cache_dtype: Annotated[str, typer.Option(help="With --serve: auto, float32, bfloat16 or int8.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Forecast memory and traffic per rank from the runtime's own arithmetic. Nothing is allocated or run."""
    log.setup()
    given = _Given(ranks, stage, dtype, micro_batch, sequence, accumulation, recompute, ep)
    packed = {"quantize": quantize, "cache_dtype": None if cache_dtype == "auto" else cache_dtype}
    if paper:
        _refuse_idle("--paper", CONFIG=config, preset=preset, memory=memory, serve=serve, **given._asdict(), **packed)
        _paper(as_json)
        return
    if serve is not None:
        if config is not None or preset is not None:
            raise ConfigError("--serve MODEL plans to serve that model: leave CONFIG and --preset out")
        _refuse_idle("--serve", set=overrides or None, **given._replace(dtype=None, sequence=None)._asdict())
        load_torch()
        from trivium.cli.plan_serving import plan_serving

        plan_serving(
            serve, memory=memory, dtype=dtype, quantize=quantize, cache_dtype=cache_dtype,
            max_positions=sequence, as_json=as_json,
        )  # fmt: skip
        return
    if (config is None) == (preset is None):
        raise ConfigError("say what to plan: CONFIG.toml, or --preset NAME, or --paper, or --serve MODEL")
    if preset is not None and overrides:
        raise ConfigError("--set overrides keys of CONFIG.toml: it has no effect with --preset")
    _refuse_idle("a training plan, only with --serve", **packed)
    limit = None if memory is None else parse_bytes(memory)
    load_torch()
    if config is None:
        shape, setting = _of_preset(preset or "", given)
    else:
        from trivium.plan.configured import read

        shape, setting = read(config, (*(overrides or ()), *given.as_overrides()), ranks=1 if ranks is None else ranks)
    _check(shape, setting)
    every = preset is not None and stage is None
    _show(preset or str(config), shape, setting, limit, every=every, binding=config is not None, as_json=as_json)


def _refuse_idle(where: str, **options: object) -> None:
    """Raise ConfigError, naming them, when options were given that change nothing."""
    named = (name if name.isupper() else f"--{name.replace('_', '-')}" for name in options)
    idle = [
        name for name, value in zip(named, options.values(), strict=True) if value is not None and value is not False
    ]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: no effect with {where}; leave out what has none")


class _Given(NamedTuple):
    """What the command line says about the run; None: nothing."""

    ranks: int | None
    stage: int | None
    dtype: str | None
    micro_batch: int | None
    sequence: int | None
    accumulation: int | None
    recompute: bool
    ep: int | None

    def as_overrides(self) -> list[str]:
        """The same as keys of a configuration, which checks them."""
        keys: tuple[tuple[str, int | str | None], ...] = (
            ("zero.stage", self.stage),
            ("model.dtype", None if self.dtype is None else f'"{self.dtype}"'),
            ("train.micro_batch", self.micro_batch),
            ("data.sequence", self.sequence),
            ("train.accumulation", self.accumulation),
            ("train.recompute", "true" if self.recompute else None),
            ("mesh.ep", self.ep),
        )
        return [f"{key}={value}" for key, value in keys if value is not None]


def _of_preset(name: str, given: _Given) -> tuple[DecoderConfig, Setting]:
    """A named shape, mixed precision unless said otherwise."""
    from trivium.models import preset
    from trivium.plan.activations import Batch
    from trivium.plan.forecast import DTYPES, Setting
    from trivium.zero.placement import ZeroConfig

    shape = preset(name)
    dtype = "bfloat16" if given.dtype is None else given.dtype
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPES)}")
    return shape, Setting(
        ranks=1 if given.ranks is None else given.ranks,
        zero=ZeroConfig(stage=3 if given.stage is None else given.stage),
        dtype=DTYPES[dtype],
        batch=Batch(
            rows=1 if given.micro_batch is None else given.micro_batch,
            sequence=min(2048, shape.max_positions) if given.sequence is None else given.sequence,
            recompute=given.recompute,
        ),
        accumulation=1 if given.accumulation is None else given.accumulation,
        ep=1 if given.ep is None else given.ep,
    )


def _check(shape: DecoderConfig, setting: Setting) -> None:
    if setting.batch.sequence > shape.max_positions:
        raise ConfigError(
            f"sequence={setting.batch.sequence}: the model has max_positions={shape.max_positions}; "
            f"shorten the sequence or raise max_positions"
        )


def _show(
    title: str,
    shape: DecoderConfig,
    setting: Setting,
    limit: int | None,
    *,
    every: bool,
    binding: bool,
    as_json: bool,
) -> None:
    """Print the plans; raise CapacityError where none fits what was asked for."""
    from trivium.plan.forecast import forecast, inventory_of
    from trivium.plan.hardware import Machine, this_machine

    inventory = inventory_of(shape, setting.dtype, ep=setting.ep)
    machine = (
        this_machine(setting.ranks if binding else 1) if limit is None else Machine(memory_bytes=limit, source="given")
    )
    stages = range(4) if every else (setting.zero.stage,)
    plans = [forecast(inventory, setting.at_stage(stage), shape) for stage in stages]
    fits = [plan.memory.total <= machine.memory_bytes for plan in plans]
    if as_json:
        print_json(
            {
                "model": title,
                "memory_bytes": machine.memory_bytes,
                "memory_from": machine.source,
                "plans": [{**plan.to_dict(), "fits": fit} for plan, fit in zip(plans, fits, strict=True)],
            }
        )
    else:
        _table(title, shape, plans, fits, machine.memory_bytes, machine.source)
    if not any(fits):
        words = _ways_out(inventory, plans[-1], machine.memory_bytes, shape)
        if binding or limit is not None:
            raise CapacityError(words)
        if not as_json:
            word_console().print(words, soft_wrap=True)


def _table(
    title: str, shape: DecoderConfig, plans: Sequence[Plan], fits: Sequence[bool], memory_bytes: int, source: str
) -> None:
    first = plans[0]
    setting = first.setting
    console = data_console()
    activated = ""
    if shape.moe is not None:
        activated = f", {format_count(shape.num_activated_parameters())} for each token, ep {setting.ep}"
    console.print(
        f"{title}: Ψ = {format_count(first.num_parameters)} parameters{activated}, "
        f"{str(setting.dtype).removeprefix('torch.')}, {setting.ranks} ranks, "
        f"micro-batch {setting.batch.rows} × {setting.batch.sequence} tokens, accumulation {setting.accumulation}"
        f"{', recompute' if setting.batch.recompute else ''}",
        soft_wrap=True,
    )
    table = _fitting(console.width)
    table.add_column("per rank", overflow="fold")
    for plan in plans:
        table.add_column(f"stage {plan.setting.zero.stage}", justify="right", overflow="fold", min_width=6)
    for name, label in _ROWS:
        values = [getattr(plan.memory, name) for plan in plans]
        if name in ("states", "total"):
            table.add_row(label, *(_gb(value) for value in values), style="bold", end_section=True)
        elif any(values):
            table.add_row(label, *(_gb(value) for value in values))
    table.add_row("sent per step", *(_gb(plan.communication.per_step.sent_bytes) for plan in plans))
    if first.communication.exchange:
        even = [
            plan.communication.per_step.sent_bytes - plan.communication.states_per_step.sent_bytes for plan in plans
        ]
        table.add_row("of it, rows to experts", *(_gb(count) for count in even))
    table.add_row("volume (×(N-1)/N)", *(f"{plan.volume:.2f} Ψ" for plan in plans))
    table.add_row(
        f"fits {_gb(memory_bytes)}",
        *("yes" if fit else "no" for fit in fits),
    )
    console.print(table)
    if source != "given":
        console.print(f"{_gb(memory_bytes)}: {source}; --memory 80GB asks for another", soft_wrap=True)


def _ways_out(inventory: Inventory, plan: Plan, memory_bytes: int, shape: DecoderConfig) -> str:
    """What was asked, what there is, the largest preset that fits, and three settings that do."""
    from trivium.plan.search import largest_preset, options

    lines = [
        f"does not fit: {_gb(plan.memory.total)} per rank at stage {plan.setting.zero.stage} on {plan.setting.ranks} "
        f"ranks, {_gb(memory_bytes)} there."
    ]
    found = options(inventory, plan.setting, memory_bytes, shape)
    lines += [f"  option: {option.change}: {_gb(option.plan.memory.total)}" for option in found]
    if not found:
        lines.append("  no stage, micro-batch or number of ranks up to 65536 makes it fit")
    largest = largest_preset(plan.setting, memory_bytes)
    if largest is None:
        lines.append("  no preset fits with this setting")
    else:
        lines.append(f"  largest preset that fits with this setting: {largest[0]}, {_gb(largest[1].memory.total)}")
    return "\n".join(lines)


def _paper(as_json: bool) -> None:
    from trivium.plan.paper import STAGE_NAMES, TABLE_1_MODELS, TABLE_2_RANKS, table_1, table_2

    first, second = table_1(), table_2()
    if as_json:
        one: list[dict[str, Any]] = [{"ranks": ranks, "gb_per_device": models} for ranks, models in first]
        two: list[dict[str, Any]] = [
            {
                "model_parallel": degree,
                "devices": devices,
                "largest_parameters": dict(zip(STAGE_NAMES, sizes, strict=True)),
            }
            for degree, devices, sizes in second
        ]
        print_json({"table_1": one, "table_2": two})
        return
    console = data_console()
    console.print("Table 1: GB (10^9) of model states per device, at P_os / P_os+g / P_os+g+p")
    table = _fitting(console.width, "N", *TABLE_1_MODELS)
    for ranks, models in first:
        table.add_row(str(ranks), *(" / ".join(map(_figure, models[name])) for name in TABLE_1_MODELS))
    console.print(table)
    console.print(f"Table 2: the largest model on devices of 32 GB, {TABLE_2_RANKS} data-parallel ranks")
    table = _fitting(console.width, "MP", "devices", *STAGE_NAMES)
    for degree, devices, sizes in second:
        table.add_row(str(degree), str(devices), *(format_count(size, digits=1) for size in sizes))
    console.print(table)


def _fitting(width: int, *header: str) -> Table:
    """An empty table; on a narrow screen one without lines."""
    from rich.table import Column, Table

    columns = [Column(name, overflow="fold") for name in header]
    return Table(*columns, box=None, padding=(0, 1, 0, 0), pad_edge=False) if width < _NARROW else Table(*columns)


def _figure(gb: float) -> str:
    """As the paper prints it: three digits, at most two decimals; from 1000 on whole GB, cut, not rounded."""
    if gb >= 1000:
        return str(int(gb))
    digits = 0 if gb >= 100 else 1 if gb >= 10 else 2
    rounded = math.floor(gb * 10**digits + 0.5) / 10**digits
    return f"{rounded:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{rounded:.0f}"


def _gb(count: float) -> str:
    return format_bytes(count, binary=False)
