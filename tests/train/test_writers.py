"""Rows of metrics as TensorBoard and W&B get them; the packages themselves are stand-ins with the same calls."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trivium.base import config as configs
from trivium.train.config import TrainConfig
from trivium.train.writers import open_writers

ROWS: tuple[dict[str, Any], ...] = (
    {"kind": "start", "step": 0, "parameters": 7},
    {"kind": "step", "step": 1, "time": 9.0, "loss": 2.5, "memory": {"gradients": 8}, "process": None},
    {"kind": "validation", "step": 1, "loss": 2.0},
    {"kind": "end", "step": 1, "loss": 2.5},
)


class Board:
    def __init__(self, folder: str) -> None:
        self.folder, self.seen, self.closed = folder, [], False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))

    def close(self) -> None:
        self.closed = True


class Run:
    def __init__(self, **settings: Any) -> None:
        self.settings, self.seen, self.finished = settings, [], False

    def log(self, found: dict[str, float], step: int) -> None:
        self.seen.append((found, step))

    def finish(self) -> None:
        self.finished = True


def test_rows_reach_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def keep(one: Any) -> Any:
        made.append(one)
        return one

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter = lambda folder: keep(Board(folder))  # type: ignore[attr-defined]
    wandb.init = lambda **settings: keep(Run(**settings))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = tmp_path / "my run"
    report = {"tensorboard": True, "wandb": True, "project": "mine"}
    config = configs.build(TrainConfig, {"run": str(folder), "zero": {"stage": 2}, "report": report})
    writers = open_writers(config)
    for writer in writers:
        for row in ROWS:
            writer.write(row)
        writer.close()
    first, second = made
    assert first.folder == str(folder / "tensorboard") and first.closed and second.finished
    assert first.seen == [("loss", 2.5, 1), ("memory/gradients", 8.0, 1), ("validation/loss", 2.0, 1)]
    assert second.seen == [({"loss": 2.5, "memory/gradients": 8.0}, 1), ({"validation/loss": 2.0}, 1)]
    told = second.settings
    assert (told["project"], told["name"], told["dir"]) == ("mine", "my run", str(folder))
    assert told["config"]["zero"]["stage"] == 2


def test_nothing_is_opened_unasked(tmp_path: Path) -> None:
    assert open_writers(configs.build(TrainConfig, {"run": str(tmp_path)})) == ()
