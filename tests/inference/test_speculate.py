"""Guessing ahead: what is guessed, and that it stops, for longer each time, where it does not pay."""

from __future__ import annotations

import itertools

from trivium.inference.speculate import Guesser, StepCost


def cost_of(ratio: float) -> StepCost:
    cost = StepCost()
    cost.observe(1.0, guessing=False)
    cost.observe(ratio, guessing=True)
    return cost


class Answer:
    """An answer "1 2 3 1 2 3 …" that goes on and on."""

    def __init__(self, guesser: Guesser) -> None:
        self.guesser, self.tokens = guesser, [1, 2, 3] * 3

    def guesses(self, steps: int, *, right: bool) -> list[int]:
        """The steps in which something was guessed, of which all stands, or nothing."""
        at = []
        for step in range(steps):
            self.tokens.append(self.tokens[-3])
            guessed = self.guesser.guess(self.tokens)
            if guessed:
                at.append(step)
            self.guesser.observe(len(guessed), len(guessed) if right else 0)
        return at


def rests_between(steps: list[int]) -> list[int]:
    return [later - earlier - 1 for earlier, later in itertools.pairwise(steps) if later - earlier > 1]


def test_the_longest_known_end_tells_what_follows_and_the_last_time_counts() -> None:
    guesser = Guesser(StepCost(), most=3)
    assert guesser.guess([1, 2, 3, 4, 5]) == []
    assert guesser.guess([1, 2, 3, 4, 5, 2, 3]) == [4, 5, 2]
    assert guesser.guess([1, 2, 3, 4, 5, 2, 3, 9, 2, 3]) == [9, 2, 3]  # 2 3 stood twice
    assert guesser.guess([1, 2, 3, 4, 5, 2, 3, 9, 2, 3, 4, 5]) == [2, 3, 9]  # 2 3 4 5 stood once


def test_a_step_that_costs_more_than_it_gains_rests_twice_as_long_each_time() -> None:
    at = Answer(Guesser(cost_of(1.5))).guesses(6000, right=False)
    assert rests_between(at) == [32, 64, 128, 256, 512, 1024, 1024, 1024, 1024]
    assert len(at) < 0.01 * 6000


def test_what_pays_never_rests_and_begins_again_from_the_shortest_rest() -> None:
    answer = Answer(Guesser(cost_of(1.5)))
    assert len(answer.guesses(500, right=True)) == 500
    assert rests_between(answer.guesses(400, right=False))[:3] == [32, 64, 128]
    assert answer.guesses(1100, right=True)  # after what was left of a rest
    assert rests_between(answer.guesses(200, right=False))[0] == 32


def test_the_cost_is_what_was_measured_and_at_least_one() -> None:
    assert StepCost().ratio == 1.3
    assert cost_of(0.8).ratio == 1.0
    cost = cost_of(2.0)
    for _ in range(200):
        cost.observe(3.0, guessing=True)
    assert abs(cost.ratio - 3.0) < 1e-6
    free = Guesser(cost_of(1.0))
    assert len(Answer(free).guesses(500, right=False)) == 500  # a wider step that costs nothing cannot lose
