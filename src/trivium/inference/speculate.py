"""Guess tokens to come by looking up where the last few stood before, and stop guessing where it does not pay.

Prompt-lookup decoding: the guesses are computed along with the next token, and those that are what the model says
stand. The tokens are the same as without, since every one is drawn from the model's own row with its own number.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 4
_SHORTEST = 2
_REST_TOKENS = 32
_LONGEST_REST_TOKENS = 1024
_SMOOTH = 0.1


class StepCost:
    """What a step with guesses takes, as a multiple of one without: measured by the engine, shared by its choices."""

    def __init__(self) -> None:
        self._plain_s: float | None = None
        self._guessing_s: float | None = None

    @property
    def ratio(self) -> float:
        """At least 1; 1.3 until both have been seen."""
        if self._plain_s is None or self._guessing_s is None:
            return 1.3
        return max(1.0, self._guessing_s / self._plain_s)

    def observe(self, seconds: float, *, guessing: bool) -> None:
        """A step of decodes alone took ``seconds``."""
        before = self._guessing_s if guessing else self._plain_s
        after = seconds if before is None else before + _SMOOTH * (seconds - before)
        if guessing:
            self._guessing_s = after
        else:
            self._plain_s = after


class Guesser:
    """One choice's guesses, by an index of where each pair to quadruple of tokens stood last."""

    def __init__(self, cost: StepCost, *, most: int = 8) -> None:
        self._cost = cost
        self._most = most
        self._ends: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._gain = 2.0
        self._rest = 0
        self._next_rest = _REST_TOKENS

    def guess(self, tokens: Sequence[int]) -> list[int]:
        """What followed the longest known end of ``tokens``; empty while resting or where nothing is known."""
        self._index(tokens)
        if self._rest > 0:
            self._rest -= 1
            return []
        for length in range(min(_LONGEST, len(tokens) - 1), _SHORTEST - 1, -1):
            end = self._ends.get(tuple(tokens[-length:]))
            if end is not None:
                return list(tokens[end : end + self._most])
        return []

    def observe(self, guessed: int, right: int) -> None:
        """Of ``guessed`` tokens ``right`` stood: rest for a while, longer each time, when that does not pay."""
        if not guessed:
            return
        self._gain += 0.25 * (1 + right - self._gain)
        if self._gain < self._cost.ratio:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, _LONGEST_REST_TOKENS)
            self._gain = 2.0
        elif right:
            self._next_rest = _REST_TOKENS

    def _index(self, tokens: Sequence[int]) -> None:
        """Note all runs that end before the last token, so that something follows each."""
        for end in range(max(self._indexed, _SHORTEST), len(tokens)):
            for length in range(_SHORTEST, min(_LONGEST, end) + 1):
                self._ends[tuple(tokens[end - length : end])] = end
        self._indexed = len(tokens)
