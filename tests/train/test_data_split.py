"""The split: by each key alone, both sides filled when they can be, refused when they cannot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.errors import DataError
from trivium.train.data.sources import stable_hash
from trivium.train.data.split import is_validation, split


def keys_of(values: list[int]) -> np.ndarray:
    return np.asarray(values, dtype=np.uint64)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=50), st.floats(0.01, 0.99))
def test_both_sides_filled_disjoint_and_by_key(values: list[int], share: float) -> None:
    if len(set(values)) < 2:
        return
    train, held = split(keys_of(values), share)
    assert sorted([*train, *held]) == list(range(len(values)))
    assert len(train) and len(held)
    assert not {values[i] for i in train} & {values[i] for i in held}


def test_share_is_met_and_adding_moves_none() -> None:
    keys = keys_of([stable_hash(f"file {i}") for i in range(4000)])
    train, held = split(keys, 0.1)
    assert 0.08 < len(held) / 4000 < 0.12
    more_train, more_held = split(np.concatenate([keys, keys_of([stable_hash("new")])]), 0.1)
    assert set(train) <= set(more_train) and set(held) <= set(more_held)
    assert all(is_validation(int(keys[i]), 0.1) for i in held)


def test_hash_is_pinned() -> None:
    assert stable_hash("json/decoder.py") == stable_hash("json/" + "decoder.py") != stable_hash("json/encoder.py")
    assert stable_hash("") == 0x2D06800538D394C2


def test_no_validation_and_nothing_to_split() -> None:
    train, held = split(keys_of([1, 2]), 0.0)
    assert (list(train), list(held)) == ([0, 1], [])
    with pytest.raises(DataError, match=r"give more files or rows, or set data.validation = 0"):
        split(keys_of([7, 7]), 0.1)
    with pytest.raises(DataError, match=r"share 1\.0"):
        split(keys_of([1, 2]), 1.0)
