"""``trivium bench inference``: decode and prefill beside transformers and llama.cpp, on the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.cli.output import data_console, print_json, word_console


def inference(
    shape: Annotated[str, typer.Option(help="0.5b, 1.1b, gpt2 (128M) or moe (64 experts, 8 chosen).")] = "0.5b",
    rounds: Annotated[int, typer.Option(help="Rounds in which every contestant has its turn.")] = 5,
    steps: Annotated[int, typer.Option(help="Decode steps per contestant, batch and round.")] = 8,
    threads: Annotated[int, typer.Option(help="Threads of every contestant.")] = 2,
    contestants: Annotated[str | None, typer.Option(help="Comma-separated; default: all but trivium float32.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report; - for stdout.")] = None,
) -> None:
    """Times are compared within a round only; the read limit of the memory is measured in every round."""
    log.setup()
    from trivium.bench.inference import DEFAULT, InferenceBench, run
    from trivium.bench.inference_table import table, targets

    names = DEFAULT if contestants is None else tuple(name.strip() for name in contestants.split(","))
    if json_file is not None and not json_file.parent.is_dir():
        raise ConfigError(f"{json_file}: the folder {json_file.parent} does not exist")
    command = f"trivium bench inference --shape {shape} --rounds {rounds} --steps {steps} --threads {threads}"
    command += f' --contestants "{contestants}"' if contestants else ""
    bench = InferenceBench(shape=shape, rounds=rounds, steps=steps, threads=threads, contestants=names)
    report = run(bench, command, word_console().print)
    if str(json_file) == "-":
        print_json(report)
        return
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    data = data_console()
    data.print(table(report))
    for line in targets(report):
        data.print(line)
