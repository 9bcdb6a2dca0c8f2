"""The cache's blocks as integers: who holds which, which may be found again by their content, which go first.

DeepSpeed Inference section 3.1 (many requests share one device's memory). A block holds the keys and values of
``block_size`` neighbouring tokens, of all layers at once: a latent layer counts like the others, and a block falls
behind the window when it is behind every layer's.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from trivium.base.errors import TriviumError

ROOT_DIGEST = b""
HOLE = -1  # in a sequence's blocks: one that is behind the window, and no longer held


class BlockError(TriviumError):
    """The accounting of cache blocks is broken: a defect of the engine."""


def chain(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """What a full block of ``token_ids`` behind ``parent`` is known by: 16 bytes that also stand for all before it."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def most_held(tokens: int, *, block_size: int, window: int | None, step_tokens: int) -> int:
    """Blocks that a sequence of ``tokens`` holds at most: with a window only those that a step may read or write."""
    whole = -(-tokens // block_size)
    if window is None:
        return whole
    return min(whole, -(-(window + step_tokens - 2) // block_size) + 1)


class BlockPool:
    """Blocks 0 … ``num_blocks`` − 1 with reference counts.

    A published block that nobody holds keeps its content and can be shared again, until it is the longest unused
    one (least recently released first) and space is wanted.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._unused: OrderedDict[int, None] = OrderedDict()
        self._digests: dict[int, bytes] = {}
        self._by_digest: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: empty ones and those that only remember a prefix."""
        return len(self._free) + len(self._unused)

    @property
    def num_remembered(self) -> int:
        """Published blocks, held or not."""
        return len(self._digests)

    def shared(self, block: int) -> bool:
        """Whether more than one holds ``block``, so that it must be copied before it is written."""
        return self._references[block] > 1

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks held once each, content undefined. Raises BlockError when there are not as many."""
        if count > self.num_free:
            raise BlockError(f"{count} cache blocks wanted, {self.num_free} of {self.num_blocks} are free")
        taken = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _none = self._unused.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Hold ``blocks`` once more; unused published ones come back."""
        for block in blocks:
            if self._references[block] == 0:
                if block not in self._unused:
                    raise BlockError(f"cache block {block} is empty and cannot be shared")
                del self._unused[block]
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Hold ``blocks`` once less. Give the end of a sequence first: what is released first is overwritten first."""
        for block in blocks:
            count = self._references[block] - 1
            if count < 0:
                raise BlockError(f"cache block {block} was released more often than it was held")
            self._references[block] = count
            if count == 0:
                if block in self._digests:
                    self._unused[block] = None
                else:
                    self._free.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """Make a full block findable by its ``digest``; where another one is already known by it, that one stays."""
        if digest not in self._by_digest and block not in self._digests:
            self._by_digest[digest] = block
            self._digests[block] = digest

    def match(self, digests: Iterable[bytes], reach: int | None = None) -> list[int]:
        """The longest run of known blocks at the head of ``digests``; nothing is held by asking.

        With a ``reach`` the last so many blocks of the run suffice: those before them come as HOLE.
        """
        found: list[int] = []
        if reach is not None:
            known = [self._by_digest.get(digest, HOLE) for digest in digests]
            run = end = 0
            for index, block in enumerate(known, start=1):
                run = run + 1 if block != HOLE else 0
                end = index if run >= min(index, reach) else end
            kept = known[max(0, end - reach) : end]
            return [HOLE] * (end - len(kept)) + kept
        for digest in digests:
            if digest not in self._by_digest:
                break
            found.append(self._by_digest[digest])
        return found

    def num_unused(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` nobody holds: sharing them makes as many fewer free."""
        return sum(1 for block in blocks if self._references[block] == 0)

    def forget(self, blocks: Iterable[int]) -> None:
        """Drop what is remembered of ``blocks``: their content is not to be used by others."""
        for block in blocks:
            if block in self._digests:
                self._forget(block)
                if block in self._unused:
                    del self._unused[block]
                    self._free.append(block)

    def forget_all(self) -> None:
        """Drop every remembered prefix (new weights make them wrong); held blocks stay held."""
        self._free.extend(self._unused)
        self._unused.clear()
        self._digests.clear()
        self._by_digest.clear()

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Compare every count with the ``tables`` that hold blocks. Raises BlockError naming the first wrong one."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        places = [0] * self.num_blocks
        for block in (*self._free, *self._unused):
            places[block] += 1
        for block in range(self.num_blocks):
            if held[block] != self._references[block]:
                raise BlockError(f"cache block {block}: held {held[block]} times, counted {self._references[block]}")
            if places[block] != (held[block] == 0):
                raise BlockError(
                    f"cache block {block}: held {held[block]} times and {places[block]} times in free lists"
                )
            if (block in self._unused) and block not in self._digests:
                raise BlockError(f"cache block {block}: kept for its content, but that is not known")
        if any(self._digests.get(block) != digest for digest, block in self._by_digest.items()):
            raise BlockError("a prefix leads to a cache block that is not known by it")
        if len(self._by_digest) != len(self._digests):
            raise BlockError(f"{len(self._by_digest)} prefixes lead to {len(self._digests)} cache blocks")

    def _forget(self, block: int) -> None:
        digest = self._digests.pop(block)
        del self._by_digest[digest]
