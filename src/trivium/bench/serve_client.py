"""A small client that measures: one streamed completion at a time over plain sockets, timed at every token.

Written on asyncio's streams, because a full client library costs more per token than the server it would measure.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from trivium.base.errors import ConfigError

_WORDS = (
    "river",
    "stone",
    "light",
    "paper",
    "seven",
    "garden",
    "winter",
    "music",
    "copper",
    "signal",
    "harbor",
    "cloud",
)
_LINE_BYTES = 1 << 22


@dataclass(kw_only=True)
class Sample:
    """What came of the ``number``-th request; times in seconds since it was sent. ``gaps_s``: between chunks."""

    started_s: float
    status: int = 0
    first_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    tokens: int = 0
    total_s: float = 0.0
    error: str | None = None
    number: int = 0
    text: str = ""

    @property
    def ok(self) -> bool:
        """Whether a whole answer came."""
        return self.status == 200 and self.error is None

    @property
    def per_token_s(self) -> float:
        """Mean time per token after the first."""
        return 0.0 if self.first_s is None else (self.total_s - self.first_s) / max(self.tokens - 1, 1)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A server with OpenAI's completions: ``url`` up to ``/v1``, the model's name, a key, and the work of a request."""

    url: str
    model: str
    key: str | None = None
    prompt_words: int = 64
    max_tokens: int = 64
    ignore_eos: bool = True
    timeout_s: float = 120.0

    def prompt(self, number: int) -> str:
        """The ``number``-th prompt; they differ from their first word on, so that none is found in a cache."""
        draw = random.Random(number)
        return f"{number} " + " ".join(draw.choice(_WORDS) for _ in range(self.prompt_words - 1))

    def body(self, number: int) -> dict[str, Any]:
        """The ``number``-th request."""
        asked: dict[str, Any] = {
            "model": self.model,
            "prompt": self.prompt(number),
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
        return asked | ({"ignore_eos": True} if self.ignore_eos else {})


async def ask(target: Target, number: int) -> Sample:
    """Send one request and time its answer; whatever goes wrong is in the sample."""
    sample = Sample(started_s=time.perf_counter(), number=number)
    try:
        await asyncio.wait_for(_ask(target, target.body(number), sample), target.timeout_s)
    except (OSError, ValueError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
        sample.error = f"{type(error).__name__}: {error}"
    sample.total_s = time.perf_counter() - sample.started_s
    return sample


async def get(url: str, path: str, key: str | None = None) -> tuple[int, Any]:
    """A JSON document of the server: (status, value)."""
    reader, writer, head = await _open(url, "GET", path, key, b"")
    try:
        writer.write(head)
        status, _ = await _read_head(reader)
        raw = await reader.read(_LINE_BYTES)
        return status, json.loads(raw)
    finally:
        writer.close()


async def closed_loop(target: Target, concurrency: int, requests: int, first: int = 0) -> list[Sample]:
    """``requests`` requests, always ``concurrency`` of them under way."""
    numbers = iter(range(first, first + requests))
    samples: list[Sample] = []

    async def worker() -> None:
        for number in numbers:
            samples.append(await ask(target, number))

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    return samples


async def open_loop(
    target: Target,
    rate: float,
    duration_s: float,
    first: int = 0,
    watch: Callable[[], Awaitable[None]] | None = None,
) -> list[Sample]:
    """Requests that arrive on their own, Poisson at ``rate`` per second, whether or not earlier ones are answered."""
    draw = random.Random(first)
    tasks: list[asyncio.Task[Sample]] = []
    begun = time.perf_counter()
    due = begun
    number = first
    watching = None if watch is None else asyncio.ensure_future(watch())
    while (due := due + draw.expovariate(rate)) - begun < duration_s:
        wait_s = due - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(ask(target, number)))
        number += 1
    samples = list(await asyncio.gather(*tasks))
    if watching is not None:
        watching.cancel()
    return samples


async def _open(
    url: str, method: str, path: str, key: str | None, body: bytes
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url {url}: expected http://host:port/v1")
    tls = parts.scheme == "https"
    port = parts.port or (443 if tls else 80)
    reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=tls or None, limit=_LINE_BYTES)
    lines = [f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1", f"Host: {parts.netloc}", "Connection: close"]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    return reader, writer, "\r\n".join([*lines, "", ""]).encode() + body


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, bool]:
    head = await reader.readuntil(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), b"transfer-encoding: chunked" in head.lower()


async def _ask(target: Target, body: dict[str, Any], sample: Sample) -> None:
    reader, writer, raw = await _open(target.url, "POST", "/completions", target.key, json.dumps(body).encode())
    try:
        writer.write(raw)
        sample.status, chunked = await _read_head(reader)
        if sample.status != 200:
            sample.error = f"status {sample.status}"
            return
        await _read_events(reader, chunked, sample)
    finally:
        writer.close()


async def _read_events(reader: asyncio.StreamReader, chunked: bool, sample: Sample) -> None:
    last = sample.started_s
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue  # blank lines, and the sizes of chunks
        data = line[6:].strip()
        if data == b"[DONE]":
            if not sample.tokens:
                sample.tokens = len(sample.gaps_s) + (sample.first_s is not None)
            return
        now = time.perf_counter()
        event = json.loads(data)
        if "error" in event:
            raise ValueError(str(event["error"].get("message"))[:200])
        if event.get("usage"):
            sample.tokens = int(event["usage"]["completion_tokens"])
        if not event["choices"]:
            continue
        sample.text += event["choices"][0].get("text") or ""
        if sample.first_s is None:
            sample.first_s = now - sample.started_s
        else:
            sample.gaps_s.append(now - last)
        last = now
    raise ValueError("the stream ended before [DONE]")
