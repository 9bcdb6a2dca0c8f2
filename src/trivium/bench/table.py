"""A report of ``trivium bench zero`` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "fsdp2-keep": "FSDP2 keep"}
_BASES = {"ddp": "DDP", "fsdp2": "FSDP2", "deepspeed-3": "DS 3"}


def title(name: str) -> str:
    """A contestant's name for people."""
    kind, _, stage = name.rpartition("-")
    if name in _NAMES:
        return _NAMES[name]
    if kind == "loopback":
        return f"Trivium stage {stage}, loopback"
    return f"{'DeepSpeed' if kind == 'deepspeed' else 'Trivium'} stage {stage}"


def table(report: Mapping[str, Any]) -> Table:
    """One row per contestant; what was not measured stays empty."""
    work = report["workload"]
    heading = (
        f"{work['parameters'] / 1e6:.1f}M parameters, {work['batch']} × {work['sequence']} tokens per rank, "
        f"{work['ranks']} ranks × {work['threads_per_rank']} thread, {work['dtype']}"
    )
    everyone = report["contestants"]
    built = Table(title=heading, title_justify="left", box=None, pad_edge=False)
    built.add_column("contestant", no_wrap=True)
    built.add_column("step", justify="right", no_wrap=True)
    bases = {base: label for base, label in _BASES.items() if base in everyone}
    for label in bases.values():
        built.add_column(f"÷ {label}", justify="right", no_wrap=True)
    built.add_column("B/Ψ", justify="right", no_wrap=True)
    wired = any("wire" in one["bytes"] for one in everyone.values())
    built.add_column("wire/Ψ" if wired else "sent/Ψ", justify="right", no_wrap=True)
    if wired and any("ledger" in one["bytes"] and "wire" not in one["bytes"] for one in everyone.values()):
        built.caption = "wire/Ψ in brackets: by the ledger, of what is read from memory and never on the wire"
        built.caption_justify = "left"
    delayed = any("delay" in one for one in everyone.values())
    if delayed:
        built.add_column("hidden", justify="right", no_wrap=True)
    for name, one in everyone.items():
        cells = [title(name), _seconds(one["step_s"]["median"])]
        cells += [f"{one['ratio'][base]['median']:.2f}" for base in bases]
        cells += [f"{one['memory']['bytes_per_parameter']:.1f}" if "memory" in one else ""]
        sent = _volume(work, one["bytes"].get("ledger"))
        if wired:
            sent = _volume(work, one["bytes"]["wire"]) if "wire" in one["bytes"] else sent and f"({sent})"
        cells += [sent]
        if delayed:
            cells += [f"{one['delay']['hidden']:.0%}" if "delay" in one else ""]
        built.add_row(*cells)
    return built


def targets(report: Mapping[str, Any]) -> list[str]:
    """One line per target that this report can judge."""
    return [
        f"{'met   ' if one['met'] else 'missed'} {title(one['contestant'])} {one['of']} ÷ {title(one['base'])}: "
        f"{one['value']:.2f}, target at most {one['at_most']:g}"
        for one in report["targets"]
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _volume(work: Mapping[str, Any], sent: float | None) -> str:
    """Elements sent per parameter, in the paper's unit: (N-1)/N of the model."""
    unit = 4 * work["parameters"] * (work["ranks"] - 1) / work["ranks"]
    return "" if sent is None or not unit else f"{sent / unit:.2f}"
