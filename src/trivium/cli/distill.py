"""``trivium distill``: a student of fewer layers from a teacher's checkpoint, staged, in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trivium.base.errors import ConfigError
from trivium.cli import train_options as options
from trivium.cli.train import Call, given, settings_of, start


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("distill", help="Train a smaller student from a teacher, then on its own.")(distill)


def distill(
    config: Annotated[Path, typer.Argument(help="The student's run as a TOML or JSON file with a table `distill`.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="The teacher's run or checkpoint, in place of distill.teacher.")
    ] = None,
    set_: options.Set = None,
    ranks: options.Ranks = None,
    resume: options.Resume = None,
    run: options.Run = None,
    as_json: options.AsJson = False,
    launched: options.Launched = None,
    terminal: options.Terminal = False,
) -> None:
    """Cross-entropy and the divergence from the teacher, then, from distill.stop on, the cross-entropy alone."""
    from trivium.train.distill import objective

    named = [] if teacher is None else [f"distill.teacher={json.dumps(teacher)}"]
    overrides = (*(set_ or ()), *given(run, resume), *named)
    settings = settings_of(config, overrides)
    if settings.distill is None:
        raise ConfigError(f"{config} has no [distill] table: name the teacher, --teacher runs/teacher")
    start("distill", config, overrides, settings, Call(ranks, as_json, launched, terminal), objective)
