"""One logger, ``trivium``: words on stderr, prefixed with the rank where there are several; data never passes here."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler


class _Ranked(logging.Formatter):
    """``[rank 1] message``, with the level's name from warnings upward."""

    def __init__(self, rank: int, size: int, *, level: bool) -> None:
        super().__init__()
        self.prefix = f"[rank {rank}] " if size > 1 else ""
        self.level = level

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        level = f"{record.levelname.lower()}: " if self.level and record.levelno >= logging.WARNING else ""
        return f"{self.prefix}{level}{text}"


def get() -> logging.Logger:
    """The one logger; silent below warnings until `setup`."""
    return logging.getLogger("trivium")


def setup(*, rank: int = 0, size: int = 1, verbose: bool = False) -> logging.Logger:
    """Send the logger's words to stderr, in colour on a terminal. Calling again replaces the earlier choice.

    Rank 0 says what it does; the other ranks say only warnings and errors unless ``verbose``.
    """
    logger = get()
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.addHandler(_handler(rank, size))
    logger.setLevel(logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger


def _handler(rank: int, size: int) -> logging.Handler:
    if sys.stderr is not None and sys.stderr.isatty():
        console = Console(stderr=True)
        handler: logging.Handler = RichHandler(console=console, show_time=False, show_path=False, markup=False)
        handler.setFormatter(_Ranked(rank, size, level=False))
        return handler
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Ranked(rank, size, level=True))
    return handler
