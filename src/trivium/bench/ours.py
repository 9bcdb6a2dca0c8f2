"""Trivium's own stages as contestants, counted by the ledger.

ZeRO section 7: volume per step.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from trivium import zero
from trivium.bench.contestant import Plain
from trivium.dist.ledger import Ledger
from trivium.dist.mesh import Mesh
from trivium.models import Decoder


class Ours(Plain):
    """A model sharded at one stage."""

    def __init__(self, model: Decoder, learning_rate: float, mesh: Mesh, stage: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
        sharded, sharded_optimizer = zero.shard(model, optimizer, mesh, stage=stage)
        super().__init__(sharded, sharded_optimizer)
        self._mesh = mesh
        self._open = ExitStack()
        self._ledgers: list[Ledger] = []
        self._num_steps, self._waited_s, self._since_s = 0, 0.0, 0.0

    def begin_count(self) -> None:
        """Open a ledger."""
        self._ledgers.append(self._open.enter_context(self._mesh.ledger()))
        self._since_s = self._mesh.link.waited_s

    def end_count(self) -> None:
        """Close it."""
        self._open.close()
        self._num_steps += 1
        self._waited_s += self._mesh.link.waited_s - self._since_s

    def counts(self) -> dict[str, Any]:
        """Steps that were counted, and over all of them: bytes sent and collectives issued by this rank, and seconds
        spent waiting for them."""
        phases: dict[str, int] = {}
        calls: dict[str, int] = {}
        for ledger in self._ledgers:
            for phase, sent in ledger.bytes_by("phase").items():
                phases[phase] = phases.get(phase, 0) + sent
            for phase, number in ledger.calls_by("phase").items():
                calls[phase] = calls.get(phase, 0) + number
        return {
            "steps": self._num_steps,
            "payload_bytes": sum(ledger.payload_bytes for ledger in self._ledgers),
            "bytes_by_phase": phases,
            "calls_by_phase": calls,
            "waited_s": self._waited_s,
        }
