"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere. On stderr, rank 0 only."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from trivium.base import log
from trivium.base.units import format_count


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

    def validation(self, done: int, loss: float) -> None:
        """The loss on held-out text after ``done`` steps."""
        self._validation = loss
        if self._bar is None and self._shown:
            log.get().info("step %d: validation loss %.4f", done, loss)
