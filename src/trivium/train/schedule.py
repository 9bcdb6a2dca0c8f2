"""The learning rate's factor at each step: warm-up, then cosine or warm-up-stable-decay. Pure numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from trivium.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The ``[schedule]`` table.

    ``kind``: ``cosine`` falls from the end of the warm-up to the last step, ``wsd`` holds and falls linearly over the
    last ``decay_fraction`` of all steps, ``constant`` holds. ``min_ratio``: what remains of the rate at the end.
    """

    kind: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: int = 0
    min_ratio: float = 0.1
    decay_fraction: float = 0.2

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps}: expected 0 or more")
        if not 0.0 <= self.min_ratio <= 1.0:
            raise ConfigError(f"schedule.min_ratio={self.min_ratio}: expected 0 to 1")
        if not 0.0 < self.decay_fraction <= 1.0:
            raise ConfigError(f"schedule.decay_fraction={self.decay_fraction}: expected above 0, up to 1")


def factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """What the base rate is multiplied with at ``step``, counted from 0, of ``steps`` in all.

    The first step of a warm-up of w steps has 1/w, the last step of the run ``min_ratio`` (constant: 1).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    begin = config.warmup_steps
    if config.kind == "wsd":
        begin = max(begin, steps - max(1, round(steps * config.decay_fraction)))
    if step < begin:
        return 1.0
    done = min(1.0, (step - begin + 1) / max(1, steps - begin))
    if config.kind == "wsd":
        return 1.0 - (1.0 - config.min_ratio) * done
    return config.min_ratio + (1.0 - config.min_ratio) * 0.5 * (1.0 + math.cos(math.pi * done))
