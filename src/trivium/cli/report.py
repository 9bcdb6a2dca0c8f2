"""Where a measurement's report goes: a JSON file or stdout, a picture, and lines on the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from trivium.base.errors import ConfigError
from trivium.cli.output import data_console, print_json

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report; - for stdout.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Write a picture (.svg, .png, .pdf).")]


def check_folders(*paths: Path | None) -> None:
    """Refuse, before anything is measured, a file that could not be written afterwards.

    Raises:
        ConfigError: a folder that does not exist.
    """
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ConfigError(f"{path}: the folder {path.parent} does not exist")


def keep(report: dict[str, Any], json_file: Path | None) -> None:
    """Put the report into its file, whole: whoever looks meanwhile, and a full disk, find the one before."""
    if json_file is not None and str(json_file) != "-":
        fresh = json_file.with_name(f"{json_file.name}.partial")
        fresh.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        fresh.replace(json_file)


def tell(report: dict[str, Any], json_file: Path | None, lines: Callable[[], Iterable[RenderableType]]) -> None:
    """The report on stdout with ``--json -``, else its tables and ``lines``."""
    if str(json_file) == "-":
        print_json(report)
        return
    data = data_console()
    for line in lines():
        data.print(line, soft_wrap=isinstance(line, str))
