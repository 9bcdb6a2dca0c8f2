"""Rows of metrics to TensorBoard and Weights & Biases, both optional extras."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from trivium.base import config as configs
from trivium.base.errors import SetupError
from trivium.train.config import TrainConfig
from trivium.train.metrics import Writer


def open_writers(config: TrainConfig) -> tuple[Writer, ...]:
    """The writers that ``[report]`` asks for. Raises SetupError when an extra is not installed."""
    writers: list[Writer] = []
    if config.report.tensorboard:
        module = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        writers.append(TensorBoard(module.SummaryWriter(str(config.folder / "tensorboard"))))
    if config.report.wandb:
        module = _import("wandb", "wandb", "wandb")
        run = module.init(
            project=config.report.project,
            dir=str(config.folder),
            name=config.folder.name,
            config=configs.to_dict(config),
        )
        writers.append(WeightsAndBiases(run))
    return tuple(writers)


def _import(module: str, package: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(
            f"report.{extra} is set, but the package {package} is not installed: pip install 'trivium[{extra}]', or "
            f"set report.{extra} = false"
        ) from error


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a step's or validation's row, nested ones as ``memory/parameters``."""
    kind = row.get("kind")
    if kind not in ("step", "validation"):
        return {}
    found: dict[str, float] = {}
    for key, value in row.items():
        if key in ("step", "time", "kind"):
            continue
        if isinstance(value, Mapping):
            found |= {f"{key}/{name}": float(item) for name, item in value.items() if isinstance(item, int | float)}
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"validation/{key}" if kind == "validation" else key] = float(value)
    return found


class TensorBoard:
    """Rows as scalars by step."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the row's numbers."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """Rows as logs by step."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def write(self, row: Mapping[str, Any]) -> None:
        """Log the row's numbers."""
        found = scalars(row)
        if found:
            self._run.log(found, step=row["step"])

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()
