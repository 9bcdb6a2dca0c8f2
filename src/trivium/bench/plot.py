"""A report of ``trivium bench zero`` as a picture: time, memory and traffic, one bar per contestant."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trivium.base.errors import ConfigError
from trivium.bench.table import title

_THEIRS, _OURS = "#9aa5b1", "#1f6f8b"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the file's ending (.svg, .png, .pdf) chooses its format."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"{path}: expected a name that ends in .svg, .png or .pdf")
    everyone, work = report["contestants"], report["workload"]
    base = next((name for name in ("ddp", "fsdp2", "deepspeed-3") if name in everyone), None)
    unit = 4 * work["parameters"] * (work["ranks"] - 1) / work["ranks"]
    panels: list[tuple[str, dict[str, float]]] = []
    if base is not None:
        ratio = {name: one["ratio"][base]["median"] for name, one in everyone.items()}
        panels.append((f"step time ÷ {title(base)}", ratio))
    memory = {n: one["memory"]["bytes_per_parameter"] for n, one in everyone.items() if "memory" in one}
    sent: dict[str, float] = {}
    if any("wire" in one["bytes"] for one in everyone.values()):  # who reads memory sends nothing: then by the ledger
        counted = {n: one["bytes"].get("wire", one["bytes"].get("ledger")) for n, one in everyone.items()}
        sent = {name: num_bytes / unit for name, num_bytes in counted.items() if num_bytes is not None}
    panels += [("peak bytes per parameter and rank", memory), ("elements moved ÷ Ψ(N−1)/N", sent)]
    panels = [(label, values) for label, values in panels if values]
    figure = Figure(figsize=(4.2 * max(len(panels), 1), 0.42 * len(everyone) + 1.3), layout="constrained")
    names = list(everyone)
    for axes, (label, values) in zip(
        figure.subplots(1, max(len(panels), 1), sharey=True, squeeze=False)[0], panels, strict=False
    ):
        heights = [values.get(name, 0.0) for name in names]
        bars = axes.barh(
            [title(name) for name in names],
            heights,
            color=[_OURS if name.startswith(("trivium", "loopback")) else _THEIRS for name in names],
        )
        axes.bar_label(bars, [_label(values.get(name)) for name in names], padding=3)
        axes.set_title(label, fontsize=10)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    figure.suptitle(
        f"{work['parameters'] / 1e6:.1f}M parameters, {work['batch']} × {work['sequence']} tokens, "
        f"{work['ranks']} ranks, {work['dtype']} · {report['machine']['cpu']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)


def _label(height: float | None) -> str:
    """Nothing where nothing was measured."""
    return "" if height is None else f"{height:.2f}" if height < 10 else f"{height:.1f}"
