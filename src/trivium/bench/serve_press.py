"""Clients that press on a server: small requests over kept connections, heads that never end, streams that are left.

Raw bytes on asyncio's streams: two hundred of these must not cost more than the server they are sent to.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trivium.bench.serve_client import get
from trivium.bench.serve_process import ServerProcess

_ENDED = (OSError, asyncio.IncompleteReadError)


def request(path: str, body: Mapping[str, Any] | bytes | None, headers: Sequence[str] = ()) -> bytes:
    """A whole request as it goes over the wire; without a body a GET."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: localhost", *headers]
    lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"] if data else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def completion(model: str, max_tokens: int, **more: Any) -> dict[str, Any]:
    """A small request for text."""
    return {"model": model, "prompt": "hi", "max_tokens": max_tokens, "temperature": 0} | more


@dataclass(kw_only=True)
class Answers:
    """What came back: seconds per answer, and how many of each status (0: the connection broke)."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def failed(self) -> int:
        """Answers that are no 200."""
        return sum(self.statuses.values()) - self.statuses[200]


class Kept:
    """A connection that is used again and again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, raw: bytes) -> tuple[int, float]:
        """Send ``raw``, read the whole answer: (status, seconds); status 0 where the connection broke."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        begun = time.perf_counter()
        try:
            writer.write(raw)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
        except _ENDED:
            self.close()
            return 0, time.perf_counter() - begun
        seconds = time.perf_counter() - begun
        if b"connection: close" in head:
            self.close()
        return int(head.split(b" ", 2)[1]), seconds

    def close(self) -> None:
        """Let the connection go; the next request opens another."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def once(port: int, raw: bytes) -> tuple[int, float]:
    """`Kept.ask` on a connection of its own."""
    kept = Kept(port)
    try:
        return await kept.ask(raw)
    finally:
        kept.close()


async def hammer(port: int, raw: bytes, connections: int, until: Callable[[], bool], pause_s: float = 0.0) -> Answers:
    """``connections`` clients that each ask again as soon as they (and ``pause_s``) are through."""
    found = Answers()

    async def client() -> None:
        kept = Kept(port)
        while not until():
            status, seconds = await kept.ask(raw)
            found.statuses[status] += 1
            found.seconds.append(seconds)
            if pause_s:
                await asyncio.sleep(pause_s)
        kept.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return found


def for_seconds(seconds: float) -> Callable[[], bool]:
    """True once so many seconds have passed."""
    end = time.perf_counter() + seconds
    return lambda: time.perf_counter() >= end


async def slow_heads(port: int, count: int, limit_s: float) -> list[float]:
    """``count`` clients that send one byte of a head per second: after how many seconds the server closed each.

    One that is still open after ``limit_s`` counts as that.
    """

    async def client() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        begun = time.perf_counter()
        closed = asyncio.ensure_future(reader.read())
        try:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\nX: ")
            while not closed.done() and time.perf_counter() - begun < limit_s:
                writer.write(b"a")
                await asyncio.wait([closed], timeout=1.0)
        finally:
            closed.cancel()
            writer.close()
        return time.perf_counter() - begun

    return list(await asyncio.gather(*(client() for _ in range(count))))


async def leave(server: ServerProcess, raw: bytes, after_s: float) -> None:
    """Ask for a stream and break the connection after so many seconds, wherever the answer is by then."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(raw)
    if after_s > 0:
        reading = asyncio.ensure_future(reader.read())
        await asyncio.wait([reading], timeout=after_s)
        reading.cancel()
    writer.transport.abort()


async def idle(server: ServerProcess, limit_s: float, free: float | None = None, key: str | None = None) -> float:
    """Seconds until the server holds nothing: none running, none waiting, ``free`` blocks free (None: not asked)."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < limit_s:
        _, status = await get(server.url, "/status", key)
        blocks = free is None or await gauge(server, "trivium_kv_cache_blocks_free") == free
        if status["running"] == status["waiting"] == 0 and blocks:
            return time.perf_counter() - begun
        await asyncio.sleep(0.005)
    return limit_s


async def gauge(server: ServerProcess, name: str) -> float:
    """A number of ``/metrics``."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request("/metrics", None, ["Connection: close"]))
    text = (await reader.read()).decode()
    writer.close()
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


async def mixed(server: ServerProcess, model: str, number: int) -> int:
    """One of the requests of a day: good, bad, streamed, left. Its status; 0 for one that was left."""
    draw = random.Random(number)
    kind = draw.randrange(10)
    good = completion(model, draw.randint(1, 8), ignore_eos=True)
    bodies: list[Any] = [
        good, good | {"stream": True}, good | {"n": 2}, good | {"prompt": [1, 2, 3], "logprobs": 2, "echo": True},
        good | {"regex": "[ab]{2,6}", "ignore_eos": False, "seed": number, "temperature": 1}, {"model": 3}, b"{",
        good | {"prompt": "x" * 100_000}, good | {"temprature": 1}, good | {"stream": True, "max_tokens": 100},
    ]  # fmt: skip
    raw = request("/v1/completions", bodies[kind], ["Connection: close", f"X-Request-Id: n-{number}"])
    if kind == 9:
        await leave(server, raw, draw.random() * 0.02)
        return 0
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(raw)
        answer = await reader.read()
        return int(answer.split(b" ", 2)[1]) if answer else 0
    finally:
        writer.close()


async def watched(look: Callable[[], Awaitable[None]], every_s: float) -> None:
    """Call ``look`` again and again until cancelled."""
    while True:
        await look()
        await asyncio.sleep(every_s)


def slope(pairs: Sequence[tuple[float, float]]) -> float:
    """How steeply the second number rises with the first, over all pairs."""
    across, up = zip(*pairs, strict=True)
    return statistics.linear_regression(across, up).slope
