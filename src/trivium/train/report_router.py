"""The routers' part of a run's report: load by layer, expert and time, drops, entropy, and who takes which task.

DeepSpeed-MoE section 3.1. Rows are those of metrics.jsonl; pictures are drawn by the functions that are handed out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Row = Mapping[str, Any]
Draw = Callable[[Any], None]
_MOST_LAYERS = 12


def pictures(steps: Sequence[Row]) -> list[tuple[str, Draw]]:
    """(label of the vertical axis, what draws it) for a run with experts; nothing for one without."""
    told = [row for row in steps if row.get("router")]
    if not told:
        return []
    layers = [layer["layer"] for layer in told[-1]["router"]]
    found: list[tuple[str, Draw]] = [
        (f"expert, layer {layer}{_cut(layers)}", partial(_load, told=told, place=place))
        for place, layer in enumerate(layers[:_MOST_LAYERS])
    ]
    return [
        *found,
        ("dropped choices, share", lambda axes: _lines(axes, told, layers, lambda row: row["drop_rate"])),
        ("router entropy, nats", lambda axes: _lines(axes, told, layers, lambda row: row["entropy"])),
        ("experts that nobody chose", lambda axes: _lines(axes, told, layers, lambda row: len(row["dead"]))),
    ]


def summary(steps: Sequence[Row]) -> list[tuple[str, str]]:
    """Words on each layer since the row before the last: heaviest and lightest share, drops, dead experts."""
    told = [row for row in steps if row.get("router")]
    lines = []
    for layer in told[-1]["router"] if told else []:
        total = max(1, sum(layer["load"]))
        shares = [count / total for count in layer["load"]]
        dead = layer["dead"]
        lines.append(
            (
                f"layer {layer['layer']}, {len(shares)} experts",
                f"heaviest {max(shares):.1%}, lightest {min(shares):.1%} (even: {1 / len(shares):.1%}); "
                f"{layer['drop_rate']:.1%} dropped; {len(dead)} dead"
                + (f" ({', '.join(map(str, dead[:12]))})" if dead else ""),
            )
        )
    return lines


def task_pictures(experts: Mapping[str, Mapping[str, Sequence[int]]]) -> list[tuple[str, Draw]]:
    """One picture a layer: tasks down, experts across, the share of a task's tokens as the shade."""
    layers = list(next(iter(experts.values()), {}))
    return [
        (f"task, layer {layer}{_cut(layers)}", partial(_tasks, experts=experts, layer=layer))
        for layer in layers[:_MOST_LAYERS]
    ]


def _cut(layers: Sequence[Any]) -> str:
    """What a label adds where not all layers are drawn."""
    return f"\nfirst {_MOST_LAYERS} of {len(layers)} layers" if len(layers) > _MOST_LAYERS else ""


def _load(axes: Any, told: Sequence[Row], place: int) -> None:
    columns = []
    for row in told:
        load = row["router"][place]["load"]
        total = max(1, sum(load))
        columns.append([count / total for count in load])
    grid = [list(line) for line in zip(*columns, strict=True)]
    edges = [told[0]["step"] - 1, *(row["step"] for row in told)]
    shown = axes.pcolormesh(edges, range(len(grid) + 1), grid, cmap="viridis", vmin=0, rasterized=True)
    axes.grid(visible=False)
    axes.figure.colorbar(shown, ax=axes, label="share of choices")


def _lines(axes: Any, told: Sequence[Row], layers: Sequence[int], value: Callable[[Row], float]) -> None:
    for place, layer in enumerate(layers):
        axes.plot([row["step"] for row in told], [value(row["router"][place]) for row in told], label=f"layer {layer}")
    axes.set_ylim(bottom=0)
    if len(layers) <= _MOST_LAYERS:
        axes.legend()


def _tasks(axes: Any, experts: Mapping[str, Mapping[str, Sequence[int]]], layer: str) -> None:
    grid = []
    for found in experts.values():
        total = max(1, sum(found[layer]))
        grid.append([count / total for count in found[layer]])
    width = len(grid[0])
    shown = axes.pcolormesh(range(width + 1), range(len(grid) + 1), grid, cmap="viridis", vmin=0)
    axes.set_yticks([place + 0.5 for place in range(len(grid))], list(experts))
    axes.set_xticks([place + 0.5 for place in range(width)], [str(place) for place in range(width)])
    axes.set_xlabel("expert")
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.figure.colorbar(shown, ax=axes, label="share of the task's tokens")
