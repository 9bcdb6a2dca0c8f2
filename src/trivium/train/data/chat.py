"""Render a chat by the tokenizer's own jinja2 template, telling what is content and what is the template's.

The template runs sandboxed, with caps on its size, its output, its loops and its time. Contents never pass through it:
it renders placeholders, so that nothing inside a message can become a control token and every token's owner is known.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator, Mapping, Sequence

from trivium.base.errors import DataError
from trivium.base.sandbox import Caps, SandboxedTemplate, TemplateRefusal
from trivium.train.data.sources import Message

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_CAPS = Caps(template_chars=64 << 10, output_chars=1 << 20, steps=100_000, seconds=2.0)
_NEVER = datetime.datetime(2000, 1, 1)  # a date that changes would change the tokens
_EDGE = "\u2003"
_MARK = re.compile("(\u2003?)\ue000([0-9]+)\ue001(\u2003?)")


class Template:
    """A chat template, compiled once inside its sandbox; ``text`` is what is saved with the tokenizer."""

    def __init__(self, text: str, *, source: str) -> None:
        """Check size and syntax. Raises DataError naming ``source``."""
        self._template = SandboxedTemplate(text, source=f"{source}: chat_template", caps=_CAPS)
        self.text = text
        self._source = source

    def render(
        self, messages: Sequence[Message], tokens: Mapping[str, str], *, prompt: bool, where: str
    ) -> list[tuple[str, str | None]]:
        """The rendered chat in pieces: (text, role) for a message's content, (text, None) for the template's own."""
        rows = [
            {"role": message.role, "content": f"{_EDGE}\ue000{index}\ue001{_EDGE}"}
            for index, message in enumerate(messages)
        ]
        variables = {**tokens, "messages": rows, "add_generation_prompt": prompt}
        try:
            output = self._template.run(variables, now=_NEVER)
        except (DataError, TemplateRefusal) as error:
            raise DataError(f"{where}: the chat_template of {self._source} failed ({error})") from error
        return list(self._pieces(output, messages, where))

    def _pieces(self, output: str, messages: Sequence[Message], where: str) -> Iterator[tuple[str, str | None]]:
        seen = [int(match[2]) for match in _MARK.finditer(output)]
        if seen != list(range(len(messages))):
            raise DataError(
                f"{where}: the chat_template of {self._source} renders messages {seen} of {len(messages)}; "
                "each must appear once and in order for the loss mask to be exact"
            )
        start = 0
        for match in _MARK.finditer(output):
            if match.start() > start:
                yield output[start : match.start()], None
            message = messages[int(match[2])]
            content = message.content if match[1] else message.content.lstrip()
            content = content if match[3] else content.rstrip()
            yield content, message.role
            start = match.end()
        if start < len(output):
            yield output[start:], None
