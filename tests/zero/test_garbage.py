"""A step leaves nothing that only the garbage collector would find: its graph and its gradients go at once."""

from __future__ import annotations

from tests.worlds import Worlds


def test_a_step_leaves_no_cycle(world: Worlds) -> None:
    assert world(2).run("tests.zero.garbage_cases", "collected_after_steps") == [[], []]
