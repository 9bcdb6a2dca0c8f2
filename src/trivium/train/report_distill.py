"""The teacher's part of a run's report: the divergence from it, and when and why the lesson ended.

DeepSpeed-MoE section 4.2. Rows are those of metrics.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

Row = Mapping[str, Any]


def words(rows: Sequence[Row]) -> str:
    """How the lesson ended; nothing for a run without a teacher."""
    taught = [row for row in rows if row["kind"] == "step" and row.get("divergence") is not None]
    if not taught:
        return ""
    ended = [row for row in rows if row["kind"] == "objective" and row.get("ended")]
    if not ended:
        return f"The teacher was followed for all {taught[-1]['step']} steps."
    last = ended[-1]
    why = "" if last["agreement"] is None else f": the gradients' cosine was {last['agreement']:.3f}"
    return f"Distillation ended after step {last['step']}{why}."


def pictures(rows: Sequence[Row]) -> list[tuple[str, Callable[[Any], None]]]:
    """(label of the vertical axis, what draws it)."""
    taught = [row for row in rows if row["kind"] == "step" and row.get("divergence") is not None]
    checks = [row for row in rows if row["kind"] == "objective" and row.get("agreement") is not None]
    found: list[tuple[str, Callable[[Any], None]]] = []
    if taught:
        found.append(("T² · KL, nats per token", partial(_line, taught, "divergence")))
    if checks:
        found.append(("cosine of the two gradients", partial(_line, checks, "agreement")))
    return found


def _line(rows: Sequence[Row], key: str, axes: Any) -> None:
    axes.plot([row["step"] for row in rows], [row[key] for row in rows], linewidth=0.8, marker=".", markersize=3)
    axes.axhline(0, linestyle=":", color="gray")
