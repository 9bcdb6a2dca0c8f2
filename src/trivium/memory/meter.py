"""Live and peak bytes of long-lived buffers, per label and tier.

ZeRO section 3 (where did all the memory go): the categories are the labels.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slot:
    """What is counted: a label (``parameters``, ``gradients``, …) on a tier (``device``, ``host``, ``disk``)."""

    label: str
    tier: str = "device"


class Meter:
    """Counts bytes as buffers come and go. Owned by whoever allocates; never guesses from outside."""

    def __init__(self) -> None:
        self._live: dict[Slot, int] = {}
        self._peak: dict[Slot, int] = {}

    def add(self, label: str, num_bytes: int, tier: str = "device") -> None:
        """Count ``num_bytes`` more (or fewer, when negative) under ``label``."""
        slot = Slot(label, tier)
        live = self._live.get(slot, 0) + num_bytes
        self._live[slot] = live
        self._peak[slot] = max(self._peak.get(slot, 0), live)

    def live_bytes(self, label: str | None = None, tier: str = "device") -> int:
        """Bytes held now under ``label`` (all labels when None)."""
        return sum(n for slot, n in self._live.items() if slot.tier == tier and label in (None, slot.label))

    def peak_bytes(self, label: str, tier: str = "device") -> int:
        """The most that was held under ``label`` since the last ``reset_peak``."""
        return self._peak.get(Slot(label, tier), 0)

    def reset_peak(self) -> None:
        """Forget past peaks: from now on the peak is at least what is live."""
        self._peak = dict(self._live)

    def by_label(self, *, peak: bool = False, tier: str = "device") -> dict[str, int]:
        """Bytes per label, live or peak."""
        counts = self._peak if peak else self._live
        return {slot.label: n for slot, n in counts.items() if slot.tier == tier}
