"""Between the event loop and the engine's thread: who is admitted, whose tokens are whose, and who has gone.

The engine's thread only appends to a list and wakes the loop at most once for all that a step has said.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Any

from trivium.base import log
from trivium.base.errors import TriviumError
from trivium.inference import ContextLengthError, Delta, Request, RequestError
from trivium.serve.errors import ApiError
from trivium.serve.limits import Limits
from trivium.serve.metrics import Metrics
from trivium.serve.served import Engine


class Job:
    """The engine requests of one HTTP request, one per prompt; read with `take` by one task."""

    def __init__(self, bridge: Bridge, requests: Sequence[Request], arrived_s: float) -> None:
        """``arrived_s``: when the HTTP request came, on the monotonic clock."""
        self._bridge = bridge
        self.size = sum(request.params.n for request in requests)
        self.order = {request.request_id: index for index, request in enumerate(requests)}
        self.arrived_s = arrived_s
        self.last_s: dict[tuple[str, int], float] = {}
        self._left = {request.request_id: request.params.n for request in requests}
        self._cached: dict[str, int] = {}
        self.generated = 0
        self._deltas: list[Delta] = []
        self._wake: asyncio.Future[None] | None = None
        self._failure: ApiError | None = None
        self.cancelled = False

    @property
    def unfinished(self) -> list[str]:
        """Engine requests that still have choices to end."""
        return list(self._left)

    async def take(self) -> list[Delta]:
        """What has come since the last time; empty once every choice has ended or the job was cancelled.

        Raises:
            ApiError: the engine failed.
        """
        while not self._deltas:
            if self._failure is not None:
                raise self._failure
            if not self._left or self.cancelled:
                return []
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        batch, self._deltas = self._deltas, []
        return batch

    async def unstreamed(self) -> AsyncIterator[Delta]:
        """The deltas of an answer that is told whole: where a choice fails nobody is told of those that had ended, and
        they count as errors too.

        Raises:
            ApiError: the engine failed.
        """
        ended = 0
        try:
            while batch := await self.take():
                for delta in batch:
                    ended += delta.finish_reason is not None
                    yield delta
        except ApiError:
            self._bridge.metrics.finished.labels("error").inc(ended)
            raise

    def usage(self, prompt_tokens: int) -> dict[str, Any]:
        """Tokens so far, as OpenAI counts them; a prompt counts once for all its choices."""
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.generated,
            "total_tokens": prompt_tokens + self.generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }

    @property
    def cached(self) -> int:
        """Prompt tokens that were found in the cache."""
        return sum(self._cached.values())

    def told(self, finish_reason: str | None) -> None:
        """Count how a choice ended, as the client is told; None: it has not."""
        if finish_reason is not None:
            self._bridge.metrics.finished.labels(finish_reason).inc()

    def push(self, delta: Delta) -> None:
        """Take a delta; on the loop."""
        self._deltas.append(delta)
        self.generated += len(delta.token_ids)
        if delta.cached_tokens:
            self._cached[delta.request_id] = delta.cached_tokens
        if delta.finish_reason is not None:
            self._left[delta.request_id] -= 1
            if not self._left[delta.request_id]:
                del self._left[delta.request_id]
        self._awake()

    def fail(self, error: ApiError) -> None:
        """End every choice that is left with an error, and count it as such."""
        self._failure = error
        self._bridge.metrics.finished.labels("error").inc(sum(self._left.values()))
        self._awake()

    def cancel(self) -> None:
        """The client has gone, or has enough: free what the engine holds for it. Calling again does nothing."""
        if not self.cancelled and self._left and self._failure is None:  # a failed one has been let go already
            self.cancelled = True
            self._bridge.drop(self)
            self._awake()

    def _awake(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Bridge:
    """Admits jobs up to the engine's places and the queue behind them, and hands out what the engine says."""

    def __init__(
        self, engine: Engine, *, slots: int, limits: Limits, metrics: Metrics, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.engine = engine
        self.draining = False
        self.failed: ApiError | None = None
        self.last_token_s = float("-inf")
        self.tokens_total = 0
        self._slots = slots
        self._limits = limits
        self.metrics = metrics
        self._loop = loop
        self._jobs: dict[str, Job] = {}
        self._admitted = 0
        self._inbox: deque[Delta] = deque()
        self._told = False

    @property
    def active(self) -> int:
        """Choices that are admitted and not finished."""
        return self._admitted

    @property
    def jobs(self) -> set[Job]:
        """Jobs that are not finished."""
        return set(self._jobs.values())

    def refuse_if_full(self, size: int = 1) -> None:
        """Raises ApiError where a job of ``size`` choices would not be admitted: 429 when full, 503 when stopping.

        One that can never be admitted is a 400.
        """
        if self.failed is not None:
            raise self.failed
        self.refuse_if_stopping()
        most = self._slots + self._limits.queue
        if size > most:
            message = f"{size} answers are asked for at once; at most {most} are ever admitted: send fewer"
            raise ApiError(400, "too_many_answers", message)
        if self._admitted + size > most:
            message = f"{self._admitted} answers are under way or waiting; at most {most} are admitted"
            raise ApiError(429, "queue_full", message, headers={"Retry-After": "1"})

    def refuse_if_stopping(self) -> None:
        """Raises ApiError 503 once the server is stopping."""
        if self.draining:
            raise ApiError(503, "shutting_down", "the server is stopping", headers={"Retry-After": "5"}, close=True)

    def start(self, requests: Sequence[Request], *, arrived_s: float) -> Job:
        """Admit and submit what came at ``arrived_s``.

        Raises ApiError as `refuse_if_full` does, and 400 where the engine refuses a request.
        """
        job = Job(self, requests, arrived_s)
        self.refuse_if_full(job.size)
        self._admitted += job.size
        for request in requests:
            self._jobs[request.request_id] = job
        try:
            for request in requests:
                self.engine.submit(request, self._deliver)
        except RequestError as error:
            job.cancel()
            raise refusal(error) from None
        except TriviumError as error:
            job.cancel()
            raise ApiError(503, "engine_stopped", str(error)) from None
        return job

    def drop(self, job: Job) -> None:
        """Forget a job and let the engine end what is left of it."""
        for request_id in job.unfinished:
            self._jobs.pop(request_id, None)
            with suppress(TriviumError):  # an engine that has ended holds nothing any more
                self.engine.cancel(request_id)
        self._release(job)

    def abort_all(self) -> None:
        """End every job: each choice is told ``abort``."""
        for job in self.jobs:
            for request_id in job.unfinished:
                self.engine.cancel(request_id)

    def fail_all(self, error: ApiError) -> None:
        """The engine is gone: every job ends with ``error``, and so does every later one."""
        self.failed = error
        for job in self.jobs:
            for request_id in job.unfinished:
                self._jobs.pop(request_id, None)
            self._release(job)
            job.fail(error)

    async def probe(self, timeout_s: float, make: Callable[[str], Request]) -> bool:
        """Whether a request for one token is answered in time; it passes the queue like any other."""
        request = make(f"probe-{time.monotonic_ns()}")
        done = asyncio.Event()

        def told(delta: Delta) -> None:
            if delta.finish_reason in ("stop", "length"):
                self._loop.call_soon_threadsafe(done.set)

        try:
            self.engine.submit(request, told)
            await asyncio.wait_for(done.wait(), timeout_s)
        except (TimeoutError, asyncio.TimeoutError, TriviumError):
            with suppress(TriviumError):
                self.engine.cancel(request.request_id)
            return False
        self.last_token_s = time.monotonic()
        return True

    def _release(self, job: Job) -> None:
        self._admitted -= job.size

    def _deliver(self, delta: Delta) -> None:
        """On the engine's thread."""
        self._inbox.append(delta)
        if not self._told:
            self._told = True
            with suppress(RuntimeError):  # the loop has been closed: nobody is left to tell
                self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._told = False  # before reading: what is appended from here on wakes the loop again
        now = time.monotonic()
        while self._inbox:
            delta = self._inbox.popleft()
            job = self._jobs.get(delta.request_id)
            if delta.token_ids:
                self.last_token_s = now
                self.tokens_total += len(delta.token_ids)
            if job is None:
                continue
            self._observe(job, delta, now)
            if delta.finish_reason == "error":
                log.get().error("request %s failed: %s", delta.request_id, delta.error)
                self.drop(job)
                job.fail(ApiError(500, "generation_failed", "the answer could not be computed"))
                continue
            job.push(delta)
            if delta.finish_reason is not None and delta.request_id not in job.unfinished:
                del self._jobs[delta.request_id]
                if not job.unfinished:
                    self._release(job)

    def _observe(self, job: Job, delta: Delta, now: float) -> None:
        metrics = self.metrics
        place = (delta.request_id, delta.choice)
        count = len(delta.token_ids)
        if count:
            metrics.tokens.generated += count
            before = job.last_s.get(place)
            if before is None:
                metrics.first_token.observe(now - job.arrived_s)
            else:
                metrics.tokens.gap((now - before) / count)
            job.last_s[place] = now
        if delta.finish_reason is not None:
            metrics.whole.observe(now - job.arrived_s)


def refusal(error: RequestError) -> ApiError:
    """What the engine refuses, as the client is told."""
    if isinstance(error, ContextLengthError):
        return ApiError(400, "context_length_exceeded", str(error), param="prompt")
    return ApiError(400, "invalid_value", str(error), param=error.param)
