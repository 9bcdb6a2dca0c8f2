"""DeepSpeed's ZeRO, stages 1 to 3, with the settings of its own documentation."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch

from trivium.bench.contestant import Contestant
from trivium.models import Decoder


class _Engine(Contestant):
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self._engine(tokens_BT, targets_BT)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss)

    def update(self) -> None:
        self._engine.step()


def build(model: Decoder, learning_rate: float, batch: int, *, stage: int) -> Contestant:
    """``model`` under a DeepSpeed engine; torch's AdamW is passed in, so that nothing is compiled at first use."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": batch,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)
    return _Engine(engine)
