"""From a plan in integers to one step's tensors: tokens, positions, block tables, and which rows come out.

T tokens of the step, R rows wanted, S sequences, B blocks of the longest one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trivium.inference.scheduler import Piece, Sequence, State
from trivium.kernels.program import Batch


@dataclass(frozen=True, slots=True)
class Rows:
    """Where a piece's rows are in the output: ``first`` … ``first + count`` for positions ``position`` and on.

    ``samples`` of them, the last ones, follow the newest token and the drafts; ``token`` is the piece's place in T.
    """

    first: int
    count: int
    position: int
    samples: int
    token: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step's tensors and, piece by piece, where its output is."""

    batch: Batch
    rows: list[Rows]


class BatchBuilder:
    """Builds batches; keeps each running sequence's block table as a row, so that a step writes only what is new."""

    def __init__(self, *, max_sequences: int, block_size: int, most_blocks: int) -> None:
        self._block_size = block_size
        self._tables = np.full((2 * max_sequences, most_blocks), -1, dtype=np.int32)
        self._slots: dict[Sequence, tuple[int, int]] = {}
        self._free = list(range(2 * max_sequences - 1, -1, -1))

    def build(self, pieces: list[Piece], routing: tuple[torch.Tensor, ...] | None = None) -> StepBatch:
        """One step's batch of ``pieces``, in their order. ``routing``: choices of experts to replay, [T, K] each."""
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        outputs: list[int] = []
        rows: list[Rows] = []
        slots: list[int] = []
        width = 1
        for index, piece in enumerate(pieces):
            sequence, start = piece.sequence, piece.start
            offset, end = len(tokens), start + piece.count
            count = piece.count + len(piece.drafts)
            if piece.count == 1:
                tokens.append(sequence.tokens[start])
            else:
                tokens.extend(sequence.tokens[start:end])
            tokens.extend(piece.drafts)
            positions.extend(range(start, start + count))
            sequences.extend([index] * count)
            samples = 1 + len(piece.drafts) if piece.last else 0
            first = count - samples
            if sequence.rows_from is not None:
                first = min(first, max(0, sequence.rows_from - start))
            rows.append(Rows(len(outputs), count - first, start + first, samples, offset))
            outputs.extend(range(offset + first, offset + count))
            slots.append(self._slot(piece))
            width = max(width, len(sequence.blocks))
        batch = Batch(
            token_ids=_int32(tokens),
            positions=_int32(positions),
            sequences=_int32(sequences),
            block_tables=torch.from_numpy(np.ascontiguousarray(self._tables[slots, :width])),
            output_rows=_int32(outputs or [0]),  # a step of unfinished prompts: one row that nobody reads
            routing=routing,
        )
        return StepBatch(batch, rows)

    def _slot(self, piece: Piece) -> int:
        """The sequence's row of the tables, brought up to date."""
        sequence = piece.sequence
        known = self._slots.get(sequence)
        if known is None or known[1] != sequence.preemptions:
            slot = known[0] if known is not None else self._take()
            self._slots[sequence] = (slot, sequence.preemptions)
            self._tables[slot] = -1
            at = 0
        else:
            slot = known[0]
            at = piece.start // self._block_size
        blocks = sequence.blocks
        row = self._tables[slot]
        if at == len(blocks) - 1:
            row[at] = blocks[at]
        else:
            row[at : len(blocks)] = blocks[at:]
        return slot

    def _take(self) -> int:
        if not self._free:
            for sequence in [known for known in self._slots if known.state is not State.RUNNING]:
                self._free.append(self._slots.pop(sequence)[0])
        return self._free.pop()


def _int32(values: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int32))
