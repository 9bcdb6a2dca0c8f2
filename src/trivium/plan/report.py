"""Plan beside measured: one row per category, and whether they agree.

States and buffers are the runtime's own arithmetic (within 1 %); the whole holds an estimate of activations (10 %), and
rows for experts are those of an even router (25 %).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trivium.base.units import format_bytes
from trivium.plan.forecast import Plan

EXACT = 0.01
WHOLE = 0.10
UNEVEN = 0.25


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One line: bytes forecast and bytes measured. ``bound``: measured may be less, not more."""

    name: str
    planned: int
    measured: int
    tolerance: float
    bound: bool = False

    @property
    def deviation(self) -> float:
        """Measured against planned: 0.02 is two percent more than planned."""
        if self.planned == 0:
            return 0.0 if self.measured == 0 else float("inf")
        return self.measured / self.planned - 1

    @property
    def agrees(self) -> bool:
        """Whether the two are within tolerance."""
        off = self.deviation
        return off <= self.tolerance if self.bound else abs(off) <= self.tolerance


def compare(plan: Plan, measured: Mapping[str, int]) -> list[Compared]:
    """Rows for what was measured. Keys: the meter's labels (``parameters`` … ``sums``, ``gathered`` as a peak),
    ``total``, ``sent`` (payload bytes of one optimizer step but for rows to experts) and ``exchanged`` (those, which
    depend on what the router chooses); others are left out."""
    memory = plan.memory
    states = ("parameters", "gradients", "optimizer")
    rows = [
        Compared(name=name, planned=getattr(memory, name), measured=measured[name], tolerance=EXACT)
        for name in (*states, "buffers", "sums")
        if name in measured
    ]
    if all(name in measured for name in states):
        total = sum(measured[name] for name in states)
        rows.insert(3, Compared(name="states", planned=memory.states, measured=total, tolerance=EXACT))
    if "gathered" in measured:
        rows.append(
            Compared(name="gathered", planned=memory.gathered, measured=measured["gathered"], tolerance=0.0, bound=True)
        )
    if "sent" in measured:
        sent = plan.communication.states_per_step.sent_bytes
        rows.append(Compared(name="sent", planned=sent, measured=measured["sent"], tolerance=EXACT))
    if "exchanged" in measured:
        even = plan.communication.per_step.sent_bytes - plan.communication.states_per_step.sent_bytes
        rows.append(Compared(name="exchanged", planned=even, measured=measured["exchanged"], tolerance=UNEVEN))
    if "total" in measured:
        rows.append(Compared(name="total", planned=memory.total, measured=measured["total"], tolerance=WHOLE))
    return rows


def table(rows: Sequence[Compared]) -> str:
    """The rows as plain text, one line each."""
    head = f"{'':<12}{'plan':>14}{'measured':>14}{'':>10}"
    return "\n".join([head, *map(_line, rows)])


def _line(row: Compared) -> str:
    off = "exact" if row.planned == row.measured else f"{row.deviation:+.1%}"
    mark = "" if row.agrees else "  differs"
    return f"{row.name:<12}{format_bytes(row.planned):>14}{format_bytes(row.measured):>14}{off:>10}{mark}"
