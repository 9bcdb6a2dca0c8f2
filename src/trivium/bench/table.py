"""A report of ``trivium bench zero`` as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2", "fsdp2-keep": "FSDP2, keeps parameters"}


def title(name: str) -> str:
    """A contestant's name for people."""
    kind, _, stage = name.rpartition("-")
    if name in _NAMES:
        return _NAMES[name]
    return f"{'DeepSpeed' if kind == 'deepspeed' else 'Trivium'} stage {stage}"


def table(report: Mapping[str, Any]) -> Table:
    """One row per contestant; what was not measured stays empty."""
    work = report["workload"]
    heading = (
        f"{work['parameters'] / 1e6:.1f}M parameters, {work['batch']} × {work['sequence']} tokens per rank, "
        f"{work['ranks']} ranks × {work['threads_per_rank']} thread, {work['dtype']}"
    )
    built = Table(title=heading, title_justify="left")
    built.add_column("contestant", no_wrap=True)
    bases = [base for base in ("ddp", "fsdp2", "deepspeed-3") if base in report["contestants"]]
    built.add_column("step", justify="right", no_wrap=True)
    for base in bases:
        built.add_column(f"÷ {title(base)}", justify="right")
    built.add_column("peak B/param", justify="right")
    built.add_column("wire ÷ Ψ", justify="right")
    built.add_column("ledger ÷ Ψ", justify="right")
    if any("delay" in one for one in report["contestants"].values()):
        built.add_column("delay hidden", justify="right")
    for name, one in report["contestants"].items():
        cells = [title(name), _seconds(one["step_s"]["median"])]
        cells += [_ratio(one["ratio"][base]) for base in bases]
        cells += [f"{one['memory']['bytes_per_parameter']:.1f}" if "memory" in one else ""]
        cells += [_volume(work, one["bytes"].get("wire")), _volume(work, one["bytes"].get("ledger"))]
        if "delay" in one and one["delay"]["hidden"] is not None:
            cells.append(f"{one['delay']['hidden']:.0%}")
        built.add_row(*cells)
    return built


def targets(report: Mapping[str, Any]) -> list[str]:
    """One line per target that this report can judge."""
    return [
        f"{'met   ' if one['met'] else 'missed'} {title(one['contestant'])} {one['of']} ÷ {title(one['base'])}: "
        f"{one['value']:.2f}, target at most {one['at_most']:g}"
        for one in report["targets"]
    ]


def _ratio(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f}–{ratio['greatest']:.2f})"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _volume(work: Mapping[str, Any], sent: float | None) -> str:
    """Elements sent per parameter, in the paper's unit: (N-1)/N of the model."""
    unit = 4 * work["parameters"] * (work["ranks"] - 1) / work["ranks"]
    return "" if sent is None or not unit else f"{sent / unit:.2f}"
