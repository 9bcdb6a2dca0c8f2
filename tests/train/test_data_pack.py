"""Packing: every token once, nothing across a document's border, and bad ids named by sample and file."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.base.errors import DataError
from trivium.train.data.corpus import Corpus
from trivium.train.data.pack import IGNORE, PADDING, Packer

PAD = 99
DOCUMENTS = st.lists(
    st.lists(st.tuples(st.integers(0, 98), st.booleans()), min_size=0, max_size=12), min_size=1, max_size=12
)


def corpus_of(*rows: list[int], learned: list[list[bool]] | None = None, vocabulary: int = 100) -> Corpus:
    masks = learned if learned is not None else [None] * len(rows)
    return Corpus.of(list(zip(rows, masks, strict=True)), vocabulary=vocabulary, pad_id=PAD, source="rows.jsonl")


def test_an_example_by_hand() -> None:
    packer = Packer(corpus_of([1, 2, 3], [4, 5, 6, 7], [8]), 5)
    assert len(packer) == 2
    first, second = packer[0], packer[1]
    assert first.tokens.tolist() == [1, 2, 3, 4, 5]
    assert first.targets.tolist() == [2, 3, IGNORE, 5, 6]
    assert first.positions.tolist() == [0, 1, 2, 0, 1]
    assert first.documents.tolist() == [0, 0, 0, 1, 1]
    assert second.tokens.tolist() == [6, 7, 8, PAD, PAD]
    assert second.targets.tolist() == [7, IGNORE, IGNORE, IGNORE, IGNORE]
    assert second.positions.tolist() == [0, 1, 0, 0, 1]
    assert second.documents.tolist() == [1, 1, 2, PADDING, PADDING]


@settings(max_examples=200)
@given(DOCUMENTS, st.integers(2, 9), st.booleans())
def test_every_token_and_every_learned_target_once(
    documents: list[list[tuple[int, bool]]], sequence: int, masked: bool
) -> None:
    rows = [[token for token, _ in document] for document in documents]
    masks = [[on or not masked for _, on in document] for document in documents]
    if sum(map(len, rows)) < sequence:
        return
    packer = Packer(corpus_of(*rows, learned=masks if masked else None), sequence)
    parts = [packer[index] for index in range(len(packer))]
    tokens = np.concatenate([part.tokens for part in parts])
    owners = np.concatenate([part.documents for part in parts])
    targets = np.concatenate([part.targets for part in parts])
    assert tokens[owners != PADDING].tolist() == [token for row in rows for token in row]
    assert (tokens[owners == PADDING] == PAD).all() and (targets[owners == PADDING] == IGNORE).all()
    for index, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        expected = [token if on else IGNORE for token, on in zip(row[1:], mask[1:], strict=True)]
        assert targets[owners == index].tolist() == ([*expected, IGNORE] if row else [])
    for part in parts:
        starts = np.flatnonzero(np.diff(part.documents, prepend=-2))
        assert (part.positions[starts] == 0).all()
        inside = np.setdiff1d(np.arange(sequence), starts)
        assert (part.positions[inside] == part.positions[inside - 1] + 1).all()


def test_part_of_a_corpus_packs_only_its_documents() -> None:
    whole = Corpus.of(
        [([n] * 4, None) for n in range(20)], vocabulary=100, pad_id=PAD, keys=[(n * 2**64) // 20 for n in range(20)]
    )
    train, held = whole.split(0.25)
    assert held.documents.tolist() == [0, 1, 2, 3, 4]
    seen = {int(t) for i in range(len(Packer(train, 4))) for t in Packer(train, 4)[i].tokens}
    assert seen == set(range(5, 20))
    assert train.num_tokens + held.num_tokens == 80
    assert train.fingerprint != held.fingerprint


@pytest.mark.parametrize(("bad", "token"), [(50, 50), (-1, -1)])
def test_id_outside_the_vocabulary_names_sample_file_and_place(bad: int, token: int) -> None:
    corpus = corpus_of([1, 2, 3, 4], [5, 6, bad, 7], vocabulary=50)
    packer = Packer(corpus, 4)
    assert packer[0].tokens.tolist() == [1, 2, 3, 4]
    with pytest.raises(DataError, match=rf"sample 1 \(rows\.jsonl:2\): token 2 has id {token}, expected 0 to 49"):
        packer[1]
    with pytest.raises(DataError, match=r"sample 0 .* token 3 has id 4, expected 0 to 3"):
        Packer(corpus, 4, vocabulary=4)[0]


def test_bad_target_beyond_the_sequence_is_named_too() -> None:
    with pytest.raises(DataError, match="token 4 has id 70"):
        Packer(corpus_of([1, 2, 3, 4, 70], vocabulary=50), 4)[0]


def test_not_whole_numbers() -> None:
    corpus = corpus_of([1, 2, 3])
    object.__setattr__(corpus, "tokens", np.asarray([1.0, np.nan, 2.0]))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: tokens are float64"):
        Packer(corpus, 2)[0]


def test_too_short_and_out_of_range() -> None:
    with pytest.raises(DataError, match=r"2 documents has 5 tokens, fewer than one sequence of 6; .* at most 5"):
        Packer(corpus_of([1, 2, 3], [4, 5]), 6)
    with pytest.raises(DataError, match="sequence=1"):
        Packer(corpus_of([1, 2, 3]), 1)
    with pytest.raises(IndexError):
        Packer(corpus_of([1, 2, 3]), 2)[2]
