"""Whole answers, put together from deltas: what `LLM.generate` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from trivium.base.errors import TriviumError
from trivium.inference.request import Collected, Delta, FinishReason, TokenLogprobs


@dataclass(kw_only=True)
class Answer:
    """One choice. ``error`` says why ``finish_reason`` is "error"; ``stop`` what ended it: a string or a token."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop: str | int | None = None
    error: str | None = None

    def add(self, delta: Delta) -> None:
        """Append a delta."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        self.finish_reason = delta.finish_reason
        self.stop, self.error = delta.stop, delta.error


@dataclass(kw_only=True)
class Output:
    """A prompt's answers; ``text``, ``token_ids``, ``finish_reason`` and ``logprobs`` are the first one's.

    ``token_ids`` are the answer's alone, also where ``echo`` puts the prompt's text before it.
    """

    prompt_token_ids: Sequence[int]
    choices: list[Answer]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    cached_tokens: int = 0
    collected: Collected | None = None

    @property
    def text(self) -> str:
        """The first choice's text; "" without a tokenizer."""
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        """The first choice's tokens, what ended it included."""
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        """Of the first choice's tokens, where asked for."""
        return self.choices[0].logprobs

    @property
    def error(self) -> str | None:
        """What went wrong with the first choice."""
        return self.choices[0].error

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def whole(self) -> Collected:
        """What was collected. Raises TriviumError where the request did not come to its end."""
        if self.collected is None:
            raise TriviumError(f"the request ended early ({self.finish_reason}): {self.error or 'it was cancelled'}")
        return self.collected

    def add(self, delta: Delta) -> None:
        """Take a delta in."""
        self.choices[delta.choice].add(delta)
        self.cached_tokens = delta.cached_tokens
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        if delta.collected is not None:
            self.collected = delta.collected
