"""The error that says: these files are not what was saved, another checkpoint may do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from trivium.base.errors import CheckpointError


class DamagedError(CheckpointError):
    """A checkpoint's files are missing, truncated or altered."""


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """Whatever is wrong with the files read inside the block is damage."""
    try:
        yield
    except DamagedError:
        raise
    except CheckpointError as error:
        raise DamagedError(str(error)) from error
    except OSError as error:
        raise DamagedError(f"{error.filename}: {error.strerror}") from error
