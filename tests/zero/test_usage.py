"""Bits told between ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from trivium.zero.usage import num_words, pack, used_by_anyone


@given(st.data())
def test_the_union_of_what_ranks_pack(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 90), max_size=5))
    ranks = data.draw(
        st.lists(st.lists(st.booleans(), min_size=sum(counts), max_size=sum(counts)), min_size=1, max_size=3)
    )
    rows = [pack(bits) for bits in ranks]
    assert all(len(row) == num_words(sum(counts)) and all(0 <= word < 2**62 for word in row) for row in rows)
    expected, position = [], 0
    for count in counts:
        expected.append({i for i in range(count) if any(bits[position + i] for bits in ranks)})
        position += count
    assert used_by_anyone(rows, counts) == expected
