"""A run from its config to its report: build, resume, step, validate, save, stop when asked. The same code on one rank.

ZeRO section 5. Communication: every rank calls `train`; what is sent is ZeRO's own, one agreement per step, and small
agreements around checkpoints and rows of metrics.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trivium import __version__, zero
from trivium.base import config as configs
from trivium.base import log
from trivium.base.units import format_count
from trivium.checkpoint import check_folder
from trivium.checkpoint.commit import lock
from trivium.dist.ledger import Ledger
from trivium.dist.mesh import Mesh
from trivium.memory.pages import recycled_pages
from trivium.models import DecoderConfig
from trivium.train import evaluate, saving, tasks
from trivium.train.build import Parts, Text, assemble, check_corpus, check_prompts, lead, read_text
from trivium.train.config import TrainConfig
from trivium.train.data import Baseline, baseline
from trivium.train.digest import weights_sha256
from trivium.train.metrics import AllocatorPeak, Recorder, Writer, measured_peak_flops, process_memory
from trivium.train.nonfinite import Policy
from trivium.train.objective import Objective
from trivium.train.progress import Display
from trivium.train.report import Planned
from trivium.train.report import write as write_report
from trivium.train.router import EXCHANGE_PHASES, TaskChoices, task_choices
from trivium.train.saving import Progress
from trivium.train.step import Stepper, StepResult
from trivium.train.stop import Stop, signals
from trivium.train.writers import open_writers

MakeObjective = Callable[[TrainConfig, Parts, Mesh, dict[str, Any] | None], Objective]
PlanBeside = Callable[[TrainConfig, DecoderConfig, int, Mapping[str, int]], Sequence[Planned]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended, equal on every rank but for ``rows``, which rank 0 has.

    ``signal``: 0 when all steps were done, else the signal that stopped it. ``memory``: peak bytes by category of rank
    0. ``validation`` is the last one (nats per token), None without. ``scores``: exact answers per task, 0 to 1.
    ``experts``: how often each layer sends each task's tokens to each expert; empty without tasks or experts.
    """

    steps: int
    skipped: int
    loss: float | None
    validation: float | None
    signal: int
    checkpoint: Path | None
    memory: dict[str, int]
    baseline: Baseline | None
    scores: dict[str, float]
    samples: tuple[tuple[str, str], ...]
    experts: TaskChoices
    rows: tuple[dict[str, Any], ...]
    planned: tuple[Planned, ...]
    digest: str | None
    report: Path | None


def train(
    config: TrainConfig,
    mesh: Mesh,
    *,
    terminal: bool | None = None,
    plan: PlanBeside | None = None,
    writers: Sequence[Writer] = (),
    objective: MakeObjective | None = None,
    ends_process: bool = False,
) -> Outcome:
    """Run ``config`` on ``mesh``. Collective. ``terminal``: whether progress is live (None: if stderr is one).
    ``plan`` (from a floor above) is put beside what was measured. ``writers`` see every row of metrics, on rank 0.
    ``objective`` makes the loss, given the resumed run's saved state of it (None in a new run); None: the language
    model's. ``ends_process``: a launcher's SIGTERM, sent as soon as a peer is lost, cuts off no word about an error.

    Raises ConfigError, DataError, CheckpointError, NonFiniteError; SIGTERM and Ctrl-C end it after the step, saved.
    """
    config.check_ranks(mesh.data_size)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with contextlib.ExitStack() as stack:
        lead(mesh, "opening the run's folder", lambda: _open_folder(config, stack))
        extras = lead(mesh, "opening writers", lambda: open_writers(config)) or ()
        text = read_text(config, mesh)
        check_corpus(text, config)
        check_prompts(text, config)
        lead(mesh, "saving the tokenizer", lambda: text.tokenizer.save(config.folder))
        run = _Run(config, mesh, text, (*extras, *writers), plan, objective)
        stack.callback(run.recorder.close)
        with signals(deaf_after_error=ends_process and mesh.size > 1) as stop:
            return run.go(stop, terminal)


def _open_folder(config: TrainConfig, stack: contextlib.ExitStack) -> None:
    check_folder(config.folder)
    stack.enter_context(lock(config.folder))


class _Run:
    """The parts of one run and its rows of metrics."""

    def __init__(
        self,
        config: TrainConfig,
        mesh: Mesh,
        text: Text,
        writers: Sequence[Writer],
        plan: PlanBeside | None,
        objective: MakeObjective | None,
    ) -> None:
        self._plan = plan
        self.config, self.mesh, self.text = config, mesh, text
        self.leads = mesh.rank == 0
        self.parts: Parts = assemble(config, mesh, text)
        self.progress = saving.resume(config, self.parts, mesh)
        self.control = mesh.channel(mesh.comm("dp"), "control")
        made = None if objective is None else objective(config, self.parts, mesh, self.progress.objective)
        self.stepper = Stepper(config, self.parts, self.control, mesh.device, made)
        self.policy = Policy(config, self.stepper)
        folder = config.folder if self.leads else None
        self.recorder = Recorder(folder, tuple(writers), resumed=self.progress.step)
        self.baseline = self._baseline()
        self.peak_flops = self._peak()
        self.loss: float | None = None
        self.validation: float | None = None
        self.saved_step: int | None = None
        self.checkpoint: Path | None = None
        self._steps_here = self._held = 0
        self._watched: AllocatorPeak | None = None

    def go(self, stop: Stop, terminal: bool | None) -> Outcome:
        """Do the steps that are left, then evaluate."""
        steps = self.config.train.steps
        self._start()
        signal = 0
        if self.leads and self.progress.step >= steps:
            log.get().info("all %d steps are done already; raise train.steps to go on", self.progress.step)
        display = Display(
            steps=steps,
            done=self.progress.step,
            every=self.config.train.log_every,
            shown=self.leads,
            terminal=terminal,
        )
        with display:
            if self.progress.step == 0:
                self._validate(display)
            while self.progress.step < steps and not signal:
                signal = self._step(stop, display)
        last = self.progress.step
        if self.saved_step != last and (last < steps or self.loss is not None):
            self._save()
        scores: dict[str, float] = {}
        samples: tuple[tuple[str, str], ...] = ()
        experts: TaskChoices = {}
        if not signal:
            scores, samples = self._answers()
            experts = self._task_experts()
        self.recorder.write(
            "end",
            step=last,
            signal=signal,
            scores=scores,
            samples=samples,
            skipped=self.progress.skipped,
            experts=experts,
        )
        rows = self.recorder.read()
        planned = self._beside_plan(rows)
        digest = weights_sha256(self.parts.model) if self.config.report.digest and not signal else None
        report: Path | None = None
        if self.leads and self.config.report.html and not signal:
            report = write_report(self.config.folder, rows, planned)
        self.mesh.comm("world").barrier()
        return Outcome(
            steps=last,
            skipped=self.progress.skipped,
            loss=self.loss,
            validation=self.validation,
            signal=signal,
            checkpoint=self.checkpoint,
            memory=zero.meter_of(self.parts.model).by_label(peak=True),
            baseline=self.baseline,
            scores=scores,
            samples=samples,
            experts=experts,
            rows=tuple(rows),
            planned=planned,
            digest=digest,
            report=report,
        )

    def _step(self, stop: Stop, display: Display) -> int:
        """One step and what follows it; the signal that ends the run, or 0."""
        settings = self.config.train
        waited, begun = self.mesh.link.waited_s, time.perf_counter()
        with self.mesh.ledger() as sent, self._watch():
            result = self.stepper.step(self.progress.step, lambda: stop.wish)
        seconds = time.perf_counter() - begun
        counted = self.policy.see(result)
        self.progress = Progress(
            step=self.progress.step + 1,
            skipped=self.progress.skipped + (not counted),
            tokens=self.progress.tokens + result.tokens,
        )
        self.loss = result.loss if counted else self.loss
        self._row(result, sent, seconds, self.mesh.link.waited_s - waited)
        done = self.progress.step
        told = self.stepper.objective.after_step(done)
        if told is not None:
            self.recorder.write("objective", step=done, **told)
        display.step(done, result.loss, result.tokens / seconds)
        asks = self.config.report.score_every
        if asks and done % asks == 0 and done < settings.steps and not result.stop:
            self._score(display)
        every = settings.validate_every
        if every and (done % every == 0 or done == settings.steps) and not result.stop:
            self._validate(display)
        if self.config.checkpoint.every and done % self.config.checkpoint.every == 0:
            self._save()
        return result.stop

    @contextlib.contextmanager
    def _watch(self) -> Iterator[None]:
        """The third step of this process tells how many bytes a step takes in all, to be put beside the plan."""
        self._steps_here += 1
        if self._steps_here != 3 or self._plan is None or not self.leads:
            yield
            return
        self._held = zero.meter_of(self.parts.model).live_bytes()
        with AllocatorPeak(self.mesh.device) as self._watched:
            yield

    def _row(self, result: StepResult, sent: Ledger, seconds: float, waited: float) -> None:
        memory = None
        more: dict[str, Any] = dict(result.extras)
        if result.detours is not None:
            more["detours"] = result.detours
        if self.progress.step % self.config.train.log_every == 0 or self.progress.step == 1:
            memory = self.control.all_gather_json(process_memory())
            if self.stepper.router is not None:
                more["router"] = self.stepper.router.read(self.control)
        flops = self.parts.decoder.flops_per_token(self.config.data.sequence) * self._sequence_tokens() / seconds
        self.recorder.write(
            "step",
            step=self.progress.step,
            loss=result.loss,
            lr=result.lr,
            gradient_norm=result.gradient_norm,
            tokens=result.tokens,
            epoch=self.parts.loader.epoch,
            step_s=seconds,
            tokens_per_s=result.tokens / seconds,
            flops_per_s=flops,
            flops_share=flops / self.peak_flops,
            sent_bytes=sent.bytes,
            payload_bytes=sent.payload_bytes,
            sent_by_phase=sent.bytes_by("phase"),
            calls=sent.calls,
            waited_s=waited,
            memory=zero.meter_of(self.parts.model).by_label(peak=True),
            process=memory,
            skipped=self.progress.skipped,
            loss_scale=zero.api.engine_of(self.parts.model).scale.value,
            **more,
        )

    def _beside_plan(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Planned, ...]:
        """What rank 0 was forecast to hold and send, beside what it did."""
        steps = [row for row in rows if row["kind"] == "step"]
        if not self.leads or self._plan is None or not steps:
            return ()
        away = [sum(row["sent_by_phase"].get(phase, 0) for phase in EXCHANGE_PHASES) for row in steps]
        sent = [row["payload_bytes"] - exchanged for row, exchanged in zip(steps, away, strict=True)]
        measured = {**zero.meter_of(self.parts.model).by_label(peak=True), "sent": sorted(sent)[len(sent) // 2]}
        if any(away):
            measured["exchanged"] = sorted(away)[len(away) // 2]
        if self._watched is not None:
            measured["total"] = self._watched.num_bytes + self._held
            if recycled_pages(self.mesh.device) is not None:  # these the allocator does not see, and they are kept
                measured["total"] += measured.get("gathered", 0)
        return tuple(self._plan(self.config, self.parts.decoder, self.mesh.data_size, measured))

    def _sequence_tokens(self) -> int:
        return (
            self.config.data.sequence * self.config.train.micro_batch * self.stepper.accumulation * self.mesh.data_size
        )

    def _validate(self, display: Display) -> None:
        if not self.config.train.validate_every:
            return
        begun = time.perf_counter()
        loss, tokens = self.stepper.validate(self.text.validation)
        self.validation = loss
        self.recorder.write(
            "validation", step=self.progress.step, loss=loss, tokens=tokens, seconds=time.perf_counter() - begun
        )
        display.validation(self.progress.step, loss)

    def _save(self) -> None:
        begun = time.perf_counter()
        progress = replace(self.progress, objective=self.stepper.objective.state())
        written = saving.save(self.config, self.parts, self.mesh, progress)
        if written is not None:
            self.checkpoint, self.saved_step = written, self.progress.step
            self.recorder.write("save", step=self.progress.step, path=str(written), seconds=time.perf_counter() - begun)

    def _baseline(self) -> Baseline | None:
        """Counted on rank 0 alone; the others have None."""
        if not self.config.train.validate_every:
            return None
        return lead(self.mesh, "counting the baselines", lambda: baseline(self.text.train, self.text.validation))

    def _peak(self) -> float:
        """FLOP/s of a matrix product on all ranks at once, added up."""
        mine = measured_peak_flops(self.mesh.device, getattr(torch, self.config.model.dtype))
        return math.fsum(self.control.all_gather_json(mine))

    def _score(self, display: Display) -> None:
        """Ask a few held-out inputs of each task on the way, and show which expert takes which task."""
        if self.config.tasks is None:
            return
        writer = evaluate.Generator(self.parts.model, self.text.tokenizer, self.control, self.mesh.device)
        found = tasks.exact_match(
            lambda prompts: writer.answers(prompts, max_tokens=32),
            self.config.tasks,
            count=self.config.report.score_prompts,
        )
        scores = {name: score.share for name, score in found.items()}
        experts = self._task_experts()
        self.recorder.write("scores", step=self.progress.step, scores=scores, experts=experts)
        display.scores(self.progress.step, scores, experts)

    def _task_experts(self) -> TaskChoices:
        if self.config.tasks is None or self.parts.decoder.moe is None:
            return {}
        using = self.text.tokenizer
        return task_choices(self.parts.model, self.config.tasks, using, self.control, self.mesh.device)

    def _answers(self) -> tuple[dict[str, float], tuple[tuple[str, str], ...]]:
        settings = self.config.report
        writer = evaluate.Generator(self.parts.model, self.text.tokenizer, self.control, self.mesh.device)
        scores: dict[str, float] = {}
        if self.config.tasks is not None:
            found = tasks.exact_match(
                lambda prompts: writer.answers(prompts, max_tokens=32), self.config.tasks, count=settings.task_prompts
            )
            scores = {name: score.share for name, score in found.items()}
        texts = writer.answers(settings.prompts, max_tokens=settings.sample_tokens) if settings.prompts else []
        return scores, tuple(zip(settings.prompts, texts, strict=True))

    def _start(self) -> None:
        decoder, parts = self.parts.decoder, self.parts
        counts = self.baseline
        self.recorder.write(
            "start",
            step=self.progress.step,
            config=configs.to_dict(self.config),
            model=configs.to_dict(decoder),
            parameters=decoder.num_parameters(),
            activated=decoder.num_activated_parameters(),
            ranks=self.mesh.data_size,
            threads=torch.get_num_threads(),
            accumulation=self.stepper.accumulation,
            sequences=parts.loader.num_sequences,
            text=self.text.source,
            unigram=None if counts is None else counts.unigram,
            bigram=None if counts is None else counts.bigram,
            peak_flops=self.peak_flops,
            versions={"trivium": __version__, "torch": str(torch.__version__)},
        )
        if self.leads:
            log.get().info(
                "%s parameters on %d rank(s) at stage %d, %s; %d sequences of %d tokens; %d pass(es) of %d sequences "
                "per rank and step",
                format_count(decoder.num_parameters()),
                self.mesh.data_size,
                self.config.zero.stage,
                self.text.source,
                parts.loader.num_sequences,
                self.config.data.sequence,
                self.stepper.accumulation,
                self.config.train.micro_batch,
            )
            if counts is not None:
                log.get().info("by counting alone: unigram %.3f, bigram %.3f nats", counts.unigram, counts.bigram)
