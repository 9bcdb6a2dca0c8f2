"""Render a chat by a model folder's own jinja2 template: sandboxed, with caps on size, steps and time.

No paper. [Note: control tokens in contents] Before rendering, every control token's text inside a value that came with
the messages is broken by a mark, a character that occurs nowhere else. Templates may search, cut and trim contents as
they like; what is still unbroken in the output is the template's own. Marks go when the text becomes token ids. A
text that ends as a control token begins, or begins as one ends, is marked there too: what stands beside it, the
template's own text or another content, must not complete it.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trivium.base.errors import DataError
from trivium.base.sandbox import Caps, SandboxedTemplate
from trivium.base.sandbox import TemplateRefusal as TemplateRefusal

_CAPS = Caps(template_chars=256 << 10, output_chars=8 << 20, steps=500_000, seconds=3.0)
_MARKS = tuple(chr(code) for code in range(0xE000, 0xF8FF))
_ROLE = re.compile(r"[A-Za-z0-9_\-]{1,64}")


@dataclass(frozen=True)
class Rendered:
    """A rendered chat. ``mark`` stands inside control tokens' texts that came with the messages; "" where none did."""

    text: str
    mark: str

    @property
    def plain(self) -> str:
        """As a person would read it."""
        return self.text.replace(self.mark, "") if self.mark else self.text


class ChatTemplate:
    """A folder's template; any thread may render."""

    def __init__(self, text: str, *, source: str = "the chat template") -> None:
        """Raises DataError, naming ``source``, for a template that is too large or does not compile."""
        self._template = SandboxedTemplate(text, source=source, caps=_CAPS)
        self._source = source

    @property
    def text(self) -> str:
        """The template's own text."""
        return self._template.text

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokens: Mapping[str, str] | None = None,
        control: Iterable[str] = (),
        now: datetime.datetime | None = None,
        **options: Any,
    ) -> Rendered:
        """The chat as text. ``tokens``: ``bos_token`` and its like; ``control``: texts that contents must not say.

        ``continue_final_message``: the text ends where the last message's content does, for an answer that goes on from
        it, and ``add_generation_prompt`` has no effect. ``options`` go to the template as they are (``enable_thinking``
        and such). ``now`` is for ``strftime_now``.

        Raises:
            TemplateRefusal: the template refuses these messages; its own words.
            DataError: a role that is no name; nothing to go on from; the template failed, or exceeded its share of
                time, steps or size.
        """
        if not isinstance(messages, (list, tuple)):
            raise DataError(
                f"messages is a {type(messages).__name__}: expected a list of objects with role and content"
            )
        for number, message in enumerate(messages):
            role = message.get("role") if isinstance(message, Mapping) else None
            if not isinstance(role, str) or not _ROLE.fullmatch(role):
                raise DataError(f"messages[{number}].role={str(role)[:80]!r}: expected a name such as 'user'")
        try:
            breaker = _Breaker((messages, tools, options), control)
            given = breaker.broken(messages)
            if continue_final_message:
                given = _opened(given, breaker.end)
            variables = {
                "messages": given,
                "tools": breaker.broken(tools) if tools else None,
                "documents": None,
                "add_generation_prompt": add_generation_prompt and not continue_final_message,
                **(tokens or {}),
                **breaker.broken(options),
            }
        except RecursionError as error:
            raise DataError(f"{self._source} cannot be given messages that nest so deep") from error
        except (TypeError, ValueError) as error:
            raise DataError(f"{self._source} cannot render these messages: {error}") from error
        text = self._template.run(variables, now=now)
        if continue_final_message:
            text = self._cut(text, breaker.end)
        return Rendered(text=text, mark=breaker.mark if breaker.used else "")

    def _cut(self, text: str, end: str) -> str:
        """``text`` up to the end of the last content; without its last spaces where the template trims contents."""
        before, found, after = text.rpartition(end)
        if not found:
            raise DataError(f"{self._source} leaves out the last message, so that an answer cannot go on from it")
        return before.replace(end, "") if after.startswith(" ") else before.replace(end, "").rstrip()


def _opened(messages: list[dict[str, Any]], end: str) -> list[dict[str, Any]]:
    """``messages`` with ``end`` and a space, which shows whether contents are trimmed, behind the last content."""
    content = messages[-1].get("content") if messages else None
    if isinstance(content, str):
        return [*messages[:-1], messages[-1] | {"content": f"{content}{end} "}]
    parts = content if isinstance(content, list) else []
    if parts and isinstance(parts[-1], dict) and isinstance(parts[-1].get("text"), str):
        last = parts[-1] | {"text": f"{parts[-1]['text']}{end} "}
        return [*messages[:-1], messages[-1] | {"content": [*parts[:-1], last]}]
    raise DataError("continue_final_message: expected a last message whose content is, or ends with, a text")


class _Words:
    """Control tokens' texts: a pattern for all of them, and every part that one may begin or end with."""

    def __init__(self, words: tuple[str, ...]) -> None:
        ordered = sorted((word for word in words if len(word) > 1), key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self.longest = len(ordered[0]) if ordered else 0
        # Words of letters alone are left out: half the texts would end as one of them begins.
        marked = [word for word in ordered if not (word[0].isalnum() and word[-1].isalnum())]
        self.begins = frozenset(word[:at] for word in marked for at in range(1, len(word)))
        self.ends = frozenset(word[at:] for word in marked for at in range(1, len(word)))


_words = functools.lru_cache(maxsize=4)(_Words)


class _Breaker:
    """See [Note: control tokens in contents]."""

    def __init__(self, values: Any, control: Iterable[str]) -> None:
        self._words = _words(tuple(control))
        seen = set(json.dumps(values, ensure_ascii=False, default=str))
        marks = [mark for mark in _MARKS if mark not in seen][:2]
        if len(marks) < 2:
            raise DataError(f"the messages hold all {len(_MARKS)} characters from U+E000 on: leave two of them out")
        self.mark, self.end = marks
        self.used = False

    def broken(self, value: Any) -> Any:
        """A copy in which no text says a control token. A message's role is not content, but names a part."""
        if isinstance(value, str):
            pattern = self._words.pattern
            return value if pattern is None else pattern.sub(self._break, self._open_ends(value))
        if isinstance(value, Mapping):
            return {self.broken(key): self.broken(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.broken(item) for item in value]
        return value

    def _break(self, match: re.Match[str]) -> str:
        self.used = True
        return match[0][0] + self.mark + match[0][1:]

    def _open_ends(self, text: str) -> str:
        """``text`` marked inside what may be a control token's first or last part, once something stands beside it."""
        words = self._words
        stop, start = len(text.rstrip()), len(text) - len(text.lstrip())
        places = {
            at + 1 for at in range(max(start, stop - words.longest + 1), stop) if text[at:stop] in words.begins
        } | {
            at - 1 for at in range(start + 1, min(stop, start + words.longest - 1) + 1) if text[start:at] in words.ends
        }
        for place in sorted(places, reverse=True):
            text = text[:place] + self.mark + text[place:]
            self.used = True
        return text
