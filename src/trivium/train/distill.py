"""A student of fewer layers learns from a teacher, for part of its run: mixture of students.

DeepSpeed-MoE section 4.2. Loss = cross-entropy + alpha · T² · KL(teacher ‖ student) + the experts' auxiliary losses;
distilling to the end hurts a small student, so it is staged: it stops, and the run goes on with the rest.
Communication: the teacher is sharded at stage 3 without an optimizer; its forward gathers as any forward does.

[Note: when distillation holds the student back]
Let a be the gradient of the cross-entropy and b that of the divergence, both by all parameters of the student, summed
over the same held-out text. A small step along -b changes the cross-entropy by -a·b: while the cosine of a and b is
above 0, following the teacher also lowers the cross-entropy; below 0 it raises it. `agreement` measures the cosine from
the norms of a, b and a + b, which ZeRO computes at any stage, each expert once. ``stop = "auto"`` ends the stage at the
first check with a cosine of at most ``conflict`` for ``patience`` checks in succession.
"""

from __future__ import annotations

import gc
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from trivium import checkpoint, zero
from trivium.base import config as configs
from trivium.base import log
from trivium.base.errors import CheckpointError, ConfigError
from trivium.checkpoint.convert import describe
from trivium.dist.mesh import Mesh
from trivium.models import Decoder, DecoderConfig, Record, build
from trivium.nn import SoftTargets
from trivium.train.build import Parts, first
from trivium.train.config import DistillConfig, TrainConfig
from trivium.train.data import Batch, Tokenizer, validation_batches
from trivium.train.layers import pair_layers
from trivium.train.objective import LanguageModel, Measured, settings


@dataclass(kw_only=True)
class Stage:
    """Whether a run still distils: pure numbers, saved with the run. ``stopped``: the step after which it ended."""

    config: DistillConfig
    steps: int
    stopped: int | None = None
    in_a_row: int = 0

    def checks(self, done: int) -> bool:
        """Whether the agreement is to be measured after ``done`` steps."""
        return self.stopped is None and self.config.stop == "auto" and done % self.config.check_every == 0

    def after(self, done: int, agreement: float | None = None) -> bool:
        """Whether the stage ends with ``done`` steps; ``agreement`` where it was measured."""
        if self.stopped is not None:
            return False
        if agreement is not None:
            self.in_a_row = self.in_a_row + 1 if agreement <= self.config.conflict else 0
        last = self.last
        if (last is not None and done >= last) or self.in_a_row >= self.config.patience:
            self.stopped = done
        return self.stopped is not None

    @property
    def last(self) -> int | None:
        """The last step that distils, where it is given; 0: none does."""
        stop = self.config.stop
        if isinstance(stop, str):
            return None
        return stop if isinstance(stop, int) else round(stop * self.steps)


class Distillation:
    """The objective of a distilling run, as `trivium.train.loop.train` takes it. Every method is a collective."""

    def __init__(self, config: TrainConfig, parts: Parts, mesh: Mesh, state: dict[str, Any] | None) -> None:
        if config.distill is None:
            raise ConfigError("this run has no [distill] table: name a teacher, distill.teacher = 'runs/teacher'")
        self.config, self.parts, self.mesh = config, parts, mesh
        self.stage = Stage(config=config.distill, steps=config.train.steps)
        self.plain = LanguageModel(parts.model, recompute=config.train.recompute)
        self.teacher: Decoder | None = None
        if state is not None:
            self.stage.stopped, self.stage.in_a_row = state.get("stopped"), state.get("in_a_row", 0)
        if self.stage.last == 0 and self.stage.stopped is None:
            self.stage.stopped = 0
        if self.stage.stopped is None or (state is None and config.distill.init == "layers"):
            self.teacher = load_teacher(config, parts, mesh)
            if state is None and config.distill.init == "layers":
                copy_layers(self.teacher, parts.model, config.distill.layers, lead=mesh.rank == 0)
        if self.stage.stopped is not None:
            self._let_go()

    def names(self) -> tuple[str, ...]:
        """The plain objective's, and ``divergence`` (T² · KL per token) while distilling."""
        return self.plain.names() + (("divergence",) if self.teacher is not None else ())

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the stage."""
        return {"stopped": self.stage.stopped, "in_a_row": self.stage.in_a_row}

    def __call__(self, batch: Batch) -> Measured:
        """The student's loss on ``batch``; the teacher reads it first, without gradient."""
        if self.teacher is None:
            return self.plain(batch)
        measured, divergence = self._loss(self.teacher, batch, 1.0, self.stage.config.alpha)
        return Measured(
            total=measured.total,
            cross_entropy=measured.cross_entropy,
            extras=(*measured.extras, divergence),
            aux=measured.aux,
        )

    def after_step(self, done: int) -> dict[str, Any] | None:
        """End the stage when it is time, and let the teacher go; a row of metrics when there is something to tell."""
        if self.teacher is None:
            return None
        agreement = self.agreement() if self.stage.checks(done) else None
        ended = self.stage.after(done, agreement)
        if ended:
            self._let_go()
            if self.mesh.rank == 0:
                why = "" if agreement is None else f": the gradients' cosine is {agreement:.3f}"
                log.get().info("step %d: distillation ends%s; on with the cross-entropy alone", done, why)
        if agreement is None and not ended:
            return None
        return {"agreement": agreement, "ended": ended}

    def _let_go(self) -> None:
        """Give the teacher's memory back: a sharded model and its engine refer to each other."""
        if self.teacher is not None:
            self.teacher = None
            gc.collect()

    def agreement(self) -> float:
        """The cosine of the two losses' gradients on held-out text; see [Note: when distillation holds ...]."""
        teacher, model = self.teacher, self.parts.model
        if teacher is None:
            raise ConfigError("distillation has ended: there is no teacher to agree with")
        settings, control = self.config, self.mesh.channel(self.mesh.comm("dp"), "control")
        batches = [
            batch.to(self.mesh.device)
            for batch in validation_batches(
                self.parts.text.validation,
                sequence=settings.data.sequence,
                batch_size=settings.train.micro_batch,
                rank=control.rank,
                size=control.size,
                limit=self.stage.config.check_batches * control.size,
                vocabulary=self.parts.decoder.vocabulary,
            )
        ]
        model.eval()  # no auxiliary losses, nothing random
        norms = []
        for hard, soft in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            for batch in batches:
                measured, _ = self._loss(teacher, batch, hard, soft)
                (measured.total / batch.tokens.numel()).backward()  # type: ignore[no-untyped-call]
            norms.append(float(self.parts.optimizer.clip_grad_norm_(math.inf)))
            self.parts.optimizer.zero_grad()
        model.train()
        first, second, both = norms
        if not all(map(math.isfinite, norms)) or first * second == 0.0:
            return 1.0
        return (both**2 - first**2 - second**2) / (2 * first * second)

    def _loss(self, teacher: Decoder, batch: Batch, hard: float, soft: float) -> tuple[Measured, torch.Tensor]:
        given = settings(batch, self.config.train.recompute)
        with torch.no_grad():
            x_BTC: torch.Tensor = teacher(batch.tokens, hidden=True, **{**given, "run_block": None})
        x_NC = x_BTC.flatten(0, 1)
        record = Record()
        with zero.gathered(teacher.head):
            weight_VC = teacher.head.weight.detach()
            opinion = SoftTargets(
                logits=lambda start, stop: F.linear(x_NC[start:stop], weight_VC),
                hard_weight=hard,
                soft_weight=soft,
                temperature=self.stage.config.temperature,
            )
            total: torch.Tensor = self.parts.model(
                batch.tokens, batch.targets, reduction="sum", record=record, soft=opinion, **given
            )
        entropy, divergence = record.cross_entropy, record.divergence
        if entropy is None or divergence is None:
            raise ConfigError("the student's forward gave no divergence: is its model a Decoder?")
        aux = total.detach() - hard * entropy.detach() - soft * divergence.detach()
        extras = (aux,) if self.plain.names() else ()
        measured = Measured(total=total, cross_entropy=entropy.detach(), extras=extras, aux=record.aux)
        return measured, divergence.detach()


def load_teacher(config: TrainConfig, parts: Parts, mesh: Mesh) -> Decoder:
    """The teacher of ``config``, sharded at stage 3, frozen, in evaluation mode. Collective."""
    wanted = config.distill
    if wanted is None:
        raise ConfigError("this run has no [distill] table")
    folder, shape = first(mesh, "looking for the teacher", lambda: find_teacher(Path(wanted.teacher).expanduser()))
    if shape.vocabulary != parts.decoder.vocabulary:
        raise ConfigError(
            f"the teacher has a vocabulary of {shape.vocabulary}, the student of {parts.decoder.vocabulary}: they must "
            "read the same tokens; give the student the teacher's tokenizer (data.tokenizer)"
        )
    own = parts.text.tokenizer
    known = first(mesh, "comparing the tokenizers", lambda: same_tokenizer(folder.parent, own))
    if not known and mesh.rank == 0:
        log.get().warning(
            "%s holds no tokenizer.json: that the teacher reads the student's tokens is taken on trust", folder.parent
        )
    if shape.max_positions < config.data.sequence:
        raise ConfigError(
            f"the teacher reads {shape.max_positions} tokens at most, data.sequence={config.data.sequence}"
        )
    model = build(
        shape,
        device="meta",
        dtype=getattr(torch, config.model.dtype),
        seed=config.train.seed,
        mesh=mesh,
        ep=(config.mesh.ep if isinstance(config.mesh.ep, int) else 1) if shape.moe is not None else None,
    )
    model.requires_grad_(False)
    model.eval()
    zero.shard(model, None, mesh, stage=3, seed=config.train.seed, bucket_bytes=config.zero.bucket_bytes)
    checkpoint.load(folder, model=model, mesh=mesh)
    if mesh.rank == 0:
        log.get().info("the teacher is %s: %s parameters", folder, f"{shape.num_parameters():,}")
    return model


def find_teacher(path: Path) -> tuple[Path, DecoderConfig]:
    """The checkpoint that ``path`` is, or the newest one in it, and its model's shape. Raises CheckpointError."""
    folder = path if (path / "manifest.json").is_file() else checkpoint.latest(path)
    if folder is None:
        raise CheckpointError(
            f"distill.teacher={str(path)!r} holds no complete checkpoint: name a run's folder or one of its step-… "
            "folders"
        )
    extra = describe(folder).extra
    if not isinstance(extra, dict) or "model" not in extra:
        raise CheckpointError(f"{folder} was not written by trivium train: it does not say its model's shape")
    return folder, configs.build(DecoderConfig, extra["model"], f"{folder}: model")


def same_tokenizer(folder: Path, own: Tokenizer) -> bool:
    """Whether the teacher's ``folder`` tells its tokenizer; ConfigError where it makes other tokens than ``own``."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return False
    theirs, ours = (json.loads(one.to_json()) for one in (Tokenizer.load(file), own))
    apart = [
        key for key in ("model", "added_tokens", "normalizer", "pre_tokenizer") if theirs.get(key) != ours.get(key)
    ]
    if apart:
        raise ConfigError(
            f"the teacher's tokenizer, {file}, differs from the student's in its {', '.join(apart)}: they must read "
            f"the same tokens; set data.tokenizer = {str(file)!r}"
        )
    return True


def copy_layers(teacher: Decoder, student: Decoder, layers: tuple[int, ...] | None, *, lead: bool) -> None:
    """Begin with the teacher's table, norm, head and chosen layers. Collective; one layer whole at a time."""
    chosen = pair_layers(teacher.config, student.config, layers)
    if lead:
        log.get().info("the student's layers begin as the teacher's %s", ", ".join(map(str, chosen)))
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = [
        (teacher.embed, student.embed),
        *((teacher.blocks[source], block) for source, block in zip(chosen, student.blocks, strict=True)),
        (teacher.norm, student.norm),
        (teacher.head, student.head),
    ]
    for source, target in pairs:
        with zero.gathered(source), zero.gathered(target), torch.no_grad():
            values = dict(source.named_parameters())
            for name, parameter in target.named_parameters():
                parameter.copy_(values[name])
            buffers = dict(source.named_buffers())
            for name, buffer in target.named_buffers():
                if name in buffers:  # a gate's bias that the teacher's has not stays as built: zero
                    buffer.copy_(buffers[name])


def objective(config: TrainConfig, parts: Parts, mesh: Mesh, state: dict[str, Any] | None) -> Distillation:
    """For `trivium.train.loop.train`: ``state`` is what a resumed run saved, None for a new one."""
    return Distillation(config, parts, mesh, state)
