"""``trivium plan --serve``: what serving a model takes, as a table or JSON."""

from __future__ import annotations

import dataclasses

from trivium.base.units import format_bytes, parse_bytes
from trivium.cli.output import data_console, print_json


def plan_serving(
    model: str,
    *,
    memory: str | None,
    dtype: str | None,
    quantize: str | None,
    cache_dtype: str,
    max_positions: int | None,
    as_json: bool,
) -> None:
    """Print the plan. Raises CapacityError (exit 4) where the model does not fit."""
    from trivium.plan import serving
    from trivium.plan.hardware import this_machine

    limit = this_machine().memory_bytes if memory is None else parse_bytes(memory)
    plan = serving.plan_serving(
        model,
        memory_bytes=limit,
        dtype=dtype or "auto",  # type: ignore[arg-type]
        quantize=quantize,  # type: ignore[arg-type]
        cache_dtype=cache_dtype,
        max_positions=max_positions,
    )
    if as_json:
        print_json(dataclasses.asdict(plan))
        return
    from rich.table import Table

    console = data_console()
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.caches.items())
    console.print(f"{plan.name}, {plan.weights} weights, in {format_bytes(plan.memory_bytes)}")
    table = Table(show_header=False, box=None)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("weights", format_bytes(plan.weight_bytes))
    table.add_row(f"cache, {plan.cache_dtype}, layers: {kinds}", format_bytes(plan.cache_bytes))
    table.add_row("cache per token", format_bytes(plan.token_bytes))
    table.add_row("tokens in the cache", f"{plan.cache_tokens:,}")
    if plan.window is not None:
        table.add_row("tokens that a request keeps, beside its step's", f"{plan.window:,}")
    console.print(table)
    fits = Table("tokens per request", "requests at once", box=None)
    for column in fits.columns:
        column.justify = "right"
    for length, count in plan.fits:
        fits.add_row(f"{length:,}", f"{count:,}")
    console.print(fits)
