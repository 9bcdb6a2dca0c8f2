"""Grammars that an answer must follow, tried out in a process, compiled, and handed to the engine as a constraint.

Fails closed: a grammar that cannot be compiled in time is a 400, one that fails while it is used ends its request.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import llguidance
import numpy
import torch

from trivium.base import log
from trivium.base.errors import ConfigError
from trivium.serve.compilation import Kind, compiled, told
from trivium.serve.compilation import vocabulary as llguidance_vocabulary
from trivium.serve.errors import ApiError, invalid
from trivium.serve.grammar_worker import ChildKilled, TooLate, Worker, WorkerEnded, WorkerFailed

_WORKERS = 2
_QUEUE = 64
_WAIT_S = 2.0  # how long a grammar may wait for a worker; its own time begins afterwards
_SLOWNESS = 50  # how much longer than its processor time a compilation may take on a machine that is busy
_LONGEST_S = 30.0  # and the most that this comes to, unless twice the processor time is more
_KNOWN = 1024


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

    def __init__(
        self, matcher: llguidance.LLMatcher, vocabulary: int, param: str, failures: list[str] | None = None
    ) -> None:
        """``vocabulary``: the width of the logits, which may be padded beyond the tokenizer's; ``param``: the field."""
        self._matcher = matcher
        self.param = param
        self._vocabulary = vocabulary
        self.failures: list[str] = [] if failures is None else failures

    def allowed(self) -> torch.Tensor:
        """True where a token may come next, the end tokens where the text may end."""
        bits = numpy.frombuffer(self._matcher.compute_bitmask(), dtype=numpy.uint8)
        if self._matcher.is_error():
            self.failures.append(told(self._matcher.get_error()))
            return torch.zeros(self._vocabulary, dtype=torch.bool)
        mask = numpy.unpackbits(bits, count=min(self._vocabulary, 8 * bits.size), bitorder="little").view(numpy.bool_)
        if mask.size < self._vocabulary:
            mask = numpy.concatenate([mask, numpy.zeros(self._vocabulary - mask.size, dtype=numpy.bool_)])
        return torch.from_numpy(mask)

    def accept(self, token_id: int) -> None:
        """Step over ``token_id``; one that is not allowed leaves a matcher that allows nothing."""
        if not self._matcher.consume_token(token_id):
            self.failures.append(f"token {token_id}: {told(self._matcher.get_error())}")

    def finished(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def fork(self) -> GrammarConstraint:
        """An independent copy in the same state."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self.param, self.failures)


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

        ``width`` is that of the logits; compiling takes at most ``limit_s`` of a processor. Raises ConfigError where
        the vocabulary cannot be used.
        """
        names = {number: text.encode() for text, number in control.items()}
        pieces = [names.get(number, piece) for number, piece in enumerate(vocabulary)]
        try:
            self._tokens = llguidance_vocabulary(pieces, sorted(names), end_ids)
        except (ValueError, RuntimeError, TypeError) as error:
            raise ConfigError(f"no grammars over this tokenizer: {error}") from error
        self._width = width
        self._limit_s = limit_s
        self._workers = [
            Worker(pieces, sorted(names), end_ids, limit_s, deadline_s=self._patience_s(), report=log.get().error)
            for _ in range(_WORKERS)
        ]
        self._free = list(self._workers)  # never empty on a thread that tries
        self._trying = _Lane(_WORKERS, "grammar")
        self._building = _Lane(1, "known-grammar")  # so that what others try delays nothing that is known
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of what has compiled in time

    async def compile(self, grammar: Grammar) -> GrammarConstraint:
        """The constraint of ``grammar``.

        Raises:
            ApiError: 400 where it is wrong or takes too long; 429 where no worker is free soon, or the system ended
                what tried it; 503 where no worker can be started.
        """
        known = _digest(grammar) in self._known
        lane = self._building if known else self._trying
        if lane.busy >= _QUEUE:
            raise _all_busy()
        lane.busy += 1
        loop = asyncio.get_running_loop()
        begun: asyncio.Future[None] = loop.create_future()

        def work() -> GrammarConstraint:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                loop.call_soon_threadsafe(_tell, begun)
            return self._built(grammar) if known else self._compile(grammar)

        def ended(done: Future[GrammarConstraint]) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(lane.ended)

        running = lane.pool.submit(work)
        running.add_done_callback(ended)  # when the worker is free, or never took it
        result = asyncio.wrap_future(running)
        result.add_done_callback(_see)
        try:
            await asyncio.wait_for(begun, _WAIT_S)
        except (TimeoutError, asyncio.TimeoutError):
            running.cancel()
            raise _all_busy() from None
        except asyncio.CancelledError:  # the client left before a worker came
            running.cancel()
            raise
        try:
            return await asyncio.wait_for(asyncio.shield(result), self._patience_s())
        except (TimeoutError, asyncio.TimeoutError):  # the machine is too busy to give a worker its time
            raise _all_busy() from None

    def close(self) -> None:
        """Let the workers go; what they compile is left behind."""
        for lane in (self._trying, self._building):
            lane.pool.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _patience_s(self) -> float:
        """How long, by the clock, a grammar may take once a thread has it."""
        return min(_WAIT_S + _SLOWNESS * self._limit_s, max(_LONGEST_S, 2 * self._limit_s))

    def _compile(self, grammar: Grammar) -> GrammarConstraint:
        """On one of the threads that try."""
        digest = _digest(grammar)
        try:
            if digest not in self._known:  # the one before it may have been the same
                worker = self._free.pop()
                try:
                    worker.check(grammar.kind, grammar.source)
                finally:
                    self._free.append(worker)
                self._remember(digest)
        except TooLate:
            message = f"{grammar.param} takes more than {round(1000 * self._limit_s)} ms of a processor to compile"
            raise invalid(grammar.param, message, "invalid_grammar") from None
        except WorkerEnded:
            raise _all_busy() from None
        except ChildKilled:
            message = "the system ended the process that compiled the grammar; it may have had no memory left"
            raise ApiError(
                429, "grammar_worker_killed", message, param=grammar.param, headers={"Retry-After": "1"}
            ) from None
        except WorkerFailed:
            message = "no process can be started to compile the grammar; the server's log says why"
            raise ApiError(503, "grammar_worker_failed", message, headers={"Retry-After": "1"}) from None
        except ValueError as error:
            raise _unusable(grammar, error) from None
        return self._built(grammar)

    def _built(self, grammar: Grammar) -> GrammarConstraint:
        """Here, without a worker."""
        try:
            matcher = compiled(self._tokens, grammar.kind, grammar.source)
        except ValueError as error:
            raise _unusable(grammar, error) from None
        return GrammarConstraint(matcher, self._width, grammar.param)

    def _remember(self, digest: bytes) -> None:
        self._known[digest] = None
        while len(self._known) > _KNOWN:
            with suppress(KeyError):  # the other thread was faster
                self._known.popitem(last=False)


class _Lane:
    """Threads, and how many grammars they have or are to have; ``busy`` is counted on the event loop."""

    def __init__(self, threads: int, name: str) -> None:
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.busy = 0

    def ended(self) -> None:
        self.busy -= 1


def _digest(grammar: Grammar) -> bytes:
    return hashlib.sha256(f"{grammar.kind} {grammar.source}".encode()).digest()


def _unusable(grammar: Grammar, error: ValueError) -> ApiError:
    return invalid(grammar.param, f"{grammar.param} cannot be used: {error}", "invalid_grammar")


def _see(result: asyncio.Future[GrammarConstraint]) -> None:
    """Where nobody waits any more, what went wrong is no news to the loop."""
    if not result.cancelled():
        result.exception()


def _tell(begun: asyncio.Future[None]) -> None:
    if not begun.done():
        begun.set_result(None)


def _all_busy() -> ApiError:
    return ApiError(429, "grammar_workers_busy", "all grammar workers are busy", headers={"Retry-After": "1"})
