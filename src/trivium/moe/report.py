"""What the router did, over any number of micro-batches: load, drops, entropy, dead experts.

DeepSpeed-MoE section 3.1 balances the load; this tells whether it worked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

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
        self._load: torch.Tensor | None = None
        self._entropy: torch.Tensor | None = None
        self._dropped = 0
        self._tokens = 0

    def add(self, aux: Aux) -> None:
        """Count one call; sums stay on the device until `report`."""
        num_tokens = aux.routing.experts_TK.shape[0]
        entropy = aux.entropy.double() * num_tokens
        self._load = aux.load if self._load is None else self._load + aux.load
        self._entropy = entropy if self._entropy is None else self._entropy + entropy
        self._dropped += aux.dropped
        self._tokens += num_tokens

    def report(self) -> RouterReport:
        """The sums so far; of nothing, all zeros."""
        counts: list[int] = [] if self._load is None else self._load.tolist()
        total = sum(counts)
        share = tuple(load / total if total else 0.0 for load in counts)
        spread = -sum(part * math.log(part) for part in share if part)
        return RouterReport(
            load=tuple(counts),
            share=share,
            dropped=self._dropped,
            drop_rate=self._dropped / total if total else 0.0,
            load_entropy=spread / math.log(len(share)) if len(share) > 1 else 0.0,
            router_entropy=0.0 if self._entropy is None or not self._tokens else float(self._entropy) / self._tokens,
            dead=tuple(number for number, load in enumerate(counts) if load == 0),
        )
