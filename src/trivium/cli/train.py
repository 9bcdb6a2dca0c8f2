"""``trivium train``: one configuration to a trained model, alone, under a launcher, or with ``--ranks`` here."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from trivium.base import config as configs
from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.base.units import format_bytes
from trivium.cli import launching
from trivium.cli import train_options as options
from trivium.cli.output import print_json, word_console

if TYPE_CHECKING:
    from trivium.models import DecoderConfig
    from trivium.train.config import TrainConfig
    from trivium.train.loop import MakeObjective, Outcome
    from trivium.train.report import Planned


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("train", help="Train a language model from a configuration, alone or under torchrun.")(train)


def train(
    config: Annotated[Path, typer.Argument(help="The run as a TOML or JSON file.")],
    set_: options.Set = None,
    ranks: options.Ranks = None,
    resume: options.Resume = None,
    run: options.Run = None,
    as_json: options.AsJson = False,
    launched: options.Launched = None,
    terminal: options.Terminal = False,
) -> None:
    """Train until train.steps; Ctrl-C or SIGTERM stops after the step and saves."""
    overrides = (*(set_ or ()), *given(run, resume))
    settings = settings_of(config, overrides)
    if settings.distill is not None:
        raise ConfigError(f"{config} has a [distill] table: use trivium distill {config}")
    start("train", config, overrides, settings, Call(ranks, as_json, launched, terminal))


class Call(NamedTuple):
    """How a verb that trains was called."""

    ranks: int | None
    as_json: bool
    launched: Path | None
    terminal: bool


def start(
    verb: str,
    config: Path,
    overrides: Sequence[str],
    settings: TrainConfig,
    call: Call,
    objective: MakeObjective | None = None,
) -> None:
    """Start the ranks, or be one of them; tell how it ended, and exit with its code unless that is 0."""
    if call.ranks is not None and call.launched is None:
        settings.check_ranks(call.ranks)
        arguments = [str(config), *(word for text in overrides for word in ("--set", text))]
        code, answer = launching.launch(verb, arguments, call.ranks)
    else:
        code, answer = launching.as_rank(
            call.launched, lambda: _run(settings, call.launched is not None, call.terminal, objective)
        )
    if call.launched is None and answer is not None:
        _tell(answer, call.as_json)
    if code:
        raise typer.Exit(code)


def settings_of(path: Path, overrides: Sequence[str]) -> TrainConfig:
    """The configuration with what the command line replaces."""
    from trivium.train.config import TrainConfig

    return configs.load(TrainConfig, path, overrides)


def given(run: str | None, resume: str | None) -> list[str]:
    """The two options as overrides: torchrun, which parses the ranks' arguments too, takes --run for one of its own."""
    told = [] if run is None else [f"run={json.dumps(run)}"]
    return told if resume is None else [*told, f"checkpoint.resume={json.dumps(resume)}"]


def _run(settings: TrainConfig, launched: bool, terminal: bool, objective: MakeObjective | None) -> tuple[int, Any]:
    """This process's part of the run: exit code, and on rank 0 how it ended."""
    import torch

    from trivium.dist.launch import init, read_world
    from trivium.train.loop import train as run

    world = read_world()
    log.setup(rank=world.rank, size=world.size if world.rank else 1)
    settings.check_ranks(world.size)
    if launched and not settings.train.threads:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.size))
    how = settings.train
    mesh = init(device=how.device, timeout_s=how.timeout_s, nearby=how.nearby, ep=settings.mesh.largest)
    plan = _beside if objective is None else None  # a teacher's bytes are in no plan
    outcome = run(settings, mesh, terminal=terminal or None, plan=plan, objective=objective, ends_process=True)
    answer = _answer(settings, outcome, mesh.data_size) if mesh.rank == 0 else None
    return (128 + outcome.signal if outcome.signal else 0), answer


def _beside(config: TrainConfig, decoder: DecoderConfig, ranks: int, measured: Mapping[str, int]) -> list[Planned]:
    """What rank 0 was planned to hold and send, beside what it did."""
    from trivium.plan import configured, report
    from trivium.train.report import Planned

    rows = report.compare(configured.plan_run(config, decoder, ranks), measured)
    return [Planned(name=row.name, planned=row.planned, measured=row.measured, agrees=row.agrees) for row in rows]


def _answer(settings: TrainConfig, outcome: Outcome, ranks: int) -> dict[str, Any]:
    """How the run ended, as plain JSON values."""
    steps = [row for row in outcome.rows if row["kind"] == "step"]
    speeds = sorted(row["tokens_per_s"] for row in steps)
    counts = outcome.baseline
    start_row: dict[str, Any] = next((row for row in reversed(outcome.rows) if row["kind"] == "start"), {})
    ended = [row["step"] for row in outcome.rows if row["kind"] == "objective" and row.get("ended")]
    return {
        "run": str(settings.folder),
        "ranks": ranks,
        "parameters": start_row.get("parameters"),
        "activated": start_row.get("activated"),
        "steps": outcome.steps,
        "distilled": ended[-1] if ended else None,
        "skipped": outcome.skipped,
        "loss": outcome.loss,
        "validation": outcome.validation,
        "unigram": None if counts is None else counts.unigram,
        "bigram": None if counts is None else counts.bigram,
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None,
        "memory": outcome.memory,
        "scores": outcome.scores,
        "experts": outcome.experts,
        "samples": [list(pair) for pair in outcome.samples],
        "checkpoint": None if outcome.checkpoint is None else str(outcome.checkpoint),
        "report": None if outcome.report is None else str(outcome.report),
        "planned": {
            row.name: {"planned": row.planned, "measured": row.measured, "agrees": row.agrees}
            for row in outcome.planned
        },
        "sha256": outcome.digest,
        "signal": outcome.signal,
    }


def _tell(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    console = word_console()
    if answer["signal"]:
        console.print(
            f"stopped after step {answer['steps']}; the same command goes on from {answer['checkpoint']}",
            soft_wrap=True,
        )
        return
    told = f"{answer['steps']} steps"
    if answer["distilled"] is not None:
        told += f" (distilled until step {answer['distilled']})"
    if answer["loss"] is not None:
        told += f", training loss {answer['loss']:.4f}"
    if answer["validation"] is not None:
        told += f", validation {answer['validation']:.4f} nats"
    if answer["unigram"] is not None:
        told += f" (by counting alone: unigram {answer['unigram']:.3f}, bigram {answer['bigram']:.3f})"
    console.print(told, soft_wrap=True)
    if answer["sha256"]:
        console.print(f"SHA-256 of the weights: {answer['sha256']}", soft_wrap=True)
    for name, share in answer["scores"].items():
        console.print(f"{name}: {share:.1%} of held-out inputs answered exactly", soft_wrap=True)
    for prompt, text in answer["samples"]:
        console.print(f"{prompt!r} → {text!r}", soft_wrap=True)
    if answer["planned"]:
        console.print(f"{'rank 0':<12}{'plan':>14}{'measured':>14}", soft_wrap=True)
    for name, row in answer["planned"].items():
        off = "exact" if row["planned"] == row["measured"] else f"{row['measured'] / max(row['planned'], 1) - 1:+.1%}"
        mark = "" if row["agrees"] else "  differs"
        console.print(
            f"{name:<12}{format_bytes(row['planned']):>14}{format_bytes(row['measured']):>14}{off:>10}{mark}",
            soft_wrap=True,
        )
    for key in ("checkpoint", "report"):
        if answer[key]:
            console.print(f"{key}: {answer[key]}", soft_wrap=True)
