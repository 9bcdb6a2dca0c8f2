"""``trivium bench inference``: decode and prefill beside transformers, llama.cpp and OpenVINO, on the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.cli.interrupts import load_torch
from trivium.cli.output import word_console
from trivium.cli.report import check_files, keep, tell


def inference(
    shape: Annotated[str, typer.Option(help="0.5b, 1.1b, 8b, gpt2 (128M) or moe (64 experts, 8 chosen).")] = "0.5b",
    rounds: Annotated[int, typer.Option(help="Rounds in which every contestant has its turn, at most.")] = 5,
    minutes: Annotated[float, typer.Option(help="No round begins that would end later; the first always runs.")] = 5.5,
    steps: Annotated[int, typer.Option(help="Decode steps per contestant, batch and round.")] = 6,
    threads: Annotated[int, typer.Option(help="Threads of every contestant.")] = 2,
    contestants: Annotated[
        str | None, typer.Option(help="Comma-separated; default: all, on cuda ours and transformers' in bfloat16.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: shares are of its copy bandwidth.")] = "cpu",
    perplexity: Annotated[
        Path | None, typer.Option(help="Instead: this model's perplexity on --text in every number format.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="With --perplexity: a text file.")] = None,
    tokens: Annotated[int, typer.Option(help="With --perplexity: so many of the text's tokens.")] = 8192,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the report, after every round; - for stdout.")
    ] = None,
) -> None:
    """Times are compared within a round only; the read limit of the memory is measured in every round."""
    log.setup()
    load_torch()
    from trivium.bench.inference import CONTESTANTS, ON_CUDA, InferenceBench, run
    from trivium.bench.inference_table import lines, table

    check_files(json_file)
    if perplexity is not None or text is not None:
        _perplexity(perplexity, text, tokens, threads, json_file)
        return
    usual = ON_CUDA if device == "cuda" else tuple(CONTESTANTS)
    names = usual if contestants is None else tuple(name.strip() for name in contestants.split(","))
    command = f"trivium bench inference --shape {shape} --rounds {rounds} --minutes {minutes:g} --steps {steps}"
    command += f" --threads {threads}" + (f' --contestants "{contestants}"' if contestants else "")
    command += f" --device {device}" if device != "cpu" else ""
    bench = InferenceBench(
        shape=shape,
        rounds=rounds,
        steps=steps,
        threads=threads,
        contestants=names,
        budget_s=60 * minutes,
        device=device,
    )
    report = run(bench, command, word_console().print, lambda found: keep(found, json_file))
    tell(report, json_file, lambda: [table(report), *lines(report)])


def _perplexity(folder: Path | None, text: Path | None, tokens: int, threads: int, json_file: Path | None) -> None:
    from trivium.bench.inference_perplexity import lines, run

    if folder is None or text is None:
        raise ConfigError("--perplexity FOLDER and --text FILE go together")
    for path in (folder, text):
        if not path.exists():
            raise ConfigError(f"{path} does not exist")
    command = f"trivium bench inference --perplexity {folder.name} --text {text.name}"
    command += f" --tokens {tokens} --threads {threads}"
    report = run(folder, text, tokens, threads, command, word_console().print)
    keep(report, json_file)
    tell(report, json_file, lambda: lines(report))
