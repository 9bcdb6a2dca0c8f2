"""What to do when a gradient is not finite: go on, stop, or write down where it came from.

ZeRO keeps such a gradient out of every rank's weights by itself; here is only the policy and the report.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivium.base import log
from trivium.base.errors import NonFiniteError
from trivium.dist.shard import shard_map_of
from trivium.train.config import TrainConfig
from trivium.train.step import Stepper, StepResult
from trivium.zero.api import engine_of

_SHOWN = 8


class Policy:
    """Counts skipped steps and ends the run when the config says so. Every rank calls it alike."""

    def __init__(self, config: TrainConfig, stepper: Stepper) -> None:
        self.config, self.stepper = config, stepper
        self.in_a_row = 0

    def see(self, result: StepResult) -> bool:
        """Whether the step counted. Raises NonFiniteError when the run is to stop."""
        if result.finite:
            self.in_a_row = 0
            return True
        if result.tokens == 0:
            self._say(f"step {result.step} has no token that carries loss on any rank and was skipped")
            return False
        if self._overflow(result):
            return False
        self.in_a_row += 1
        settings = self.config.train
        number = f"step {result.step}: the gradient is not finite"
        if settings.on_nonfinite == "skip" and self.in_a_row < settings.max_nonfinite:
            self._say(f"{number} and the step was skipped on all ranks, no weight changed ({self._loss(result)})")
            return False
        rows = self.report()
        told = "\n  ".join(rows[:_SHOWN] + ([f"... and {len(rows) - _SHOWN} more"] if len(rows) > _SHOWN else []))
        where = ""
        if settings.on_nonfinite == "dump":
            where = f" The batch and the whole report are in {self.dump(result, rows)}."
        raise NonFiniteError(
            f"{number}, {self.in_a_row} in a row; no weight changed. {self._loss(result)}.{where} "
            f"Lower optimizer.lr, or look at the data. What a second pass over the same batch finds:\n  {told}"
        )

    def _overflow(self, result: StepResult) -> bool:
        """Whether this is only the loss scale of fp16 finding its size."""
        scale = engine_of(self.stepper.parts.model).scale
        return scale.dynamic and scale.value > 1.0 and all(map(math.isfinite, result.losses))

    def _loss(self, result: StepResult) -> str:
        ranks = self.stepper.control.size
        bad = [f"rank {i % ranks}" for i, loss in enumerate(result.losses) if not math.isfinite(loss)]
        if bad:
            return f"the loss itself is not finite on {', '.join(dict.fromkeys(bad))}"
        return "every rank's loss is finite"

    def _say(self, text: str) -> None:
        if self.stepper.control.rank == 0:
            log.get().warning("%s", text)

    def report(self) -> list[str]:
        """Run the step's batches again and tell, per parameter, which ranks have a non-finite value or gradient.

        Collective. Leaves no gradient behind.
        """
        found: dict[str, list[int]] = {}
        model = self.stepper.parts.model
        handles = [
            parameter.register_hook(_counter(name, found))  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        ]
        values = _bad_values(model)
        try:
            for batch in self.stepper.batches:
                self.stepper.backward(batch, -1)
        finally:
            for handle in handles:
                handle.remove()
            self.stepper.parts.optimizer.zero_grad()
        rows = self.stepper.control.all_gather_json({"gradients": found, "values": values})
        told = [
            f"{name}: {count} values are not finite in the weights (rank {rank})"
            for rank, row in enumerate(rows)
            for name, count in row["values"].items()
        ]
        told += [
            f"{name}: {bad} of {total} values of the gradient are not finite on rank {rank}"
            for rank, row in enumerate(rows)
            for name, (bad, total) in row["gradients"].items()
        ]
        return told or ["nothing: it did not happen again"]

    def dump(self, result: StepResult, rows: list[str]) -> Path:
        """Write every rank's batches and the report into the run's folder."""
        folder = self.config.folder / f"nonfinite-step-{result.step:08d}"
        batches: list[dict[str, Any]] = [
            {"number": batch.number, "sequences": list(batch.sequences), "tokens": batch.tokens.tolist()}
            for batch in self.stepper.batches
        ]
        everyone = self.stepper.control.all_gather_json(batches)
        if self.stepper.control.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            body = {"step": result.step, "report": rows, "losses": [str(x) for x in result.losses], "ranks": everyone}
            (folder / "report.json").write_text(json.dumps(body), encoding="utf-8")
        return folder


def _counter(name: str, found: dict[str, list[int]]) -> Any:
    def count(gradient: torch.Tensor) -> None:
        bad = int((~torch.isfinite(gradient)).sum())
        if bad:
            before = found.get(name, [0, 0])
            found[name] = [before[0] + bad, before[1] + gradient.numel()]

    return count


def _bad_values(model: nn.Module) -> dict[str, int]:
    """Parameter → non-finite values among those this rank owns."""
    found = {}
    shard_map = shard_map_of(model)
    for entry in shard_map.entries.values() if shard_map is not None else ():
        if entry.piece is not None:
            bad = int((~torch.isfinite(entry.piece.tensor.detach())).sum())
            if bad:
                found[entry.name] = bad
    return found
