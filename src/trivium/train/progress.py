"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere. On stderr, rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trivium.base import log
from trivium.base.units import format_count
from trivium.train.router import TaskChoices

_LEVELS = " ▁▂▃▄▅▆▇█"


def bars(experts: TaskChoices) -> list[str]:
    """A line per layer: for each task one bar per expert, as high as its share of the task's tokens (full: half of
    them or more)."""
    layers: dict[str, list[str]] = {}
    for task, found in experts.items():
        for layer, counts in found.items():
            total = max(1, sum(counts))
            marks = (min(len(_LEVELS) - 1, round(16 * count / total)) for count in counts)
            layers.setdefault(layer, []).append(f"{task} │{''.join(_LEVELS[mark] for mark in marks)}│")
    return [f"  layer {layer}: " + "  ".join(parts) for layer, parts in layers.items()]


class Display:
    """Shows steps as they are done; does nothing when ``shown`` is False."""

    def __init__(self, *, steps: int, done: int, every: int, shown: bool, terminal: bool | None = None) -> None:
        self._steps, self._every, self._shown = steps, every, shown
        self._validation = math.nan
        live = sys.stderr.isatty() if terminal is None else terminal
        self._bar: Progress | None = None
        if shown and live:
            console = Console(stderr=True, highlight=False, force_terminal=terminal)
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("step", total=steps, completed=done, told="")
        self._begun = time.monotonic()

    def __enter__(self) -> Display:
        """Begin to show."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what was shown last."""
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, loss: float, tokens_per_s: float) -> None:
        """``done`` steps are done."""
        told = f"loss {loss:.3f}  {format_count(round(tokens_per_s))} tokens/s"
        if not math.isnan(self._validation):
            told += f"  validation {self._validation:.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, told=told)
        elif self._shown and (done % self._every == 0 or done == self._steps):
            log.get().info("step %d of %d  %s", done, self._steps, told)

    def scores(self, done: int, scores: Mapping[str, float], experts: TaskChoices) -> None:
        """Exact answers per task after ``done`` steps, and a line of bars per layer: which expert takes which task."""
        if not self._shown:
            return
        lines = [f"step {done}: " + "  ".join(f"{name} {share:.0%}" for name, share in scores.items())]
        lines += bars(experts)
        for line in lines:
            if self._bar is not None:
                self._bar.console.print(line, soft_wrap=True)
            else:
                log.get().info("%s", line)

    def validation(self, done: int, loss: float) -> None:
        """The loss on held-out text after ``done`` steps."""
        self._validation = loss
        if self._bar is None and self._shown:
            log.get().info("step %d: validation loss %.4f", done, loss)
