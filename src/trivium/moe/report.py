"""What the router did, over any number of micro-batches: load, drops, entropy, dead experts.

DeepSpeed-MoE section 3.1 balances the load; this tells whether it worked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivium.moe.layer import Aux


@dataclass(frozen=True, kw_only=True)
class RouterReport:
    """Of one layer on this rank. ``load``: choices per expert before drops; ``share``: the same as fractions.

    ``load_entropy`` is that of ``share`` over log E: 1 when even, 0 when one expert takes all. ``router_entropy`` is
    the tokens' mean, in nats. ``dead`` are the experts that nobody chose.
    """

    load: tuple[int, ...]
    share: tuple[float, ...]
    dropped: int
    drop_rate: float
    load_entropy: float
    router_entropy: float
    dead: tuple[int, ...]


class Tally:
    """Adds up the ``aux`` of one layer's calls; `report` reads it out."""

    def __init__(self) -> None:
        self._load: list[int] = []
        self._dropped = 0
        self._tokens = 0
        self._entropy = 0.0

    def add(self, aux: Aux) -> None:
        """Count one call. Waits for the device."""
        load: list[int] = aux.load.tolist()
        self._load = [a + b for a, b in zip(self._load, load, strict=True)] if self._load else load
        num_tokens = aux.routing.experts_TK.shape[0]
        self._dropped += aux.dropped
        self._tokens += num_tokens
        self._entropy += float(aux.entropy) * num_tokens

    def report(self) -> RouterReport:
        """The sums so far; of nothing, all zeros."""
        total = sum(self._load)
        share = tuple(load / total if total else 0.0 for load in self._load)
        spread = -sum(part * math.log(part) for part in share if part)
        return RouterReport(
            load=tuple(self._load),
            share=share,
            dropped=self._dropped,
            drop_rate=self._dropped / total if total else 0.0,
            load_entropy=spread / math.log(len(share)) if len(share) > 1 else 0.0,
            router_entropy=self._entropy / self._tokens if self._tokens else 0.0,
            dead=tuple(number for number, load in enumerate(self._load) if load == 0),
        )
