"""What counting alone achieves: unigram and bigram loss on validation text, in nats per token, from training counts.

Both are taken over exactly the targets a model is judged on: tokens that carry loss, the first of a document left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trivium.base.errors import DataError
from trivium.train.data.corpus import Corpus

_CHUNK_TOKENS = 8 << 20
_TRAINING_TOKENS = 64 << 20
_ADD = 0.5
Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """Nats per token, and how many tokens were scored and counted.

    ``unigram`` adds 0.5 to each count; ``bigram`` mixes pair counts with that unigram by Witten-Bell's weight.
    """

    unigram: float
    bigram: float
    tokens: int
    train_tokens: int


def baseline(train: Corpus, validation: Corpus, *, max_train_tokens: int = _TRAINING_TOKENS) -> Baseline:
    """Count on ``train`` (the first ``max_train_tokens``), score on ``validation``."""
    vocabulary = train.vocabulary
    single = np.full(vocabulary, _ADD)
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    counted = 0
    for before, after in _pairs(train, max_train_tokens):
        single += np.bincount(after, minlength=vocabulary)
        new_keys, new_counts = np.unique(before * vocabulary + after, return_counts=True)
        keys, where = np.unique(np.concatenate([keys, new_keys]), return_inverse=True)
        counts = np.bincount(where, weights=np.concatenate([counts, new_counts])).astype(np.int64)
        counted += len(after)
    if not counted:
        raise DataError("the training corpus has no token that carries loss; nothing to count")
    probability = single / single.sum()
    context = np.bincount(keys // vocabulary, weights=counts, minlength=vocabulary)
    kinds = np.bincount(keys // vocabulary, minlength=vocabulary)
    unigram = bigram = 0.0
    scored = 0
    for before, after in _pairs(validation, None):
        pair = before * vocabulary + after
        place = np.minimum(np.searchsorted(keys, pair), len(keys) - 1)
        seen = np.where(keys[place] == pair, counts[place], 0)
        alone = probability[after]
        total = np.maximum(context[before] + kinds[before], 1.0)
        mixed = np.where(context[before] > 0, (seen + kinds[before] * alone) / total, alone)
        unigram -= float(np.log(alone).sum())
        bigram -= float(np.log(mixed).sum())
        scored += len(after)
    if not scored:
        raise DataError("the validation corpus has no token that carries loss; raise data.validation or give more text")
    return Baseline(unigram=unigram / scored, bigram=bigram / scored, tokens=scored, train_tokens=counted)


def _pairs(corpus: Corpus, limit: int | None) -> Iterator[tuple[Pairs, Pairs]]:
    """(token, next token that carries loss) inside documents, some million at a time."""
    left = corpus.num_tokens if limit is None else limit
    before: list[Any] = []
    after: list[Any] = []
    held = 0
    for document in corpus.documents:
        begin, end = int(corpus.offsets[document]), int(corpus.offsets[document + 1])
        for start in range(begin, end - 1, _CHUNK_TOKENS):
            stop = min(start + _CHUNK_TOKENS + 1, end, start + left + 1)
            ids = np.asarray(corpus.tokens[start:stop]).astype(np.int64)
            keep = slice(None) if corpus.learned is None else np.asarray(corpus.learned[start + 1 : stop], np.bool_)
            before.append(ids[:-1][keep])
            after.append(ids[1:][keep])
            held += len(ids)
            left -= len(ids)
        if held >= _CHUNK_TOKENS or left <= 0:
            yield np.concatenate(before), np.concatenate(after)
            before, after, held = [], [], 0
        if left <= 0:
            return
    if held:
        yield np.concatenate(before), np.concatenate(after)
