"""Which parameters have a gradient, as bits in a few whole numbers that the ranks tell each other.

ZeRO section 5.2 reduces every gradient; here a parameter that no rank used is skipped, one that some used is not.

[Note: experts apart]
Ranks that hold other experts have other parameters in the flats of these, perhaps more or fewer, perhaps none. Yet all
have the same flats in the same order, so that a number means the same flat everywhere; the bits of usage leave as many
places for a flat as the rank with the most parameters needs, and are read among the ranks that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

_BITS = 62


class Places:
    """Every flat's bits at the same place on all ranks; see [Note: experts apart].

    ``counts``: the most parameters any rank has in each flat. ``members``: the ranks (by place) that hold a flat's own.
    """

    def __init__(self, counts: Sequence[int], members: Sequence[tuple[int, ...]]) -> None:
        self._counts, self._members = tuple(counts), tuple(members)
        self.num_words = num_words(sum(counts))

    def pack(self, bits: Sequence[Sequence[bool]]) -> list[int]:
        """The words of this rank, from its bits by flat."""
        return pack(
            [
                bit
                for mine, count in zip(bits, self._counts, strict=True)
                for bit in (*mine, *[False] * (count - len(mine)))
            ]
        )

    def used(self, told: Sequence[Sequence[int]]) -> list[set[int]]:
        """Of each flat, which parameters any of the ranks that hold them used. ``told``: words by rank, empty: none."""
        found = {
            members: used_by_anyone([told[rank] for rank in members if told[rank]], self._counts)
            for members in set(self._members)
        }
        return [found[members][number] for number, members in enumerate(self._members)]


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
