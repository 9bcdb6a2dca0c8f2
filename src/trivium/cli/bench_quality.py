"""``trivium bench quality``: the paper's claims about quality, trained at a small scale over paired seeds."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from trivium.base import log
from trivium.cli.interrupts import load_torch
from trivium.cli.output import word_console
from trivium.cli.report import JsonFile, PlotFile, check_files, keep, tell


def quality(
    claim: Annotated[
        str, typer.Option(help="a: MoE and dense; b: PR-MoE and MoE; c: distilled students; some (a,b), or all.")
    ] = "all",
    seeds: Annotated[int, typer.Option(help="Seeds, from 0.")] = 3,
    jobs: Annotated[int, typer.Option(help="Runs at once, one thread each.")] = 1,
    folder: Annotated[
        Path, typer.Option(help="Where the runs go; those that are complete there are not trained again.")
    ] = Path("runs/quality"),
    configs: Annotated[Path, typer.Option(help="The folder of the runs' configurations.")] = Path("configs/quality"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Replace one value in every run; may be repeated."),
    ] = None,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Every run is a `trivium train` or `trivium distill` of its own; called again, it goes on where it stopped."""
    log.setup()
    load_torch()
    from trivium.bench.quality import lines, run
    from trivium.bench.quality_plot import plot
    from trivium.bench.quality_runs import CLAIMS, QualityBench

    names = tuple(CLAIMS) if claim == "all" else tuple(name.strip() for name in claim.split(","))
    bench = QualityBench(
        claims=names, seeds=seeds, jobs=jobs, configs=configs, folder=folder, overrides=tuple(set_ or ())
    )
    check_files(json_file, plot_file)
    command = f"trivium bench quality --claim {shlex.quote(claim)} --seeds {seeds} --jobs {jobs}"
    command += "".join(f" --set {shlex.quote(text)}" for text in set_ or ())
    report = run(bench, command, word_console().print)
    keep(report, json_file)
    if plot_file is not None:
        plot(report, plot_file)
    tell(report, json_file, lambda: lines(report))
