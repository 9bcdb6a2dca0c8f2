"""Grammars that an answer must follow, compiled by llguidance in a worker and handed to the engine as a constraint.

Fails closed: a grammar that cannot be compiled in time is a 400, one that fails while it is used ends its request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import llguidance
import numpy
import torch

from trivium.base.errors import ConfigError
from trivium.serve.errors import ApiError, invalid

Kind = Literal["json_schema", "regex", "lark"]
_WORKERS = 2
_QUEUE = 64
_WAIT_S = 2.0  # how long a grammar may wait for a worker; its own time begins afterwards


@dataclass(frozen=True, kw_only=True)
class Grammar:
    """What an answer must match. ``param`` is the field that asked for it."""

    kind: Kind
    source: str
    param: str


class GrammarConstraint:
    """A `trivium.inference.Constraint` over one llguidance matcher; bool masks [V] on the CPU.

    It never raises, for it is called on the engine's thread: when it fails it allows nothing, which ends its request,
    and says why in ``failures``, which its forks share.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary: int, failures: list[str] | None = None) -> None:
        """``vocabulary`` is the width of the logits, which may be padded beyond the tokenizer's."""
        self._matcher = matcher
        self._vocabulary = vocabulary
        self.failures: list[str] = [] if failures is None else failures

    def allowed(self) -> torch.Tensor:
        """True where a token may come next, the end tokens where the text may end."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        if self._matcher.is_error():
            self.failures.append(self._matcher.get_error()[:300])
            return torch.zeros(self._vocabulary, dtype=torch.bool)
        mask = numpy.unpackbits(bits, count=min(self._vocabulary, 8 * bits.size), bitorder="little").view(numpy.bool_)
        if mask.size < self._vocabulary:
            mask = numpy.concatenate([mask, numpy.zeros(self._vocabulary - mask.size, dtype=numpy.bool_)])
        return torch.from_numpy(mask)

    def accept(self, token_id: int) -> None:
        """Step over ``token_id``; one that is not allowed leaves a matcher that allows nothing."""
        if not self._matcher.consume_token(token_id):
            self.failures.append(f"token {token_id}: {self._matcher.get_error()[:300]}")

    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> GrammarConstraint:
        """An independent copy in the same state."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self.failures)


class _Tokens:
    """A vocabulary as llguidance asks for it; grammars match bytes, so text need not be read as the model would."""

    def __init__(self, vocabulary: Sequence[bytes], control: Mapping[str, int], end_ids: Sequence[int]) -> None:
        names = {number: text.encode() for text, number in control.items()}
        self.eos_token_id = end_ids[0]
        self.bos_token_id: int | None = None
        self.special_token_ids = sorted(names)
        self.tokens = [names.get(number, piece) for number, piece in enumerate(vocabulary)]
        self._single = {piece: number for number, piece in enumerate(self.tokens) if len(piece) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        return [self._single[bytes([byte])] for byte in raw if bytes([byte]) in self._single]


class Grammars:
    """Compiles grammars for one tokenizer. Building it reads the whole vocabulary: do so once, off the event loop."""

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        *,
        control: Mapping[str, int],
        end_ids: Sequence[int],
        width: int,
        limit_s: float,
    ) -> None:
        """``vocabulary``: every token's bytes, by id; ``control``: the texts of control tokens and their ids.

        ``width`` is that of the logits; compiling takes at most ``limit_s``, not counting the wait for a worker. Raises
        ConfigError where the vocabulary cannot be used.
        """
        tokens = _Tokens(vocabulary, control, end_ids)
        try:
            self._tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), eos_token=list(end_ids))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"no grammars over this tokenizer: {error}") from error
        self._width = width
        self._limit_s = limit_s
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="grammar")
        self._busy = 0

    async def compile(self, grammar: Grammar) -> GrammarConstraint:
        """The constraint of ``grammar``.

        Raises:
            ApiError: 400 where it is wrong or takes too long; 429 where no worker is free soon.
        """
        if self._busy >= _QUEUE:
            raise _all_busy()
        self._busy += 1
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()

        def work() -> GrammarConstraint:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_tell, begun)
            return self._compile(grammar)

        future = loop.run_in_executor(self._pool, work)
        future.add_done_callback(self._done)
        try:
            await asyncio.wait_for(begun, _WAIT_S)
        except (TimeoutError, asyncio.TimeoutError):
            future.cancel()
            raise _all_busy() from None
        try:
            return await asyncio.wait_for(asyncio.shield(future), self._limit_s)
        except (TimeoutError, asyncio.TimeoutError):
            limit_ms = round(1000 * self._limit_s)
            raise invalid(
                grammar.param, f"{grammar.param} did not compile within {limit_ms} ms", "invalid_grammar"
            ) from None

    def close(self) -> None:
        """Let the workers go; one that still compiles is left behind."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _done(self, future: asyncio.Future[GrammarConstraint]) -> None:
        self._busy -= 1
        if not future.cancelled():
            future.exception()  # seen here also when nobody waits any more

    def _compile(self, grammar: Grammar) -> GrammarConstraint:
        matcher = llguidance.LLMatcher(self._tokenizer, _lark(grammar), log_level=0)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())[:300]
            raise invalid(grammar.param, f"{grammar.param} cannot be used: {why}", "invalid_grammar")
        matcher.compute_bitmask()
        if matcher.is_error():
            raise invalid(
                grammar.param, f"{grammar.param} is too complex: {matcher.get_error()[:200]}", "invalid_grammar"
            )
        return GrammarConstraint(matcher, self._width)


def _tell(begun: asyncio.Future[None]) -> None:
    if not begun.done():
        begun.set_result(None)


def _all_busy() -> ApiError:
    return ApiError(429, "grammar_workers_busy", "all grammar workers are busy", headers={"Retry-After": "1"})


def json_options() -> dict[str, Any]:
    """How JSON may be laid out. Free white space would let a model write blanks for ever; this much lets it indent."""
    return {"whitespace_pattern": r"[ \n]{0,16}"}


def with_layout(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with our layout of JSON, whatever it asked for."""
    return {**schema, "x-guidance": json_options()}


def _lark(grammar: Grammar) -> str:
    try:
        if grammar.kind == "json_schema":
            schema = json.dumps(with_layout(json.loads(grammar.source)))
            return llguidance.LLMatcher.grammar_from_json_schema(schema)
        if grammar.kind == "regex":
            return llguidance.LLMatcher.grammar_from_regex(grammar.source)
        return llguidance.LLMatcher.grammar_from_lark(grammar.source)
    except ValueError as error:
        raise invalid(grammar.param, f"{grammar.param} cannot be used: {str(error)[:300]}", "invalid_grammar") from None
