"""Fetches start in list order, never out of it, at most as far ahead as there is room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivium.memory.prefetch import Prefetcher


def test_one_ahead() -> None:
    fetched: list[str] = []
    prefetcher = Prefetcher(fetched.append, lambda: True, depth=1)
    prefetcher.walk("abcd")
    prefetcher.top_up()
    assert fetched == ["a"]
    assert prefetcher.reach("a") == ()
    prefetcher.top_up()
    assert fetched == ["a", "b"]
    assert prefetcher.reach("c") == ("b",)
    assert fetched == ["a", "b", "c"]
    assert prefetcher.reach("b") is None
    assert prefetcher.finish() == ("d",)
    assert fetched == ["a", "b", "c", "d"]


def test_no_room_no_fetch_ahead() -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, lambda: False, depth=3)
    prefetcher.walk([1, 2, 3])
    prefetcher.top_up()
    assert fetched == []
    assert prefetcher.reach(1) == ()
    assert fetched == [1]


@given(order=st.lists(st.integers(0, 5), max_size=12), depth=st.integers(0, 4), data=st.data())
def test_every_item_is_fetched_once_in_order_and_never_too_far_ahead(
    order: list[int], depth: int, data: st.DataObject
) -> None:
    fetched: list[int] = []
    prefetcher = Prefetcher(fetched.append, lambda: data.draw(st.booleans()), depth=depth)
    prefetcher.walk(order)
    position = 0
    for item in data.draw(st.lists(st.integers(0, 5), max_size=12)):
        prefetcher.top_up()
        assert len(fetched) <= max(position + depth, position)
        passed = prefetcher.reach(item)
        expected = order.index(item, position) if item in order[position:] else None
        if expected is None:
            assert passed is None
        else:
            assert passed == tuple(order[position:expected])
            position = expected + 1
        assert fetched == order[: len(fetched)]
        assert len(fetched) >= position
    assert prefetcher.finish() == tuple(order[position:])
    assert fetched == order
