"""The demo's fourth part: experts on two ranks answer tasks, a student learns from them, a dense model stands beside.

DeepSpeed-MoE sections 4.1 (pyramid, residual) and 4.2 (mixture of students), in minutes on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from trivium.base.units import format_count
from trivium.cli import demo_runs
from trivium.cli.output import fitted

Run = Callable[..., dict[str, Any]]
MODELS = (
    ("tasks", "teacher: pyramid of residual experts"),
    ("student", "student: one layer less, distilled"),
    ("dense", "dense, as large for each token"),
)
_WIDTH = 24


def show(console: Console, run: Run) -> dict[str, dict[str, Any]]:
    """Train the three with ``run(name, ranks, verb=…)`` and print what they can; their answers as JSON had them."""
    found: dict[str, dict[str, Any]] = {}
    for name, words in MODELS:
        console.print(f"  {words} …", style="dim")
        verb = "distill" if name == "student" else "train"
        found[name] = run(name, demo_runs.RANKS, verb=verb)
        if name == "tasks":
            for prompt, written in found[name]["samples"]:
                console.print(f"  {prompt}{written}")
            for line in pictures(found[name]["experts"]):
                console.print(f"  {line}")
    console.print(_table(found, console.width))
    ended, steps = found["student"]["distilled"], found["student"]["steps"]
    told = "all" if ended is None else f"the first {ended}"
    console.print(f"  the student followed its teacher for {told} of its {steps} steps")
    return found


def pictures(experts: Mapping[str, Mapping[str, Sequence[int]]]) -> list[str]:
    """Bars: of each task's tokens, which share each expert takes, layer by layer; the greatest share is named."""
    lines = []
    for layer in next(iter(experts.values()), {}):
        lines.append(f"layer {layer}: who takes which task")
        for task, found in experts.items():
            counts = found[layer]
            total = max(1, sum(counts))
            cells = []
            for expert, count in enumerate(counts):
                share = count / total
                cells.append(f"{expert}{'█' * max(1, round(_WIDTH * share))}" if share >= 0.05 else "")
            best = max(range(len(counts)), key=lambda expert: counts[expert])
            bar = " ".join(cell for cell in cells if cell)
            lines.append(f"  {task:<8}{bar}  (expert {best}: {counts[best] / total:.0%})")
    return lines


def _table(found: Mapping[str, Mapping[str, Any]], width: int) -> Table:
    """One row a model: sizes, exact answers, losses."""
    tasks = list(found["tasks"]["scores"])
    rows = []
    for name, words in MODELS:
        answer = found[name]
        sizes = format_count(answer["parameters"]), format_count(answer["activated"])
        scores = (f"{answer['scores'][task]:.1%}" for task in tasks)
        label = words.partition(":")[0].partition(",")[0]
        rows.append((label, *sizes, *scores, f"{answer['loss']:.3f}", f"{answer['validation']:.3f}"))
    return fitted(("", "parameters", "per token", *tasks, "loss", "held-out"), rows, width)
