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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from trivium.base.fault import reach
from trivium.dist.comm import Comm
from trivium.train.build import Parts
from trivium.train.config import TrainConfig
from trivium.train.data import Batch, Corpus, validation_batches
from trivium.train.objective import LanguageModel, Measured, Objective
from trivium.train.router import RouterLog
from trivium.train.schedule import factor
from trivium.zero.api import engine_of


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What a step did, equal on every rank. ``loss`` is in nats per token, ``losses`` sums per micro-batch in order:
    both the cross-entropy alone. ``extras``: what else the objective holds, per token. ``detours``: gathers
    that the step passed over or made outside of its plan, those that its end left over aside, by this rank's own count;
    None where parameters are not sharded.

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
    extras: Mapping[str, float] = field(default_factory=dict)
    detours: int | None = None


class Stepper:
    """Trains ``parts`` step by step towards ``objective`` (None: the language model's). Every method is a collective.

    ``router`` counts what layers with experts choose; None where there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        parts: Parts,
        control: Comm,
        device: torch.device,
        objective: Objective | None = None,
    ) -> None:
        self.config, self.parts, self.control, self.device = config, parts, control, device
        self.objective = (
            LanguageModel(parts.model, recompute=config.train.recompute) if objective is None else objective
        )
        self.router = None if parts.decoder.moe is None else RouterLog(parts.model)
        self.accumulation = config.train.accumulation_for(control.size)
        self.batches: list[Batch] = []
        full = config.data.sequence * config.train.micro_batch * self.accumulation * control.size
        self._shift = 2.0 ** -int(math.log2(full))

    def step(self, step: int, wish: Callable[[], int] = int) -> StepResult:
        """Step number ``step``, from 0. A step with a non-finite gradient changes no weight.

        ``wish`` is asked when backward is done: a signal that came during the step counts for it.
        """
        parts = self.parts
        conductor = engine_of(parts.model).conductor
        detours = conductor.num_detours
        self.batches = []
        losses, extras, names = [], [], self.objective.names()
        for _ in range(self.accumulation):
            reach("train.data", rank=self.control.rank, step=step)
            batch = next(parts.loader).to(self.device)
            self.batches.append(batch)
            measured = self.backward(batch, step)
            losses.append(float(measured.cross_entropy.detach()))
            extras += [float(extra.detach()) for extra in measured.extras]
            if self.router is not None:
                self.router.add(measured.aux)
        counted = sum(batch.num_tokens for batch in self.batches)
        rows = self.control.agree([wish(), counted, *map(_to_int, losses + extras)])
        tokens = sum(row[1] for row in rows)
        ordered = tuple(_to_float(row[2 + index]) for index in range(self.accumulation) for row in rows)
        ratio = factor(self.config.schedule, step, self.config.train.steps)
        for group in parts.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * ratio
        finite = engine_of(parts.model).finite and tokens > 0
        norm = self._update(tokens, finite, step)
        if self.router is not None:
            self.router.update_biases(self.control, keep=finite)
        return StepResult(
            step=step,
            loss=sum(ordered) / tokens if tokens else math.nan,
            losses=ordered,
            tokens=tokens,
            gradient_norm=norm,
            lr=self.config.optimizer.lr * ratio,
            finite=finite,
            stop=max(row[0] for row in rows),
            extras=_per_token(names, [row[2 + self.accumulation :] for row in rows], tokens),
            detours=conductor.num_detours - detours if self.config.zero.row.parameter else None,
        )

    def backward(self, batch: Batch, step: int) -> Measured:
        """Add one micro-batch's gradients; its sums."""
        rank = self.control.rank
        reach("train.forward", rank=rank, step=step)
        measured = self.objective(batch)
        reach("train.backward", rank=rank, step=step)
        (measured.total * self._shift).backward()  # type: ignore[no-untyped-call]
        return measured

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
        settings, model = self.config.train, self.parts.model
        objective = LanguageModel(model)
        model.eval()
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
            loss = objective(batch.to(self.device)).cross_entropy
            sums.append((batch.number, float(loss), batch.num_tokens))
        model.train()
        rows = self.control.agree([number for sum_ in sums for number in (sum_[0], _to_int(sum_[1]), sum_[2])])
        flat = sorted((row[i], row[i + 1], row[i + 2]) for row in rows for i in range(0, len(row), 3))
        tokens = sum(count for _, _, count in flat)
        return sum(_to_float(bits) for _, bits, count in flat if count) / max(tokens, 1), tokens


def _per_token(names: Sequence[str], rows: Sequence[Sequence[int]], tokens: int) -> dict[str, float]:
    """Sums of ``names`` over ranks and micro-batches, per token; each row repeats all names."""
    return {
        name: math.fsum(_to_float(bits) for row in rows for bits in row[place :: len(names)]) / max(tokens, 1)
        for place, name in enumerate(names)
    }


def _to_int(number: float) -> int:
    """The bits of an fp64 as int64, to send it exactly."""
    return int(struct.unpack("<q", struct.pack("<d", number))[0])


def _to_float(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])
