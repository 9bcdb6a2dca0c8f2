"""Batches in an order that is a pure function of (seed, micro-batch number), and its exact save and resume.

Communication: none. Micro-batch m of the whole run, m = (step · accumulation + index) · N + rank, holds sequences
m · B … (m + 1) · B − 1 of the endless order "epoch 0 permuted, epoch 1 permuted, …". So runs with equal
N · accumulation read equal data, and the state is one number that any number of ranks can continue from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from trivium.base.errors import DataError
from trivium.train.data.corpus import Corpus
from trivium.train.data.pack import IGNORE, Packed, Packer

_ROUNDS = 6
_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A micro-batch: int64 tensors [B, T], and ``num_tokens``, the number of targets that carry loss.

    ``documents`` is equal within a document and −1 on padding; attention stays among equal numbers of a row.
    ``number`` is the micro-batch's place in the whole run, ``sequences`` which sequences of the corpus it holds.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor
    num_tokens: int
    number: int
    sequences: tuple[int, ...]

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``."""
        return replace(
            self, tokens=self.tokens.to(device), targets=self.targets.to(device),
            positions=self.positions.to(device), documents=self.documents.to(device),
        )  # fmt: skip


class Loader:
    """Endless micro-batches of one rank. ``next(loader)`` moves on by one micro-batch on every rank."""

    def __init__(
        self,
        corpus: Corpus,
        *,
        sequence: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        """``batch_size``: sequences per micro-batch and rank. Raises DataError when the corpus has fewer than that."""
        if batch_size < 1 or not 0 <= rank < size or seed < 0:
            raise DataError(
                f"loader with batch_size={batch_size}, rank={rank}, size={size}, seed={seed}: "
                "expected batch_size >= 1, 0 <= rank < size, seed >= 0"
            )
        self._packer = Packer(corpus, sequence, vocabulary=vocabulary)
        if len(self._packer) < batch_size:
            raise DataError(
                f"corpus of {self._packer.num_tokens} tokens makes {len(self._packer)} sequences of {sequence}, fewer "
                f"than one batch of {batch_size}; give more text, or lower the batch size or data.sequence"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.size = size
        self._done = 0

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch."""
        return len(self._packer)

    @property
    def epoch(self) -> float:
        """How often the corpus has been read by the whole run, as a fraction."""
        return self._done * self.batch_size / len(self._packer)

    def __iter__(self) -> Iterator[Batch]:
        """The loader itself; it never ends."""
        return self

    def __next__(self) -> Batch:
        """This rank's next micro-batch."""
        batch = self.batch(self._done + self.rank)
        self._done += self.size
        return batch

    def batch(self, number: int) -> Batch:
        """Micro-batch ``number`` of the whole run, whatever the rank; changes nothing."""
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        sequences = tuple(self._at(place) for place in places)
        return _stack([self._packer[index] for index in sequences], number, sequences)

    def state_dict(self) -> dict[str, int | str]:
        """Where the run stands; equal on all ranks when each has taken as many micro-batches. Plain JSON values."""
        return {
            "sequences_read": self._done * self.batch_size, "seed": self.seed, "sequence": self._packer.sequence,
            "corpus": self._packer.corpus.fingerprint,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue where ``state`` was taken, on any number of ranks. Raises DataError for other data."""
        expected = self.state_dict()
        if set(state) != set(expected):
            raise DataError(f"loader state has {sorted(state)}, expected {sorted(expected)}")
        differing = [
            f"{key} was {state[key]!r}, is {expected[key]!r}"
            for key in ("seed", "sequence", "corpus")
            if state[key] != expected[key]
        ]
        if differing:
            raise DataError(
                f"the saved run read other data: {'; '.join(differing)}; use the same [data] table and text to resume"
            )
        read = state["sequences_read"]
        if not isinstance(read, int) or isinstance(read, bool) or read < 0 or read % self.batch_size:
            raise DataError(
                f"the saved run had read {read!r} sequences, no multiple of batch_size={self.batch_size}; "
                "resume with the batch size it was saved with"
            )
        self._done = read // self.batch_size

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self._packer))
        return permuted(index, len(self._packer), seed=self.seed, epoch=epoch)


def validation_batches(
    corpus: Corpus,
    *,
    sequence: int,
    batch_size: int,
    rank: int = 0,
    size: int = 1,
    limit: int | None = None,
    vocabulary: int | None = None,
) -> Iterator[Batch]:
    """Every sequence once, in order, dealt to the ranks batch by batch; all ranks get equally many batches.

    A batch beyond the last repeats sequence 0 with no targets (``num_tokens`` 0), so that ranks stay in step. ``limit``
    bounds the number of batches over all ranks: as many are taken at equal distances over the whole corpus, whose
    beginning alone may be a single document.
    """
    packer = Packer(corpus, min(sequence, max(corpus.num_tokens, 2)), vocabulary=vocabulary)
    whole = -(-len(packer) // batch_size)
    total = whole if limit is None else min(whole, limit)
    for number in range(rank, -(-total // size) * size, size):
        place = number * whole // total
        sequences = tuple(range(place * batch_size, (place + 1) * batch_size))
        rows = [packer[index] if index < len(packer) and number < total else _silent(packer[0]) for index in sequences]
        yield _stack(rows, number, sequences)


def permuted(index: int, size: int, *, seed: int, epoch: int) -> int:
    """Where ``index`` goes in the permutation of ``range(size)`` that belongs to (seed, epoch), in constant memory.

    A Feistel network over the next even power of two, walked until it lands inside; the same on every machine.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    key = _mix(_mix(seed & _MASK) ^ (epoch & _MASK))
    value = index
    while True:
        left, right = value >> half, value & low
        for round_number in range(_ROUNDS):
            left, right = right, left ^ (_mix(key ^ (right << 8) ^ round_number) & low)
        value = left << half | right
        if value < size:
            return value


def _mix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _silent(row: Packed) -> Packed:
    return replace(row, targets=np.full_like(row.targets, IGNORE))


def _stack(rows: list[Packed], number: int, sequences: tuple[int, ...]) -> Batch:
    targets = np.stack([row.targets for row in rows])
    return Batch(
        tokens=torch.from_numpy(np.stack([row.tokens for row in rows])),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(np.stack([row.positions for row in rows])),
        documents=torch.from_numpy(np.stack([row.documents for row in rows])),
        num_tokens=int((targets != IGNORE).sum()),
        number=number,
        sequences=sequences,
    )
