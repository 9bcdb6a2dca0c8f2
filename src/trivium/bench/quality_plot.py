"""A report of ``trivium bench quality`` as a picture, a panel per claim: thin lines are seeds, thick ones means."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trivium.base.errors import ConfigError

_COLOURS = ("#1f6f8b", "#c8553d", "#6a994e")
_APART = {
    "b": (("pr-moe", "moe"), ("pr-moe-narrow", "moe")),
    "c": (
        ("student-staged", "student-alone"),
        ("student-full", "student-alone"),
        ("student-staged", "student-full"),
    ),
}


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture; the file's ending (.svg, .png, .pdf) chooses its format."""
    if path.suffix not in (".svg", ".png", ".pdf"):
        raise ConfigError(f"{path}: expected a name that ends in .svg, .png or .pdf")
    claims, runs = report["claims"], report["runs"]
    figure = Figure(figsize=(4.6 * len(claims), 3.6), layout="constrained")
    for axes, claim in zip(figure.subplots(1, len(claims), squeeze=False)[0], claims, strict=True):
        if claim == "a":
            _curves(axes, runs, claims["a"])
        else:
            _differences(axes, runs, claim)
        axes.set_title(f"({claim}) {claims[claim]['title']}", fontsize=8)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{report['settings']['seeds']} paired seeds · {report['text']['text']}", fontsize=9)
    figure.savefig(path, dpi=150)


def _curves(axes: Axes, runs: Mapping[str, Any], claim: Mapping[str, Any]) -> None:
    for colour, arm in zip(_COLOURS, ("dense", "moe"), strict=False):
        curves = [one["validation"][1:] for one in runs[arm]["seeds"].values()]  # step 0 would take all the height
        _draw(axes, colour, arm, [[step for step, _ in curves[0]], *([loss for _, loss in curve] for curve in curves)])
    axes.axhline(claim["final"]["dense"]["mean"], color=_COLOURS[0], linestyle=":", linewidth=1)
    axes.set_ylabel("validation loss, nats per token", fontsize=8)


def _differences(axes: Axes, runs: Mapping[str, Any], claim: str) -> None:
    for colour, (arm, base) in zip(_COLOURS, _APART[claim], strict=False):
        steps = [step for step, _ in next(iter(runs[arm]["seeds"].values()))["validation"][1:]]
        apart = [
            [mine[1] - theirs[1] for mine, theirs in zip(one["validation"], other["validation"], strict=True)][1:]
            for one, other in ((one, runs[base]["seeds"][seed]) for seed, one in runs[arm]["seeds"].items())
        ]
        _draw(axes, colour, f"{arm} − {base}", [steps, *apart])
    axes.axhline(0.0, color="#888888", linewidth=0.8)
    axes.set_ylabel("difference of validation losses", fontsize=8)


def _draw(axes: Axes, colour: str, label: str, columns: list[list[float]]) -> None:
    steps, *by_seed = columns
    for values in by_seed:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.5)
    mean = [statistics.fmean(values) for values in zip(*by_seed, strict=True)]
    axes.plot(steps, mean, color=colour, linewidth=1.8, label=label)
