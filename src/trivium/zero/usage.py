"""Which parameters have a gradient, as bits in a few whole numbers that the ranks tell each other.

ZeRO section 5.2 reduces every gradient; here a parameter that no rank used is skipped, one that some used is not.
"""

from __future__ import annotations

from collections.abc import Sequence

_BITS = 62


def num_words(num_bits: int) -> int:
    """How many words `pack` makes of ``num_bits``."""
    return -(-num_bits // _BITS)


def pack(bits: Sequence[bool]) -> list[int]:
    """``bits`` in words, the first in the lowest place of the first word."""
    return [
        sum(bit << place for place, bit in enumerate(bits[start : start + _BITS]))
        for start in range(0, len(bits), _BITS)
    ]


def used_by_anyone(rows: Sequence[Sequence[int]], counts: Sequence[int]) -> list[set[int]]:
    """Of consecutive groups of ``counts`` bits, which are set in any rank's words: the places within each group."""
    together = [0] * num_words(sum(counts))
    for row in rows:
        together = [mine | theirs for mine, theirs in zip(together, row, strict=True)]
    used: list[set[int]] = []
    position = 0
    for count in counts:
        places = range(position, position + count)
        used.append({place - position for place in places if together[place // _BITS] >> place % _BITS & 1})
        position += count
    return used
