"""``trivium bench``: measure side by side with other trainers, on this machine."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.cli.bench_inference import inference
from trivium.cli.bench_quality import quality
from trivium.cli.bench_serve import serve
from trivium.cli.interrupts import load_torch
from trivium.cli.output import word_console
from trivium.cli.report import JsonFile, PlotFile, check_files, keep, tell


def register(app: typer.Typer) -> None:
    """Add the verb and its workloads to the command line."""
    workloads = typer.Typer(no_args_is_help=True, help="Measure side by side with other trainers.")
    workloads.callback()(_workloads)
    workloads.command("zero", help="DDP, FSDP2, DeepSpeed and stages 0 to 3 on one model, interleaved.")(zero)
    workloads.command("moe", help="Our MoE layer beside transformers' and DeepSpeed's, and its all-to-all.")(moe)
    workloads.command("serve", help="Load on a model server, ours or any with OpenAI's completions.")(serve)
    workloads.command("inference", help="Decode and prefill beside transformers, llama.cpp and OpenVINO.")(inference)
    workloads.command(
        "quality", help="Train experts, pyramids and students over paired seeds: what they do to the loss."
    )(quality)
    app.add_typer(workloads, name="bench")


def _workloads() -> None:
    """Measure side by side with other trainers."""


def zero(
    shape: Annotated[
        str, typer.Option(help="A preset: 34m (2 × 256 tokens per rank), or 7.4m and others (1 × 64).")
    ] = "34m",
    ranks: Annotated[int, typer.Option(help="Processes on this machine, one thread each.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds in which every contestant has its turn.")] = 10,
    steps: Annotated[int, typer.Option(help="Steps per contestant and round.")] = 2,
    contestants: Annotated[str | None, typer.Option(help="Comma-separated; default: all.")] = None,
    delay_ms: Annotated[float, typer.Option(help="Also ours with this delay per collective: what is hidden.")] = 0.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option(help="Measure peak memory, one launch per contestant.")] = True,
    wire: Annotated[bool, typer.Option(help="Count loopback bytes in a network namespace.")] = True,
    json_file: JsonFile = None,
    plot_file: PlotFile = None,
) -> None:
    """Times are compared within a round only; memory is proportional set size above imports and start-up."""
    log.setup()
    load_torch()
    from trivium.bench.table import table, targets
    from trivium.bench.zero import CONTESTANTS, ZeroBench, run

    names = CONTESTANTS if contestants is None else tuple(name.strip() for name in contestants.split(","))
    bench = ZeroBench(
        shape=shape,
        ranks=ranks,
        rounds=rounds,
        per_round=steps,
        contestants=names,
        delay_ms=delay_ms,
        device=device,
        memory=memory,
        wire=wire,
    )
    check_files(json_file, plot_file)
    words = word_console()
    command = f"trivium bench zero --shape {shape} --ranks {ranks} --rounds {rounds} --steps {steps}"
    command += f" --contestants {shlex.quote(','.join(names))}" if contestants else ""
    command += f" --delay-ms {delay_ms:g}" if delay_ms else ""
    command += f" --device {device}" if device != "cpu" else ""
    report = run(bench, command, words.print)
    keep(report, json_file)
    if plot_file is not None:
        from trivium.bench.plot import plot

        plot(report, plot_file)
    tell(report, json_file, lambda: [table(report), *targets(report)])


def moe(
    parts: Annotated[
        str | None, typer.Option(help="Comma-separated: layer, memory, dispatch, step, crossover; default: all.")
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of the layers (ranks that exchange have one each).")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds in which every contestant has its turn.")] = 7,
    clock: Annotated[str, typer.Option(help="wall, or cpu (with --threads 1): on a machine that is busy.")] = "wall",
    json_file: JsonFile = None,
) -> None:
    """Times are compared within a round only; all layers compute the same, from the same weights."""
    log.setup()
    load_torch()
    from trivium.bench.moe import PARTS, MoEBench, lines, run

    names = PARTS if parts is None else tuple(name.strip() for name in parts.split(","))
    check_files(json_file)
    if clock not in ("wall", "cpu"):
        raise ConfigError(f"clock={clock!r}: expected 'wall' or 'cpu'")
    bench = MoEBench(parts=names, threads=threads, rounds=rounds, clock="cpu" if clock == "cpu" else "wall")
    command = f"trivium bench moe --threads {threads} --rounds {rounds}"
    command += f" --parts {shlex.quote(','.join(names))}" if parts else ""
    command += f" --clock {clock}" if clock != "wall" else ""
    report = run(bench, command, word_console().print)
    keep(report, json_file)
    tell(report, json_file, lambda: lines(report))
