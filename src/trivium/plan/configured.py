"""From a training configuration to what is planned: the model's shape and how the run is laid out.

The trainer plans itself with the same functions, and prints plan beside measured at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.base import log
from trivium.models import DecoderConfig
from trivium.plan.activations import Batch
from trivium.plan.forecast import DTYPES, Plan, Setting, forecast, inventory_of

if TYPE_CHECKING:
    from trivium.train.config import TrainConfig


def read(path: Path, overrides: Sequence[str] = (), *, ranks: int = 1) -> tuple[DecoderConfig, Setting]:
    """The shape and the setting of ``CONFIG.toml``; warns that a teacher is not planned.

    Raises ConfigError for whatever the trainer would refuse.
    """
    from trivium.base import config as base_config
    from trivium.train.config import TrainConfig

    config = base_config.load(TrainConfig, path, overrides)
    config.check_ranks(ranks)
    if config.distill is not None:
        log.get().warning(
            "the plan is of the student alone: the teacher, its shards and its gathers come on top until distill.stop"
        )
    return decoder_of(config), setting_of(config, ranks)


def decoder_of(config: TrainConfig) -> DecoderConfig:
    """The model's shape, without touching the text: a tokenizer still to be trained has as many entries as asked."""
    from trivium.train.build import decoder_of as shape_of

    return shape_of(config, _vocabulary(config))


def setting_of(config: TrainConfig, ranks: int, rank: int = 0) -> Setting:
    """How the trainer lays the run out: gradients are summed, never averaged; packed rows carry a mask."""
    train = config.train
    return Setting(
        ranks=ranks,
        rank=rank,
        zero=config.zero,
        dtype=DTYPES[config.model.dtype],
        batch=Batch(rows=train.micro_batch, sequence=config.data.sequence, recompute=train.recompute, documents=True),
        accumulation=train.accumulation_for(ranks),
        ep=config.mesh.ep,
    )


def plan_run(config: TrainConfig, decoder: DecoderConfig, ranks: int, rank: int = 0) -> Plan:
    """The plan of one rank of a run whose model is ``decoder``."""
    setting = setting_of(config, ranks, rank)
    return forecast(inventory_of(decoder, setting.dtype, ep=setting.ep, rank=rank), setting, decoder)


def _vocabulary(config: TrainConfig) -> int:
    if config.tasks is not None:
        from trivium.train import tasks

        return int(tasks.tokenizer().vocabulary)
    from trivium.train.build import data_of

    data = data_of(config)
    if data.tokenizer is None:
        return data.vocabulary
    from trivium.train.data import Tokenizer

    return Tokenizer.load(Path(data.tokenizer).expanduser()).vocabulary
