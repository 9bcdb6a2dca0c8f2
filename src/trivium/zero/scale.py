"""Dynamic loss scaling for fp16 gradients, inside backward and step.

ZeRO section 3.1 assumes mixed-precision training; the scale is a power of two, so it changes no bit of what survives.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class LossScale:
    """The factor on the loss. ``update`` halves it after a skipped step and doubles it after ``interval`` good ones."""

    value: float = 1.0
    dynamic: bool = False
    interval: int = 2000
    num_good_steps: int = 0
    num_skipped_steps: int = 0

    def update(self, *, finite: bool) -> None:
        """Count one step, taken (``finite``) or skipped."""
        if not finite:
            self.num_skipped_steps += 1
            self.num_good_steps = 0
            if self.dynamic:
                self.value = max(self.value / 2, 1.0)
            return
        self.num_good_steps += 1
        if self.dynamic and self.num_good_steps % self.interval == 0:
            self.value = min(self.value * 2, 2.0**24)

    def state_dict(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"value": self.value, "num_good_steps": self.num_good_steps, "num_skipped_steps": self.num_skipped_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue where ``state_dict`` left off."""
        self.value = float(state["value"])
        self.num_good_steps = int(state["num_good_steps"])
        self.num_skipped_steps = int(state["num_skipped_steps"])
