"""The loader: data by micro-batch number alone, exact resume on any number of ranks, every sequence once an epoch."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.errors import DataError
from trivium.train.data.corpus import Corpus
from trivium.train.data.loader import Batch, Loader, permuted, validation_batches
from trivium.train.data.pack import IGNORE


def corpus_of(num_documents: int = 60, *, length: int = 7) -> Corpus:
    rows = [([(d * 31 + i) % 97 for i in range(length)], None) for d in range(num_documents)]
    return Corpus.of(rows, vocabulary=97, pad_id=0)


def equal(one: Batch, two: Batch) -> bool:
    return (one.number, one.sequences, one.num_tokens) == (two.number, two.sequences, two.num_tokens) and all(
        torch.equal(getattr(one, key), getattr(two, key)) for key in ("tokens", "targets", "positions", "documents")
    )


def take(
    size: int, steps: int, *, accumulation: int = 1, state: dict[str, int | str] | None = None
) -> list[list[Batch]]:
    """The batches of each step, in the order of their numbers."""
    loaders = [Loader(corpus_of(), sequence=8, batch_size=2, seed=5, rank=rank, size=size) for rank in range(size)]
    for loader in loaders:
        if state is not None:
            loader.load_state_dict(state)
    return [[next(loader) for _ in range(accumulation) for loader in loaders] for _ in range(steps)]


@pytest.mark.parametrize(("size", "accumulation"), [(1, 6), (2, 3), (3, 2), (6, 1)])
def test_equal_ranks_times_accumulation_means_equal_data(size: int, accumulation: int) -> None:
    reference = [[batch] for step in take(1, 10, accumulation=6) for batch in step]
    found = [[batch] for step in take(size, 10, accumulation=accumulation) for batch in step]
    assert [b.number for (b,) in found] == list(range(60))
    assert all(equal(a, b) for (a,), (b,) in zip(reference, found, strict=True))


@given(st.integers(1, 400), st.integers(0, 5), st.integers(0, 3))
def test_permutation_is_one(size: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(i, size, seed=seed, epoch=epoch) for i in range(size)) == list(range(size))


def test_permutation_depends_on_seed_and_epoch_and_mixes() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [permuted(i, 1000, seed=seed, epoch=epoch) for i in range(1000)]

    assert order(1, 0) != order(1, 1) != order(2, 1) != order(2, 0)
    assert order(1, 0) == order(1, 0)
    for seed in range(5):
        values = order(seed, 0)
        assert sum(abs(a - b) == 1 for a, b in pairwise(values)) < 20
        assert 4000 < sum(values[:10]) + sum(values[-10:]) < 16000
        mean = sum(values[:500]) / 500
        assert 450 < mean < 550
    assert permuted(123, 10**12, seed=3, epoch=0) < 10**12


def test_every_sequence_once_an_epoch() -> None:
    loader = Loader(corpus_of(64, length=8), sequence=8, batch_size=4)
    assert loader.num_sequences == 64
    for epoch in range(3):
        assert loader.epoch == epoch
        seen = [index for _ in range(16) for index in next(loader).sequences]
        assert sorted(seen) == list(range(64))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("new_size", [1, 2, 4])
def test_resume_in_the_middle_of_an_epoch_on_other_ranks(size: int, new_size: int) -> None:
    loaders = [Loader(corpus_of(), sequence=8, batch_size=2, seed=5, rank=rank, size=size) for rank in range(size)]
    for _ in range(4 * 3):
        for loader in loaders:
            next(loader)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    resumed = [batch for step in take(new_size, 3, state=states[0]) for batch in step]
    straight = [loaders[0].batch(12 * size + i) for i in range(3 * new_size)]
    assert all(equal(a, b) for a, b in zip(resumed, straight, strict=True))


def test_state_of_other_data_is_refused_by_name() -> None:
    state = Loader(corpus_of(), sequence=8, batch_size=2, seed=5).state_dict()
    with pytest.raises(DataError, match="seed was 5, is 6"):
        Loader(corpus_of(), sequence=8, batch_size=2, seed=6).load_state_dict(state)
    with pytest.raises(DataError, match="sequence was 8, is 9"):
        Loader(corpus_of(), sequence=9, batch_size=2, seed=5).load_state_dict(state)
    with pytest.raises(DataError, match="corpus was '"):
        Loader(corpus_of(61), sequence=8, batch_size=2, seed=5).load_state_dict(state)
    loader = Loader(corpus_of(), sequence=8, batch_size=2, seed=5)
    with pytest.raises(DataError, match="loader state has"):
        loader.load_state_dict({})
    for bad in (-2, 3, 1.0, True, "2"):
        with pytest.raises(DataError, match="no multiple of batch_size=2"):
            loader.load_state_dict(state | {"sequences_read": bad})  # type: ignore[dict-item]


def test_another_batch_size_continues_at_the_same_place() -> None:
    loader = Loader(corpus_of(), sequence=8, batch_size=4)
    first = [next(loader) for _ in range(3)]
    other = Loader(corpus_of(), sequence=8, batch_size=2)
    other.load_state_dict(loader.state_dict())
    assert next(other).number == 6
    assert [s for batch in first for s in batch.sequences] == [s for i in range(6) for s in other.batch(i).sequences]


def test_num_tokens_counts_what_carries_loss() -> None:
    batch = next(Loader(corpus_of(), sequence=8, batch_size=3))
    assert batch.tokens.shape == (3, 8) and batch.tokens.dtype == torch.int64
    assert batch.num_tokens == int((batch.targets != IGNORE).sum()) > 0
    moved = batch.to("cpu")
    assert equal(moved, batch)


def test_too_small_and_bad_arguments() -> None:
    with pytest.raises(DataError, match="420 tokens makes 53 sequences of 8, fewer than one batch of 54"):
        Loader(corpus_of(), sequence=8, batch_size=54)
    for bad in ({"batch_size": 0}, {"batch_size": 1, "rank": 2, "size": 2}, {"batch_size": 1, "seed": -1}):
        with pytest.raises(DataError, match="expected batch_size >= 1"):
            Loader(corpus_of(), sequence=8, **bad)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_validation_reads_everything_once_and_keeps_ranks_in_step(size: int) -> None:
    ranks = [list(validation_batches(corpus_of(), sequence=8, batch_size=5, rank=r, size=size)) for r in range(size)]
    assert len({len(batches) for batches in ranks}) == 1
    batches = [batch for rank in ranks for batch in rank]
    assert sum(batch.num_tokens for batch in batches) == len(corpus_expected())
    assert all(batch.tokens.shape == (5, 8) for batch in batches)
    limited = [
        batch
        for r in range(size)
        for batch in validation_batches(corpus_of(), sequence=8, batch_size=5, rank=r, size=size, limit=3)
    ]
    assert sorted(batch.number for batch in limited if batch.num_tokens) == [0, 1, 2]
    whole = -(-max(index for batch in batches for index in batch.sequences if batch.num_tokens) // 5)
    read = sorted(batch.sequences[0] // 5 for batch in limited if batch.num_tokens)
    assert read == [0, whole // 3, 2 * whole // 3] and read[1] > 1  # not the beginning alone


def corpus_expected() -> list[int]:
    """All targets of the corpus: six in each document of seven tokens."""
    return [0] * (60 * 6)


def test_validation_shorter_than_a_sequence() -> None:
    (batch,) = validation_batches(corpus_of(1), sequence=64, batch_size=1)
    assert batch.num_tokens == 6
