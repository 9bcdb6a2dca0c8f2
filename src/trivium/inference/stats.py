"""What the engine counts, and a picture of it at one moment."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trivium.inference.scheduler import Scheduler
from trivium.kernels.program import StepRouting

_UNCOUNTED_STEPS = 64  # are held at most; a step of as many tokens is counted at once, with those before it


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counts since the engine was made, and what it holds now. ``finished`` is by finish reason, per choice.

    ``cached_tokens``: of prompts, found in the prefix cache. ``tokens_per_expert``: per MoE layer and expert.
    """

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_remembered: int
    block_size: int
    steps: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    finished: dict[str, int]
    tokens_per_expert: tuple[tuple[int, ...], ...]


class Counters:
    """The engine's running counts."""

    def __init__(self, num_experts: tuple[int, ...]) -> None:
        """``num_experts``: per MoE layer."""
        self.num_experts = num_experts
        self.steps = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.finished = {"stop": 0, "length": 0, "abort": 0, "error": 0}
        none = [torch.zeros(count, dtype=torch.int64) for count in num_experts]
        # What was counted, and the steps after it: replaced together, for other threads look at both.
        self._routed: tuple[list[torch.Tensor], list[StepRouting]] = none, []

    def route(self, routing: StepRouting | None) -> None:
        """Take a step's choices of experts, which are counted once they are many: a step has no time for it."""
        if routing is None or not self.num_experts:
            return
        counted, uncounted = self._routed
        uncounted.append(routing)
        if len(uncounted) >= _UNCOUNTED_STEPS or routing.tokens >= _UNCOUNTED_STEPS:
            self._routed = _counted(counted, uncounted), []

    def snapshot(self, scheduler: Scheduler) -> EngineStats:
        """The counts with the scheduler's."""
        pool = scheduler.pool
        counted, uncounted = self._routed
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            blocks_total=pool.num_blocks,
            blocks_free=pool.num_free,
            blocks_remembered=pool.num_remembered,
            block_size=pool.block_size,
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=scheduler.num_preemptions,
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            finished=dict(self.finished),
            tokens_per_expert=tuple(tuple(layer.tolist()) for layer in _counted(counted, list(uncounted))),
        )


def _counted(counts: list[torch.Tensor], steps: list[StepRouting]) -> list[torch.Tensor]:
    """``counts`` of each layer's experts and those of ``steps``, in new memory; steps of one size side by side."""
    sizes: dict[tuple[int, int], list[StepRouting]] = {}
    for step in steps:
        sizes.setdefault((step.rows, step.tokens), []).append(step)
    for (rows, tokens), alike in sizes.items():
        top_k = alike[0].top_k
        layers = torch.split(torch.stack([step.experts for step in alike]), [rows * k for k in top_k], dim=1)
        counts = [
            before + torch.bincount(chosen.reshape(len(alike), rows, k)[:, :tokens].flatten(), minlength=len(before))
            for before, chosen, k in zip(counts, layers, top_k, strict=True)
        ]
    return counts
