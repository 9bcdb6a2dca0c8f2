"""T30: a last batch that differs from rank to rank, an empty one, or none: the bits of one process."""

from __future__ import annotations

import pytest

from tests.worlds import Worlds

EVEN = [[7, 7, 7]]
SHARES = {
    "uneven": [EVEN, EVEN, [[7, 5, 1]]],
    "empty": [EVEN, [[7, 0, 3]], EVEN],
    "accumulated": [[[6, 6, 6], [6, 6, 6]], [[6, 6, 6], [4, 0, 0]], [[0, 2, 9], [3, 1, 0]]],
    "fewer": [[[6, 6, 6], [6, 6, 6]], [[6, 5, 2], [4, None, None]], [[None, 3, 0], [None, 8, None]], EVEN],
}


@pytest.mark.parametrize("divide", ["before", "after"])
@pytest.mark.parametrize("what", sorted(SHARES))
def test_uneven_batches_equal_one_process(world: Worlds, what: str, divide: str) -> None:
    assert world(3).run("tests.zero.uneven_cases", "uneven", SHARES[what], divide) == [[], [], []]


def test_two_ranks_take_turns(world: Worlds) -> None:
    """One rank has everything, then the other: no step is even."""
    shares = [[[9, 0]], [[0, 9]], [[9, None]], [[None, 9]], [[1, 8], [8, 0]]]
    assert world(2).run("tests.zero.uneven_cases", "uneven", shares, "before") == [[], []]
