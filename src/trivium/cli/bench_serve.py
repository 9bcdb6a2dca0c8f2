"""``trivium bench serve``: load on a model server, ours or any with OpenAI's completions."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.cli.interrupts import load_torch
from trivium.cli.output import word_console
from trivium.cli.report import JsonFile, PlotFile, check_files, keep, tell

if TYPE_CHECKING:
    from trivium.bench.serve_promises import Promises


def serve(
    model: Annotated[str | None, typer.Argument(help="A model to serve and measure; or give --url.")] = None,
    url: Annotated[str | None, typer.Option(help="A running server, up to /v1.")] = None,
    model_name: Annotated[str, typer.Option(help="The model's name there; default: its first.")] = "",
    key: Annotated[str | None, typer.Option(help="Its API key.", envvar="TRIVIUM_API_KEY")] = None,
    concurrency: Annotated[
        str, typer.Option(help="Requests under way at once, one load each; empty: none.")
    ] = "1,16,64",
    rates: Annotated[str, typer.Option(help="Arrivals per second (Poisson), one load each.")] = "",
    requests: Annotated[int, typer.Option(help="Requests per closed-loop load.")] = 64,
    duration: Annotated[float, typer.Option(help="Seconds of arrivals per open-loop load.")] = 20.0,
    prompt_words: Annotated[int, typer.Option(help="Words of a prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    ignore_eos: Annotated[bool, typer.Option(help="Answers of full length; a field beyond OpenAI's.")] = True,
    first_ms: Annotated[float, typer.Option(help="Goodput counts answers that begin within this.")] = 2000.0,
    gap_ms: Annotated[float, typer.Option(help="… and take at most this per further token.")] = 100.0,
    server_option: Annotated[
        list[str] | None, typer.Option(help="For trivium serve, as --threads=2; repeatable.")
    ] = None,
    promises: Annotated[bool, typer.Option(help="Instead: every promised row, with servers of its own.")] = False,
    only: Annotated[str | None, typer.Option(help="With --promises: some rows, separated by commas.")] = None,
    overload_s: Annotated[float, typer.Option(help="With --promises: seconds of overload.")] = 60.0,
    soak_requests: Annotated[int, typer.Option(help="With --promises: least requests of the soak.")] = 10_000,
    soak_s: Annotated[float, typer.Option(help="With --promises: least seconds of the soak.")] = 0.0,
    json_file: JsonFile = None,
    csv_file: Annotated[Path | None, typer.Option("--csv", help="Write the table.")] = None,
    plot_file: PlotFile = None,
) -> None:
    """Closed loop and open loop; time to first token, gaps, goodput."""
    log.setup()
    load_torch()
    from trivium.bench.serve import ServeBench, run, write_csv
    from trivium.bench.serve_client import Target
    from trivium.bench.serve_process import started

    if (model is not None) + (url is not None) + promises != 1:
        raise ConfigError("bench serve: give either a model to serve, --url of a running server, or --promises")
    check_files(json_file, csv_file, plot_file)
    command = shlex.join([os.path.basename(sys.argv[0]), *_shown(sys.argv[1:])])
    if promises:
        from trivium.bench.serve_promises import ROWS, Promises

        wanted = ROWS if only is None else [name.strip() for name in only.split(",")]
        asked = Promises(
            only=wanted, overload_s=overload_s, soak_requests=soak_requests, soak_s=soak_s,
            first_ms=first_ms, gap_ms=gap_ms,
        )  # fmt: skip
        _promises(asked, command, json_file, csv_file, plot_file)
        return
    bench = ServeBench(
        concurrency=_whole(concurrency, "--concurrency"),
        rates=_numbers(rates, "--rates"),
        requests=requests,
        duration_s=duration,
        first_ms=first_ms,
        gap_ms=gap_ms,
    )
    words = word_console()
    with contextlib.ExitStack() as stack:
        options = tuple(server_option or ())
        place = url if url is not None else stack.enter_context(started(str(model), options)).url
        target = Target(
            url=place.rstrip("/"),
            model=model_name,
            key=key,
            prompt_words=prompt_words,
            max_tokens=max_tokens,
            ignore_eos=ignore_eos,
        )
        report = run(bench, target, command, words.print)
    keep(report, json_file)
    if csv_file is not None:
        write_csv(report, csv_file)
    if plot_file is not None:
        from trivium.bench.serve_plot import plot

        plot(report, plot_file)
    tell(report, json_file, lambda: [_load_table(report["loads"])])


def _promises(
    promises: Promises, command: str, json_file: Path | None, csv_file: Path | None, plot_file: Path | None
) -> None:
    from trivium.bench.serve_promises import run
    from trivium.bench.serve_row import write_rows

    words = word_console()
    report = run(promises, command, lambda text: words.print(text, soft_wrap=True, highlight=False))
    keep(report, json_file)
    if csv_file is not None:
        write_rows(report["rows"], csv_file)
    if plot_file is not None:
        from trivium.bench.serve_plot import plot_promises

        plot_promises(report, plot_file)
    tell(report, json_file, lambda: [_row_table(report["rows"])])


def _load_table(loads: list[dict[str, Any]]) -> Table:
    from trivium.bench.serve import COLUMNS

    table = Table(*(name.replace("_", " ") for name in COLUMNS))
    for row in loads:
        table.add_row(*("–" if row[name] is None else str(row[name]) for name in COLUMNS))
    return table


def _row_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("row", "what", "measured", "promised", "kept")
    for row in rows:
        for one in row["promises"]:
            measured = "–" if one["measured"] is None else f"{one['measured']:g}"
            table.add_row(row["row"], one["what"], measured, one["promised"], "yes" if one["kept"] else "NO")
    return table


def _shown(arguments: list[str]) -> list[str]:
    """The command line without a key."""
    shown, hide = [], False
    for argument in arguments:
        shown.append("…" if hide else "--key=…" if argument.startswith("--key=") else argument)
        hide = argument == "--key"
    return shown


def _whole(text: str, option: str) -> list[int]:
    numbers = _numbers(text, option)
    if any(one != int(one) for one in numbers):
        raise ConfigError(f"{option} {text!r}: expected whole numbers parted by commas, such as 1,16,64")
    return [int(one) for one in numbers]


def _numbers(text: str, option: str) -> list[float]:
    """Finite numbers above 0, parted by commas."""
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        found = [math.nan]
    if not all(math.isfinite(one) and one > 0 for one in found):
        raise ConfigError(f"{option} {text!r}: expected numbers above 0 parted by commas, such as 1,16,64")
    return found
