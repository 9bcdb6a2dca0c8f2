"""How every verb speaks: data on stdout, words on stderr, colour and width as the terminal and NO_COLOR say."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table


def print_json(data: Any) -> None:
    """One JSON document on stdout; NaN and infinities are refused rather than written."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def data_console() -> Console:
    """A console on stdout, for tables that are the answer; no markup or highlighting is guessed from the content."""
    return Console(highlight=False, markup=False, emoji=False)


def word_console() -> Console:
    """A console on stderr, for progress and remarks."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)


def fitted(header: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> Table:
    """A table without lines, ``width`` columns of the screen to fit in: rows and columns change places where that is
    the narrower way, and what is still too wide goes on in the next line. Nothing is cut off."""
    body = [list(header), *map(list, rows)]
    turned = [list(column) for column in zip(*body, strict=True)]
    if _width(body) > width and _width(turned) < _width(body):
        body = turned
    made = Table(box=None, padding=(0, 1), pad_edge=True)
    made.add_column(body[0][0], overflow="fold")
    for name in body[0][1:]:
        made.add_column(name, justify="right", overflow="fold")
    for row in body[1:]:
        made.add_row(*row)
    return made


def _width(body: Sequence[Sequence[str]]) -> int:
    return sum(2 + max(map(cell_len, column)) for column in zip(*body, strict=True))
