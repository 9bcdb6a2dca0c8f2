"""Which documents are kept for validation: a stable hash of the file's name, or of the row, against a share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from trivium.base.errors import DataError

Keys: TypeAlias = npt.NDArray[np.uint64]
Indices: TypeAlias = npt.NDArray[np.int64]


def is_validation(key: int, share: float) -> bool:
    """Whether a document with this 64-bit key is held out."""
    return key < int(share * 2**64)


def split(keys: Keys, share: float) -> tuple[Indices, Indices]:
    """Document numbers for training and for validation, each ascending.

    Depends on each key alone, so adding documents moves none. When the share is above zero but no key falls below it,
    the document with the smallest key is held out; when all do, the one with the largest is trained on. Equal keys
    (equal rows, or one file) always fall on one side. Raises DataError when there is nothing to split.
    """
    if not 0.0 <= share < 1.0:
        raise DataError(f"validation share {share}: expected 0 up to, not including, 1")
    everything = np.arange(len(keys), dtype=np.int64)
    if share == 0.0:
        return everything, everything[:0]
    if len(np.unique(keys)) < 2:
        raise DataError(
            f"{len(keys)} document(s) with one key cannot be split into training and validation; "
            "give more files or rows, or set data.validation = 0"
        )
    held = keys < np.uint64(int(share * 2**64))
    if not held.any():
        held = keys == keys.min()
    elif held.all():
        held = keys != keys.max()
    return everything[~held], everything[held]
