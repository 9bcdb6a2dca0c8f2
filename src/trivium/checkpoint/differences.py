"""Where a checkpoint and a model differ, as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

_MAX_ROWS = 40


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One row: ``kind`` is missing, superfluous, shape, tied, group or optimizer."""

    name: str
    kind: str
    here: str
    there: str

    def as_list(self) -> list[str]:
        """As JSON."""
        return list(astuple(self))


def common(by_rank: Sequence[Sequence[Sequence[str]]]) -> list[Difference]:
    """All ranks' differences, each once. What is superfluous must be so on every rank: experts live apart."""
    ranks_of: Counter[tuple[str, ...]] = Counter(tuple(row) for rows in by_rank for row in {tuple(row) for row in rows})
    ordered = dict.fromkeys(tuple(row) for rows in by_rank for row in rows)
    found = [
        Difference(name=row[0], kind=row[1], here=row[2], there=row[3])
        for row in ordered
        if row[1] != "superfluous" or ranks_of[row] == len(by_rank)
    ]
    return found


def report(folder: Path, rows: Iterable[Difference]) -> str:
    """The differences as a table with a first line that counts them."""
    listed = list(rows)
    kinds = Counter(row.kind for row in listed)
    told = {
        "missing": "not in the checkpoint",
        "superfluous": "not in the model",
        "shape": "of another shape",
        "tied": "tied here and separate there",
        "group": "in another parameter group",
        "optimizer": "optimizer absent there",
    }
    counts = ", ".join(f"{number} {told[kind]}" for kind, number in kinds.items())
    cells = [("name", "difference", "model", "checkpoint")]
    cells += [(row.name, told[row.kind], row.here, row.there) for row in listed[:_MAX_ROWS]]
    widths = [max(len(row[i]) for row in cells) for i in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    if len(listed) > _MAX_ROWS:
        lines.append(f"… and {len(listed) - _MAX_ROWS} more")
    return (
        f"{folder} and the model differ: {counts}. Build the model of the checkpoint, or pass strict=False to "
        "skip these:\n" + "\n".join(f"  {line}" for line in lines)
    )
