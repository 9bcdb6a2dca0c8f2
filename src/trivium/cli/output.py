"""How every verb speaks: data on stdout, words on stderr, colour and width as the terminal and NO_COLOR say."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console


def print_json(data: Any) -> None:
    """One JSON document on stdout; NaN and infinities are refused rather than written."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def data_console() -> Console:
    """A console on stdout, for tables that are the answer; no markup or highlighting is guessed from the content."""
    return Console(highlight=False, markup=False, emoji=False)


def word_console() -> Console:
    """A console on stderr, for progress and remarks."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False)
