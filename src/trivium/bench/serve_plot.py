"""A report of ``trivium bench serve`` as a picture: throughput and goodput, first token and gaps, over load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from trivium.base.errors import ConfigError

_BLUE, _ORANGE = "#1f6f8b", "#c8553d"


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the file's ending (.svg, .png, .pdf) chooses its format."""
    _check(path)
    kinds = [kind for kind in ("closed", "open") if any(row["load"] == kind for row in report["loads"])]
    figure = Figure(figsize=(11, 3.2 * max(len(kinds), 1)), layout="constrained")
    grid = figure.subplots(max(len(kinds), 1), 3, squeeze=False)
    for axes, kind in zip(grid, kinds, strict=True):
        rows = sorted((row for row in report["loads"] if row["load"] == kind), key=lambda row: float(row["offered"]))
        offered = [row["offered"] for row in rows]
        label = "requests under way" if kind == "closed" else "arrivals per second"
        axes[0].plot(offered, [row["tokens_per_s"] for row in rows], "o-", color=_BLUE)
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


def plot_promises(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a report of ``--promises``: throughput, the overload second by second, measured ÷ bound."""
    _check(path)
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    throughput, overload, bounds = figure.subplots(1, 3, width_ratios=(1, 1.3, 1.5))
    rows = {row["row"]: row for row in report["rows"]}
    closed = [load for load in report["loads"] if load["load"] == "closed"]
    if closed:
        under_way = [str(load["offered"]) for load in closed]
        throughput.bar(under_way, [load["tokens_per_s"] for load in closed], color=_BLUE, width=0.6)
    throughput.set(xlabel="requests under way", ylabel="tokens per second")
    if "4× overload" in rows:
        seconds = rows["4× overload"]["also"]["by_second"]
        for name, color in (("answered", _BLUE), ("refused", _ORANGE)):
            overload.plot(seconds[name], color=color, label=f"{name}, at four times the peak (dashed)")
        overload.axhline(rows["4× overload"]["also"]["peak_per_s"], color="#555555", linestyle="--", linewidth=1)
        overload.legend(frameon=False, fontsize=8)
    overload.set(xlabel="seconds", ylabel="requests per second", ylim=(0, None))
    _bars(bounds, report["rows"])
    for one in (throughput, overload, bounds):
        one.spines[["top", "right"]].set_visible(False)
    work, machine = report["workload"], report["machine"]
    size = f"{work['parameters'] / 1e6:.1f}M parameters · " if "parameters" in work else ""
    figure.suptitle(f"{size}{machine['cores']} cores, {machine['cpu']}", fontsize=9)
    figure.savefig(path, dpi=150)


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Each promise with a bound other than none: how much of the bound is used, on a logarithmic scale."""
    shown = []
    for row in rows:
        for one in row["promises"]:
            sense, bound = one["promised"].split()
            if one["measured"] is not None and float(bound) > 0 and "status" not in one["what"]:
                part = float(one["measured"]) / float(bound)
                if part > 0:
                    shown.append((f"{row['row']}: {one['what']}", part if sense == "<=" else 1 / part, one["kept"]))
    for name, part, kept in reversed(shown):
        axes.barh(name, part, color=_BLUE if kept else _ORANGE, height=0.7)
    axes.axvline(1, color="#555555", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.tick_params(axis="y", labelsize=7)
    axes.set_xlabel("used of the bound (dashed)")


def _check(path: Path) -> None:
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"{path}: expected a name that ends in .svg, .png or .pdf")
