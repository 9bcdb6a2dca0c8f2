"""A report of ``trivium bench serve`` as a picture: throughput and goodput, first token and gaps, over load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trivium.base.errors import ConfigError


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the file's ending (.svg, .png, .pdf) chooses its format."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"{path}: expected a name that ends in .svg, .png or .pdf")
    kinds = [kind for kind in ("closed", "open") if any(row["load"] == kind for row in report["loads"])]
    figure = Figure(figsize=(11, 3.2 * max(len(kinds), 1)), layout="constrained")
    grid = figure.subplots(max(len(kinds), 1), 3, squeeze=False)
    for axes, kind in zip(grid, kinds, strict=True):
        rows = sorted((row for row in report["loads"] if row["load"] == kind), key=lambda row: float(row["offered"]))
        offered = [row["offered"] for row in rows]
        label = "requests under way" if kind == "closed" else "arrivals per second"
        axes[0].plot(offered, [row["tokens_per_s"] for row in rows], "o-", color="#1f6f8b")
        axes[0].set_ylabel("tokens per second")
        for name, style in (("requests_per_s", "o-"), ("goodput_per_s", "s--")):
            axes[1].plot(
                offered, [row[name] for row in rows], style, label=name.replace("_per_s", "").replace("_", " ")
            )
        axes[1].set_ylabel("per second")
        axes[1].legend(frameon=False)
        for name, text in (("first_p50_ms", "first, p50"), ("first_p99_ms", "first, p99"), ("gap_p99_ms", "gap, p99")):
            values = [float("nan") if row[name] is None else row[name] for row in rows]
            axes[2].plot(offered, values, "o-", label=text)
        axes[2].set_ylabel("ms")
        axes[2].set_yscale("log")
        axes[2].legend(frameon=False)
        for one in axes:
            one.set_xlabel(label)
            one.set_ylim(bottom=None if one is axes[2] else 0)
            one.spines[["top", "right"]].set_visible(False)
    work = report["workload"]
    size = f"{work['prompt_words']} words in, {work['max_tokens']} tokens out"
    figure.suptitle(f"{work['model']}: {size} · {report['machine']['cpu']}", fontsize=9)
    figure.savefig(path, dpi=150)
