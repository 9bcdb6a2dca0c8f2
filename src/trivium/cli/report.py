"""Where a measurement's report goes: a JSON file or stdout, a picture, and lines on the terminal."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from trivium.base.errors import ConfigError
from trivium.cli.output import data_console, print_json

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report; - for stdout.")]
PlotFile = Annotated[Path | None, typer.Option("--plot", help="Write a picture (.svg, .png, .pdf).")]


def check_files(*paths: Path | None) -> None:
    """Refuse, before anything is measured, a file that could not be written afterwards.

    Raises:
        ConfigError: a folder, a file in a folder that does not exist, or a place where nothing can be written.
    """
    for path in paths:
        if path is None or str(path) == "-":
            continue
        try:
            if not path.parent.is_dir():
                raise ConfigError(f"{path}: the folder {path.parent} does not exist")
            _try(path)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written ({error.strerror}); give a file in a folder where you may write"
            ) from None


def _try(path: Path) -> None:
    """Raise the OSError that writing this file would end in, as far as it can be known before."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    if not _is_taken_as_it_is(path):
        target = _whole(path)
        if target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with contextlib.suppress(FileNotFoundError):
            _partial(target).lstat()  # too long a name
        with tempfile.TemporaryFile(dir=target.parent):
            pass


def keep(report: dict[str, Any], json_file: Path | None) -> None:
    """Put the report into its file, whole: whoever looks meanwhile, and a full disk, find the one before.

    A link stays one, its target is replaced; a pipe, a terminal or another device gets the text as it is.
    """
    if json_file is None or str(json_file) == "-":
        return
    text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    if _is_stdout(json_file):
        sys.stdout.write(text)
        sys.stdout.flush()
    elif _is_taken_as_it_is(json_file):
        json_file.write_text(text, encoding="utf-8")
    else:
        target = _whole(json_file)
        fresh = _partial(target)
        try:
            fresh.write_text(text, encoding="utf-8")
            fresh.replace(target)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise


def _is_stdout(path: Path) -> bool:
    """Opened a second time, a file that stdout goes to would be written from its beginning twice."""
    try:
        return os.path.samestat(path.stat(), os.fstat(1))
    except OSError:
        return False


def _is_taken_as_it_is(path: Path) -> bool:
    """Whether this is stdout, or exists and is no regular file: nothing that could be replaced."""
    return _is_stdout(path) or (path.exists() and not path.is_file())


def _whole(path: Path) -> Path:
    """Where links lead."""
    return Path(os.path.realpath(path))


def _partial(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def tell(report: dict[str, Any], json_file: Path | None, lines: Callable[[], Iterable[RenderableType]]) -> None:
    """The report on stdout with ``--json -``, else its tables and ``lines``."""
    if str(json_file) == "-":
        print_json(report)
        return
    data = data_console()
    for line in lines():
        data.print(line, soft_wrap=isinstance(line, str))
