"""Finds the tool calls in an answer as it comes: its text parted into content and calls, by the model's dialect."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from trivium.serve.tools import ToolPlan


@dataclass(frozen=True, kw_only=True)
class Call:
    """The beginning of a call, or (``name`` None) more of its arguments."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


class ToolReader:
    """Parts text into content and calls as it comes; what may be the beginning of a call is held back.

    It looks for a call only where the grammar lets one begin, so that whatever it takes for one is valid: after the
    trigger where that is text, after the trigger's token where that is a control token, and without a trigger where
    nothing but calls has been said.
    """

    def __init__(self, plan: ToolPlan, token_bytes: Callable[[int], bytes], control: Container[int]) -> None:
        """``token_bytes``: what a token stands for; ``control``: the ids of tokens that do not appear in text."""
        dialect = plan.dialect
        self._token_bytes = token_bytes
        self._control = control
        self._trigger_id = dialect.trigger_id
        trigger = "" if dialect.trigger_id is not None else dialect.trigger
        self._begins = {trigger + dialect.begin(name): name for name in plan.names}
        self._end = dialect.end
        self._between = dialect.between + " \n"
        self._held = ""
        # search: a call may begin anywhere; first: only here; never: not any more, or not before the trigger's token
        self._outside: Literal["search", "first", "never"]
        self._outside = "never" if dialect.trigger_id is not None else "search" if trigger else "first"
        self._state: Literal["search", "first", "never", "arguments", "tail"] = self._outside
        self._depth = 0
        self._quoted = self._escaped = False
        self.calls = 0

    @property
    def whole(self) -> bool:
        """Whether there are calls, and the last one's arguments are complete."""
        return self.calls > 0 and self._state != "arguments"

    def push(self, text: str, token_ids: Sequence[int]) -> tuple[str, list[Call]]:
        """The content that is certain by now, and what came of calls; ``token_ids`` are those of ``text``."""
        content: list[str] = []
        found: list[Call] = []
        for part, triggered in self._parts(text, token_ids):
            self._held += part
            while self._step(content, found):
                pass
            if triggered:
                self._state = "search"
        return "".join(content), found

    def flush(self) -> str:
        """At the end: what was held back and was no call."""
        rest, self._held = self._held, ""
        return "" if self._state in ("arguments", "tail") else rest

    def _parts(self, text: str, token_ids: Sequence[int]) -> Iterator[tuple[str, bool]]:
        """``text`` cut where the trigger's token stood, which text does not show."""
        begun = 0
        for place, token in enumerate(token_ids):
            if token == self._trigger_id:
                rest = [self._token_bytes(later) for later in token_ids[place + 1 :] if later not in self._control]
                at = max(begun, len(text) - len(b"".join(rest).decode(errors="ignore")))
                yield text[begun:at], True
                begun = at
        yield text[begun:], False

    def _step(self, content: list[str], found: list[Call]) -> bool:
        if self._state == "arguments":
            return self._arguments(found)
        if self._state == "tail":
            return self._tail()
        if self._state == "first" and self.calls:
            self._held = self._held.lstrip(self._between)
        if not self._held:
            return False
        at, hold = len(self._held), False
        if self._state != "never":
            at, hold = _first(self._held, list(self._begins))
            if at and self._state == "first":
                at, hold, self._state = len(self._held), False, "never"
        text, self._held = self._held[:at], self._held[at:]
        if self.calls:
            text = text.strip(self._between)  # what parts one call from the next
        if text:
            content.append(text)
        return bool(self._held) and not hold and self._head(found)

    def _head(self, found: list[Call]) -> bool:
        for begin, name in self._begins.items():
            if self._held.startswith(begin):
                self._held = self._held[len(begin) :]
                found.append(Call(index=self.calls, id=f"call_{secrets.token_hex(12)}", name=name))
                self.calls += 1
                self._state, self._depth = "arguments", 0
                return True
        return False

    def _arguments(self, found: list[Call]) -> bool:
        for place, letter in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = letter == "\\"
                self._quoted = letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth == 0:
                    found.append(Call(index=self.calls - 1, arguments=self._held[: place + 1]))
                    self._held = self._held[place + 1 :]
                    self._state = "tail"
                    return True
        if self._held:
            found.append(Call(index=self.calls - 1, arguments=self._held))
            self._held = ""
        return False

    def _tail(self) -> bool:
        if len(self._held) < len(self._end):
            return False
        self._held = self._held.removeprefix(self._end)
        self._state = self._outside
        return True


def _first(text: str, patterns: Sequence[str]) -> tuple[int, bool]:
    """Where the first of ``patterns`` stands whole (False), or where one may be beginning at the end (True)."""
    whole = min((at for at in (text.find(pattern) for pattern in patterns) if at >= 0), default=-1)
    longest = max(map(len, patterns))
    for at in range(max(0, len(text) - longest + 1), len(text)):
        if 0 <= whole <= at:
            break
        if any(pattern.startswith(text[at:]) for pattern in patterns):
            return at, True
    return (whole, False) if whole >= 0 else (len(text), False)
