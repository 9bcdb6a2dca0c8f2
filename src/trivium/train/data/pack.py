"""Pack documents end to end into sequences of T tokens that know where each document begins.

Shapes: T = sequence. Nothing crosses a document's border: targets stop there, positions begin anew, and ``documents``
differs, which is what the attention mask reads. Every token of the corpus is in exactly one sequence; the last is
padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trivium.base.errors import DataError
from trivium.train.data.corpus import Corpus

IGNORE = -100
PADDING = -1
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """One sequence: four int64 arrays of length T.

    ``targets[i]`` is the token after ``tokens[i]`` or −100 (no loss); ``positions`` count from 0 in each document and
    sequence; ``documents`` holds the corpus's document number, −1 for padding.
    """

    tokens: Rows
    targets: Rows
    positions: Rows
    documents: Rows


class Packer:
    """Sequence number → Packed, in constant memory beside 8 bytes per document."""

    def __init__(self, corpus: Corpus, sequence: int, *, vocabulary: int | None = None) -> None:
        """Check that the corpus fills a sequence. ``vocabulary``: the model's, when below the tokenizer's."""
        if sequence < 2:
            raise DataError(f"sequence={sequence}: expected 2 tokens or more")
        lengths = np.asarray(corpus.offsets)[corpus.documents + 1] - np.asarray(corpus.offsets)[corpus.documents]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if len(self._ends) else 0
        if self.num_tokens < sequence:
            raise DataError(
                f"corpus of {len(lengths)} documents has {self.num_tokens} tokens, fewer than one sequence of "
                f"{sequence}; give more text or set data.sequence to at most {self.num_tokens}"
            )
        self.corpus = corpus
        self.sequence = sequence
        self.vocabulary = corpus.vocabulary if vocabulary is None else vocabulary
        self._lengths = lengths

    def __len__(self) -> int:
        """Number of sequences."""
        return -(-self.num_tokens // self.sequence)

    def __getitem__(self, index: int) -> Packed:
        """Sequence ``index``. Raises DataError naming file and line for a token id outside the vocabulary."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.sequence
        tokens = np.full(self.sequence, self.corpus.pad_id, np.int64)
        targets = np.full(self.sequence, IGNORE, np.int64)
        positions = np.zeros(self.sequence, np.int64)
        documents = np.full(self.sequence, PADDING, np.int64)
        filled = 0
        slot = int(np.searchsorted(self._ends, start, side="right"))
        while filled < self.sequence and slot < len(self._ends):
            length = int(self._lengths[slot])
            skip = start + filled - (int(self._ends[slot]) - length)
            take = min(length - skip, self.sequence - filled)
            if take > 0:
                document = int(self.corpus.documents[slot])
                here = slice(filled, filled + take)
                ids, learned = self._read(document, skip, min(take + 1, length - skip))
                self._check(ids, document, skip)
                tokens[here], positions[here], documents[here] = ids[:take], np.arange(take), document
                targets[filled : filled + len(ids) - 1] = np.where(learned[1:], ids[1:], IGNORE)
                filled += take
            slot += 1
        positions[filled:] = np.arange(self.sequence - filled)
        return Packed(tokens=tokens, targets=targets, positions=positions, documents=documents)

    def _read(self, document: int, skip: int, count: int) -> tuple[Rows, npt.NDArray[np.bool_]]:
        begin = int(self.corpus.offsets[document]) + skip
        ids = np.asarray(self.corpus.tokens[begin : begin + count])
        if ids.dtype.kind not in "iu":
            raise DataError(f"{self.corpus.name(document)}: tokens are {ids.dtype}, expected whole numbers")
        mask: Any = self.corpus.learned
        learned = np.ones(count, np.bool_) if mask is None else np.asarray(mask[begin : begin + count], np.bool_)
        return ids.astype(np.int64), learned

    def _check(self, ids: Rows, document: int, skip: int) -> None:
        bad = np.flatnonzero((ids < 0) | (ids >= self.vocabulary))
        if len(bad):
            raise DataError(
                f"sample {document} ({self.corpus.name(document)}): token {skip + int(bad[0])} has id "
                f"{int(ids[bad[0]])}, expected 0 to {self.vocabulary - 1}; is this the model's own tokenizer?"
            )
