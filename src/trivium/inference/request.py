"""What is asked of the engine and what comes back: sampling settings, requests, and the pieces of their answers.

DeepSpeed Inference section 3.1 (requests of any length share the device). V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from trivium.base.errors import ConfigError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]
Collect = Literal["logits", "hidden", "routing"]
COLLECTIONS: tuple[Collect, ...] = ("logits", "hidden", "routing")


class RequestError(ConfigError):
    """A request that cannot be served as it stands; ``param`` names the field that is wrong."""

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """A prompt that does not fit into the context; ``given`` and ``limit`` are tokens."""

    def __init__(self, message: str, *, given: int, limit: int) -> None:
        super().__init__(message, param="prompt")
        self.given = given
        self.limit = limit


class Constraint(Protocol):
    """Grammar-guided decoding: which tokens may come next. One instance per choice, by `fork`."""

    def allowed(self) -> torch.Tensor | None:
        """Bool [V] on the CPU: True where a token may come next; None: all may."""

    def accept(self, token_id: int) -> None:
        """The token that was chosen."""

    def finished(self) -> bool:
        """Whether the text is complete: nothing may follow."""

    def fork(self) -> Constraint:
        """An independent copy in the same state."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn and where it ends. Every field is checked when the object is made.

    ``temperature`` 0 takes the likeliest token. ``top_k`` 0 (or −1), ``top_p`` 1 and ``min_p`` 0 cut nothing; ``top_p``
    0 keeps the likeliest token. ``max_tokens`` None: to the end of the context. ``seed`` None: drawn when the request
    is added. Log-probabilities are the model's own, before penalties, masks and temperature. ``echo`` puts the
    prompt's text before the answer's. ``min_tokens``: no end token and no stop string before that many tokens.
    """

    max_tokens: int | None = 256
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    n: int = 1
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    echo: bool = False
    include_stop: bool = False
    truncate_prompt: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _texts(self.stop))
        object.__setattr__(self, "stop_token_ids", _tokens(self.stop_token_ids))
        for name in ("ignore_eos", "echo", "include_stop", "truncate_prompt"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name}={_shown(getattr(self, name))}: expected True or False", param=name)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 0)
        _whole("min_tokens", self.min_tokens, 0)
        _whole("top_k", self.top_k, -1)
        _whole("n", self.n, 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0)
        if self.seed is not None:
            _whole("seed", self.seed, None)
        _number("temperature", self.temperature, 0.0, None)
        _number("top_p", self.top_p, 0.0, 1.0)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("presence_penalty", self.presence_penalty, None, None)
        _number("frequency_penalty", self.frequency_penalty, None, None)
        if _number("repetition_penalty", self.repetition_penalty, 0.0, None) == 0.0:
            raise RequestError("repetition_penalty=0: expected more than 0; 1 leaves tokens as they are",
                               param="repetition_penalty")  # fmt: skip
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias={_shown(self.logit_bias)}: expected token ids, each with a number",
                               param="logit_bias")  # fmt: skip
        bias = {_whole("logit_bias", token, 0): _number("logit_bias", value, None, None)
                for token, value in self.logit_bias.items()}  # fmt: skip
        object.__setattr__(self, "logit_bias", bias)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens={self.min_tokens} and max_tokens={self.max_tokens}: expected min_tokens to be no larger",
                param="min_tokens",
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1 or self.top_p == 0.0

    @property
    def penalised(self) -> bool:
        """Whether earlier tokens change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how to answer it. ``constraint`` is forked once per choice.

    ``collect`` hands back, with the last delta, what the model computed at every position of the prompt and the answer:
    "logits" [T, V], "hidden" [T, dim], or "routing" (per MoE layer experts int32 and weights fp32, both [T, K]). A
    request that failed or was cancelled hands back nothing.
    ``routing`` replays choices of experts: per MoE layer int32 [T, K] for the prompt's tokens.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams = field(default_factory=SamplingParams)
    constraint: Constraint | None = None
    collect: Collect | None = None
    routing: tuple[torch.Tensor, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """The log-probability of a token where it stands, and the likeliest tokens there, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Collected:
    """What `Request.collect` asked for, on the CPU, a row per position (an answer's last token has none)."""

    logits: torch.Tensor | None = None
    hidden: torch.Tensor | None = None
    routing: tuple[tuple[torch.Tensor, torch.Tensor], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Delta:
    """What one step added to one choice. ``text`` holds whole characters only; ``token_ids`` may run ahead of it.

    ``prompt_logprobs`` (the first token has none: None) comes once, with the choice's first delta.
    """

    request_id: str
    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    collected: Collected | None = None
    stop: str | int | None = None


def check_tokens(token_ids: Sequence[int], vocabulary: int, *, param: str = "prompt") -> list[int]:
    """A plain list of ``token_ids``. Raises RequestError when it is empty or an id is not in the vocabulary."""
    tokens = list(token_ids)
    if not tokens:
        raise RequestError(f"{param} has no tokens: expected at least one", param=param)
    for index, token in enumerate(tokens):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise RequestError(
                f"{param}: token {token!r} at index {index}: expected whole numbers from 0 to {vocabulary - 1}",
                param=param,
            )
    return tokens


def _texts(stop: object) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, (list, tuple)) else None
    if texts is None or not all(isinstance(text, str) and text for text in texts):
        raise RequestError(f"stop={stop!r}: expected texts of at least one character", param="stop")
    return texts


def _tokens(ids: object) -> tuple[int, ...]:
    if not isinstance(ids, (list, tuple, set, frozenset, range)):
        raise RequestError(f"stop_token_ids={_shown(ids)}: expected a list of token ids", param="stop_token_ids")
    return tuple(_whole("stop_token_ids", token, 0) for token in ids)


def _whole(name: str, value: object, low: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        expected = "a whole number" if low is None else f"a whole number of at least {low}"
        raise RequestError(f"{name}={_shown(value)}: expected {expected}", param=name)
    return value


def _number(name: str, value: object, low: float | None, high: float | None) -> float:
    bound = "" if low is None else f" of at least {low:g}" if high is None else f" from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300 or not math.isfinite(value):
        raise RequestError(f"{name}={_shown(value)}: expected a finite number{bound}", param=name)
    if (low is not None and value < low) or (high is not None and value > high):
        raise RequestError(f"{name}={value:g}: expected a number{bound}", param=name)
    return float(value)


def _shown(value: object) -> str:
    text = (
        f"an integer of {value.bit_length()} bits"
        if isinstance(value, int) and value.bit_length() > 64
        else repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}…"
