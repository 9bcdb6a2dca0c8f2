"""From tokens to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

_REPLACEMENT = "\ufffd"
_LONGEST_HOLD = 16


class Decoder(Protocol):
    """What turns token ids into text; a character's bytes may be spread over several tokens."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of ``token_ids``, special tokens left out."""


class Detokenizer:
    """Text of one answer, token by token. All pieces together are the text of all tokens.

    A piece is what a short tail of tokens says with the new ones, minus what it said without them; it is held back
    while it ends in an unfinished character. One that begins in the prompt and ends in the answer is the answer's.
    """

    def __init__(self, decoder: Decoder, before: Sequence[int] = ()) -> None:
        """``before``: the prompt's last tokens, so that a first piece keeps its leading space."""
        self._decoder = decoder
        self._tail = list(before)[-_LONGEST_HOLD:]
        self._said = decoder.decode(self._tail) if self._tail else ""
        self._num_said = len(self._tail)

    def push(self, token_ids: Sequence[int]) -> str:
        """The new whole characters after ``token_ids``."""
        return "".join([self._push(token) for token in token_ids])

    def flush(self) -> str:
        """What was held back: an unfinished character appears as U+FFFD."""
        return self._emit(self._decoder.decode(self._tail)) if len(self._tail) > self._num_said else ""

    def _push(self, token_id: int) -> str:
        self._tail.append(token_id)
        text = self._decoder.decode(self._tail)
        held = len(self._tail) - self._num_said
        if text.endswith(_REPLACEMENT) and held < _LONGEST_HOLD:
            return ""
        return self._emit(text)

    def _emit(self, text: str) -> str:
        at = len(self._said)
        if self._said.endswith(_REPLACEMENT) and not text.startswith(self._said):
            at = next(i for i, char in enumerate(self._said) if text[i : i + 1] != char)
        piece = text[at:]
        if piece:
            self._tail = self._tail[self._num_said :]
            self._said = self._decoder.decode(self._tail)
        elif len(self._tail) > 4 * _LONGEST_HOLD:  # tokens without text: do not decode them again and again
            self._tail = self._tail[-_LONGEST_HOLD:]
            self._said = self._decoder.decode(self._tail)
        self._num_said = len(self._tail)
        return piece


class StopFinder:
    """Looks for stop strings over pieces of text, holding back only what may be the beginning of one."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._longest = max((len(stop) for stop in stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that may be shown now, and the stop string that ended it (the first to be complete) if one did."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(
            ((text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text), default=None
        )
        if found is not None:
            end, _, stop = found
            self._held = ""
            return text[: end if self._include else end - len(stop)], stop
        hold = self._beginning(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def pass_over(self, text: str) -> str:
        """Text in which no stop counts yet; a stop may not begin in it either."""
        shown, self._held = self._held + text, ""
        return shown

    def flush(self) -> str:
        """What was held back and turned out to be no stop."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop string begins."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
