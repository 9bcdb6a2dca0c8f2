"""What every backend offers: a program that runs one step of tokens over its caches, in one call.

DeepSpeed Inference section 3.1. The logits of a request must not depend on who else is in the batch:
``batch_invariant`` says whether that holds to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from trivium.kernels.draws import Sampler
from trivium.kernels.program import Batch, Cache, Output


class Executor(Protocol):
    """A program bound to one backend. ``run`` may be called by one thread at a time; it owns nothing it is given."""

    @property
    def name(self) -> str:
        """The backend and its variant, for logs: "torch cpu", "native avx2"."""

    @property
    def batch_invariant(self) -> bool:
        """Whether a request's logits are bit-identical alone, in any batch and in any chunks."""

    @property
    def sampler(self) -> Sampler | None:
        """What finds the tokens in this executor's logits; None: it has no kernel for that.

        For one thread at a time, and not while a step runs.
        """

    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
        """One step. Writes keys and values of its tokens into ``caches`` (one per `CacheSpec`), in place.

        Raises:
            ConfigError: a batch or cache whose shape, dtype or numbers do not fit the program; nothing has run.
        """

    def refresh(self) -> None:
        """The program's tensors were written into, in place: what the executor keeps of them is made anew.

        Not while `run` is under way.
        """
