"""One step: accumulate, divide once by the step's tokens over all ranks, clip, update; and the loss on held-out text.

ZeRO section 5: gradients are summed over the ranks on their way to their owners.
Communication besides ZeRO's own: one small agreement per step.

[Note: equal bits for equal batches]
Micro-batch (step · accumulation + index) · N + rank holds fixed sequences, its loss is a sum, gradients are added in
the order of these numbers, and divided once by the global number of tokens. So runs with equal N · accumulation compute
equal bits. The loss is multiplied by a power of two near 1 / tokens before backward, which changes no bit in fp32 and
keeps fp16 gradients in range; the rest of the division follows after the sum.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trivium.base.fault import reach
from trivium.dist.comm import Comm
from trivium.models.decoder import Rotary
from trivium.nn import Attend
from trivium.train.build import Parts
from trivium.train.config import TrainConfig
from trivium.train.data import Batch, Corpus, validation_batches
from trivium.train.schedule import factor
from trivium.zero.api import engine_of


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, equal on every rank. ``loss`` is in nats per token, ``losses`` sums per micro-batch in order.

    ``stop`` is the largest ``wish`` that any rank gave.
    """

    step: int
    loss: float
    losses: tuple[float, ...]
    tokens: int
    gradient_norm: float
    lr: float
    finite: bool
    stop: int


class Stepper:
    """Trains ``parts`` step by step. Every method is a collective."""

    def __init__(self, config: TrainConfig, parts: Parts, control: Comm, device: torch.device) -> None:
        self.config, self.parts, self.control, self.device = config, parts, control, device
        self.accumulation = config.train.accumulation_for(control.size)
        self.batches: list[Batch] = []
        full = config.data.sequence * config.train.micro_batch * self.accumulation * control.size
        self._shift = 2.0 ** -int(math.log2(full))

    def step(self, step: int, wish: Callable[[], int] = int) -> StepResult:
        """Step number ``step``, from 0. A step with a non-finite gradient changes no weight.

        ``wish`` is asked when backward is done: a signal that came during the step counts for it.
        """
        parts = self.parts
        self.batches = []
        losses = []
        for _ in range(self.accumulation):
            reach("train.data", rank=self.control.rank, step=step)
            batch = next(parts.loader).to(self.device)
            self.batches.append(batch)
            losses.append(self.backward(batch, step))
        rows = self.control.agree([wish(), sum(batch.num_tokens for batch in self.batches), *map(_to_int, losses)])
        tokens = sum(row[1] for row in rows)
        ordered = tuple(_to_float(row[2 + index]) for index in range(self.accumulation) for row in rows)
        ratio = factor(self.config.schedule, step, self.config.train.steps)
        for group in parts.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * ratio
        finite = engine_of(parts.model).finite and tokens > 0
        norm = self._update(tokens, finite, step)
        return StepResult(
            step=step,
            loss=sum(ordered) / tokens if tokens else math.nan,
            losses=ordered,
            tokens=tokens,
            gradient_norm=norm,
            lr=self.config.optimizer.lr * ratio,
            finite=finite,
            stop=max(row[0] for row in rows),
        )

    def backward(self, batch: Batch, step: int) -> float:
        """Add one micro-batch's gradients; its summed loss."""
        rank = self.control.rank
        reach("train.forward", rank=rank, step=step)
        loss = self.loss(batch)
        reach("train.backward", rank=rank, step=step)
        (loss * self._shift).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def loss(self, batch: Batch) -> torch.Tensor:
        """The summed loss of one micro-batch."""
        alone = bool((batch.documents == batch.documents[:, :1]).all())
        loss: torch.Tensor = self.parts.model(
            batch.tokens,
            batch.targets,
            positions_BT=batch.positions,
            documents_BT=None if alone else batch.documents,
            reduction="sum",
            run_block=recomputed if self.config.train.recompute and torch.is_grad_enabled() else None,
        )
        return loss

    def _update(self, tokens: int, finite: bool, step: int) -> float:
        optimizer = self.parts.optimizer
        reach("train.optimizer", rank=self.control.rank, step=step)
        if tokens:
            for group in optimizer.param_groups:
                for segment in group["params"]:
                    if segment.grad is not None:
                        segment.grad.div_(tokens * self._shift)
            norm = float(optimizer.clip_grad_norm_(self.config.train.clip or math.inf))
            optimizer.step()
        else:
            norm = math.nan
        optimizer.zero_grad()
        return norm

    @torch.no_grad()
    def validate(self, corpus: Corpus) -> tuple[float, int]:
        """Nats per token on held-out text, and how many tokens; the same bits on any number of ranks."""
        settings = self.config.train
        sums: list[tuple[int, float, int]] = []
        for batch in validation_batches(
            corpus,
            sequence=self.config.data.sequence,
            batch_size=settings.micro_batch,
            rank=self.control.rank,
            size=self.control.size,
            limit=settings.validation_batches or None,
            vocabulary=self.parts.decoder.vocabulary,
        ):
            sums.append((batch.number, float(self.loss(batch.to(self.device))), batch.num_tokens))
        rows = self.control.agree([number for sum_ in sums for number in (sum_[0], _to_int(sum_[1]), sum_[2])])
        flat = sorted((row[i], row[i + 1], row[i + 2]) for row in rows for i in range(0, len(row), 3))
        tokens = sum(count for _, _, count in flat)
        return sum(_to_float(bits) for _, bits, count in flat if count) / max(tokens, 1), tokens


def recomputed(block: nn.Module, x_BTC: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
    """Run a block and keep only its input; backward runs it again."""
    run: Callable[..., torch.Tensor] = block
    out: torch.Tensor = checkpoint(run, x_BTC, rotary, attend, use_reentrant=False)
    return out


def _to_int(number: float) -> int:
    """The bits of an fp64 as int64, to send it exactly."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _to_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
