"""One row of what is promised under load: what was measured, beside the bound that it has to keep."""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

COLUMNS = ("row", "what", "measured", "promised", "kept")


@dataclass(frozen=True, kw_only=True)
class Promise:
    """``measured`` is at least or at most ``bound``."""

    what: str
    measured: float
    sense: Literal[">=", "<="]
    bound: float

    @property
    def kept(self) -> bool:
        """Whether it holds."""
        if not math.isfinite(self.measured):
            return False
        return self.measured >= self.bound if self.sense == ">=" else self.measured <= self.bound

    def told(self) -> dict[str, Any]:
        """As it goes into the report."""
        measured = round(self.measured, 4) if math.isfinite(self.measured) else None
        return {"what": self.what, "measured": measured, "promised": f"{self.sense} {self.bound:g}", "kept": self.kept}


@dataclass(kw_only=True)
class Row:
    """One scenario. ``also``: what was measured beside the promises."""

    name: str
    about: str
    promises: list[Promise] = field(default_factory=list)
    also: dict[str, Any] = field(default_factory=dict)
    load_before: float = field(default_factory=lambda: round(os.getloadavg()[0], 2))
    begun_s: float = field(default_factory=time.perf_counter)

    def at_least(self, what: str, measured: float | None, bound: float) -> None:
        """Promise a least value; one that could not be measured is not kept."""
        value = math.nan if measured is None else float(measured)
        self.promises.append(Promise(what=what, measured=value, sense=">=", bound=bound))

    def at_most(self, what: str, measured: float | None, bound: float) -> None:
        """Promise a greatest value; one that could not be measured is not kept."""
        value = math.nan if measured is None else float(measured)
        self.promises.append(Promise(what=what, measured=value, sense="<=", bound=bound))

    def told(self) -> dict[str, Any]:
        """As it goes into the report; call it when the scenario is through."""
        return {
            "row": self.name,
            "about": self.about,
            "promises": [promise.told() for promise in self.promises],
            "also": self.also,
            "load_before": self.load_before,
            "seconds": round(time.perf_counter() - self.begun_s, 1),
        }


def line(row: Mapping[str, Any]) -> str:
    """A row in words."""
    parts = [
        f"{one['what']} {one['measured']} ({one['promised']}{'' if one['kept'] else ', NOT KEPT'})"
        for one in row["promises"]
    ]
    return f"{row['row']} [{row['seconds']} s]: " + "; ".join(parts)


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One line per promise."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            for one in row["promises"]:
                writer.writerow([row["row"], one["what"], one["measured"], one["promised"], one["kept"]])
