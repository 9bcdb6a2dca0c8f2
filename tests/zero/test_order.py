"""T31: ranks that issue collectives in another order are told who came for what, at once, and none of them aborts."""

from __future__ import annotations

import pytest

from tests.worlds import Worlds

WORDS = {
    "two shards": ["rank 0 has ['first.weight'", "rank 2 has ['embedding.weight'"],
    "two forwards": ["rank 0 for", "of Blocks", "rank 2 for", "of Plain"],
    "two steps": ["rank 0 for step of Blocks", "rank 2 for step of Plain"],
    "two like steps": ["rank 0 for step of Blocks", "rank 2 for step of Blocks"],
    "two reads": ["rank 0", "Blocks", "rank 2", "Plain"],
    "shard or train": ["rank 0 for shard of Plain", "rank 2 for", "of Blocks"],
    "clip or step": ["rank 0 in clip", "rank 2 in step"],
    "read or train": ["rank 0 in visit", "rank 2 in reduce"],
}
"""What the first ranks are told to have come for, and the last one."""


@pytest.mark.parametrize("stage", [1, 3])
def test_another_order_is_told_on_every_rank(world: Worlds, stage: int) -> None:
    """Models of other classes and of one class; sharding, passes, steps, clips and reads against each other."""
    for found in world(3).run("tests.zero.order_cases", "other_orders", stage, discard=True):
        assert set(found) == set(WORDS)
        for what, (said, seconds) in found.items():
            assert said.startswith("MismatchError"), f"{what}: {said}"
            missing = [word for word in WORDS[what] if word not in said]
            assert not missing, f"{what}: {missing} not in {said}"
            assert seconds < 10, what
