"""The block pool: counts, sharing, what is remembered and what goes first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.inference.blocks import ROOT_DIGEST, BlockError, BlockPool, chain


def test_allocate_share_release() -> None:
    pool = BlockPool(4, 2)
    first, second = pool.allocate(2)
    pool.share([first])
    assert pool.shared(first) and not pool.shared(second)
    pool.release([first, second])
    pool.check([[first]])
    assert pool.num_free == 3
    with pytest.raises(BlockError, match="4 cache blocks wanted, 3 of 4 are free"):
        pool.allocate(4)
    pool.release([first])
    with pytest.raises(BlockError, match="released more often"):
        pool.release([first])
    with pytest.raises(BlockError, match="is empty and cannot be shared"):
        pool.share([first])


def test_remembered_blocks_go_last_and_the_longest_unused_first() -> None:
    pool = BlockPool(4, 2)
    blocks = pool.allocate(3)
    digests = []
    for index, block in enumerate(blocks):
        digests.append(chain(digests[-1] if digests else ROOT_DIGEST, [index, index]))
        pool.publish(block, digests[-1])
    pool.release(reversed(blocks))
    assert pool.num_free == 4
    assert pool.match(digests) == blocks
    assert pool.allocate(1)[0] not in blocks  # the empty one
    assert pool.allocate(1) == [blocks[2]]  # the end of the sequence was released first
    assert pool.match(digests) == blocks[:2]
    pool.share(blocks[:1])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.num_free == 0
    pool.forget_all()
    assert pool.match(digests) == []
    pool.check([[block] for block in range(4)])


def test_a_digest_stands_for_all_before_it() -> None:
    assert chain(chain(ROOT_DIGEST, [1, 2]), [3, 4]) != chain(chain(ROOT_DIGEST, [2, 1]), [3, 4])
    assert chain(ROOT_DIGEST, [1, 2]) == chain(ROOT_DIGEST, (1, 2))
    assert chain(ROOT_DIGEST, [256]) != chain(ROOT_DIGEST, [1])


def test_the_first_of_two_equal_blocks_stays_known() -> None:
    pool = BlockPool(2, 1)
    first, second = pool.allocate(2)
    digest = chain(ROOT_DIGEST, [7])
    pool.publish(first, digest)
    pool.publish(second, digest)
    pool.release([second])
    assert pool.match([digest]) == [first]
    pool.check([[first]])


@pytest.mark.parametrize("defect", ["lost", "twice", "count", "digest"])
def test_check_sees_defects(defect: str) -> None:
    pool = BlockPool(3, 1)
    (block,) = pool.allocate(1)
    pool.publish(block, b"x")
    pool.check([[block]])
    if defect == "lost":
        pool._free.pop()
    elif defect == "twice":
        pool._free.append(block)
    elif defect == "digest":
        pool._by_digest[b"x"] = 1 - block
    with pytest.raises(BlockError):
        pool.check([[block, block]] if defect == "count" else [[block]])


@given(st.lists(st.tuples(st.sampled_from("asrpm"), st.integers(0, 5)), max_size=60), st.integers(1, 6))
def test_any_order_of_calls_adds_up(calls: list[tuple[str, int]], num_blocks: int) -> None:
    pool = BlockPool(num_blocks, 1)
    tables: list[list[int]] = []
    for call, number in calls:
        if call == "a" and number <= pool.num_free:
            tables.append(pool.allocate(number))
        elif call == "s" and tables:
            table = list(tables[number % len(tables)])
            pool.share(table)
            tables.append(table)
        elif call == "r" and tables:
            pool.release(reversed(tables.pop(number % len(tables))))
        elif call == "p" and tables:
            for block in tables[number % len(tables)]:
                pool.publish(block, bytes([number]))
        elif call == "m":
            found = pool.match([bytes([number])])
            pool.share(found)
            tables.append(found)
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    assert pool.num_free == num_blocks
