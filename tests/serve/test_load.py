"""How the server bears load, with the stub engine: rates, gaps, overload and recovery (faults.md section 4).

The clients share the machine with the server. Bounds on time hold for a machine with nothing else to do; where it has
much to do (its load is above its cores), the counts are checked and the times are not.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.serve.process import Spawner
from trivium.bench.serve import ServeBench, percentile, run, summary
from trivium.bench.serve_client import Sample, Target, ask, closed_loop, get, open_loop

pytestmark = pytest.mark.timeout(150)


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    found = Spawner()
    yield found
    found.close()


@contextmanager
def serving(spawner: Spawner, step_s: float, slots: int) -> Iterator[tuple[int, Target]]:
    """(pid, target) of a server in a process of its own."""
    pid, port = spawner.start(step_s, slots)
    try:
        yield pid, Target(url=f"http://127.0.0.1:{port}/v1", model="stub", prompt_words=4, max_tokens=20)
    finally:
        os.kill(pid, 15)
        assert spawner.line() == "stopped"
        assert spawner.line() == "0"


def quiet() -> bool:
    return os.getloadavg()[0] < 1.5 * (os.cpu_count() or 1)


async def hammer(port: int, connections: int, seconds: float) -> list[float]:
    """Closed loop of small whole answers over kept connections; the times of all."""
    body = json.dumps({"model": "stub", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    times: list[float] = []
    end = time.perf_counter() + seconds

    async def worker() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            started = time.perf_counter()
            writer.write(head + body)
            answer = await reader.readuntil(b"\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200")
            size = int(answer.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
            times.append(time.perf_counter() - started)
        writer.close()

    await asyncio.gather(*(worker() for _ in range(connections)))
    return times


def test_small_answers(spawner: Spawner) -> None:
    with serving(spawner, 0.0, 64) as (pid, target):
        port = int(target.url.split(":")[2].split("/")[0])
        asyncio.run(hammer(port, 16, 0.5))
        process = psutil.Process(pid)
        before = sum(process.cpu_times()[:2])
        times = asyncio.run(hammer(port, 16, 3.0))
        spent = sum(process.cpu_times()[:2]) - before
        print(f"{len(times) / 3:.0f} req/s, p99 {percentile(times, 99)} ms, {spent / len(times) * 1e6:.0f} µs CPU each")
        assert spent / len(times) < 1.3e-3
        if quiet():
            assert len(times) / 3 >= 1000
            assert (percentile(times, 99) or 0) <= 30


def test_many_streams(spawner: Spawner) -> None:
    with serving(spawner, 0.02, 128) as (_, target):
        samples = asyncio.run(closed_loop(target, 128, 256))
        row = summary("closed", 128, samples, 1.0, ServeBench())
        print(row)
        assert (row["ok"], row["rejected"], row["failed"]) == (256, 0, 0)
        assert all(sample.tokens == 20 for sample in samples)
        if quiet():
            assert row["gap_p99_ms"] <= 60
            assert row["first_p99_ms"] <= 150


def test_far_too_much(spawner: Spawner) -> None:
    """8 slots at 50 steps a second serve 20 answers of 20 tokens a second; 160 arrive."""
    with serving(spawner, 0.02, 8) as (_, target):
        baseline = asyncio.run(closed_loop(target, 1, 8))
        capacity = 8 / (20 * 0.02)
        held: list[int] = []

        async def watch() -> None:
            while True:
                _, status = await get(target.url, "/status")
                held.append(status["running"] + status["waiting"])
                await asyncio.sleep(0.1)

        samples = asyncio.run(open_loop(target, 8 * capacity, 4.0, watch=watch))
        row = summary(
            "open",
            8 * capacity,
            samples,
            max(s.started_s + s.total_s for s in samples) - samples[0].started_s,
            ServeBench(),
        )
        print(row)
        assert row["failed"] == 0
        assert row["rejected"] > 0
        assert max(held) <= 8 + 64
        after = asyncio.run(closed_loop(target, 1, 8))
        assert all(sample.ok for sample in after)
        if quiet():
            assert row["requests_per_s"] >= 0.8 * capacity
            assert row["reject_p99_ms"] <= 50
            assert statistics.median(s.total_s for s in after) <= 1.5 * statistics.median(s.total_s for s in baseline)


def test_memory_does_not_grow(spawner: Spawner) -> None:
    """Good, bad, left and streamed requests: below 1 MB per 1,000 once warm."""
    with serving(spawner, 0.0, 64) as (pid, target):
        process = psutil.Process(pid)
        statuses: list[int] = []

        async def mixed(count: int, first: int) -> None:
            async def one(number: int) -> None:
                if number % 4 == 0:
                    statuses.append((await ask(target, number)).status)
                    return
                _, port = target.url.rsplit(":", 1)
                reader, writer = await asyncio.open_connection("127.0.0.1", int(port.split("/")[0]))
                body = [b'{"model": "stub", "prompt": "x", "max_tokens": 4}', b'{"model": 3}', b"{"][number % 3]
                writer.write(
                    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                    + f"X-Request-Id: id-{number}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                if number % 5:
                    statuses.append(int((await reader.read()).split(b" ", 2)[1]))
                writer.close()

            for start in range(first, first + count, 50):
                await asyncio.gather(*(one(number) for number in range(start, start + 50)))

        asyncio.run(mixed(1000, 0))
        growth = []
        for round_ in range(1, 13):  # a leak grows in every round; warming up takes up to eight
            before = process.memory_info().rss
            asyncio.run(mixed(1000, round_ * 1000))
            growth.append(process.memory_info().rss - before)
            if growth[-1] < 1 << 20:
                break
        assert set(statuses) <= {200, 400, 404}
        assert growth[-1] < 1 << 20, growth
        _, status = asyncio.run(get(target.url, "/status"))
        assert (status["running"], status["waiting"]) == (0, 0)
        with pytest.raises(ValueError):  # the answer is JSON, the path is not under /v1
            asyncio.run(get("http://127.0.0.1:1x", "/status"))


def test_the_bench_reports_what_it_saw(spawner: Spawner) -> None:
    with serving(spawner, 0.005, 4) as (_, target):
        said: list[str] = []
        bench = ServeBench(concurrency=(1, 4), rates=(20.0,), requests=8, duration_s=1.0)
        report = run(bench, target, "bench", said.append)
        rows: list[dict[str, Any]] = report["loads"]
        assert [(row["load"], row["offered"]) for row in rows] == [("closed", 1), ("closed", 4), ("open", 20.0)]
        assert [row["ok"] for row in rows[:2]] == [8, 8]
        assert rows[1]["tokens_per_s"] > 1.5 * rows[0]["tokens_per_s"]
        assert all(row["gap_p50_ms"] >= 4 for row in rows)
        assert len(said) == 4


def test_percentiles_and_goodput() -> None:
    assert percentile([], 50) is None
    assert percentile([0.5], 99) == 500.0
    assert percentile([i / 100 for i in range(101)], 99) == 990.0
    good = Sample(started_s=0, status=200, first_s=0.5, gaps_s=[0.01], tokens=2, total_s=0.51)
    late = Sample(started_s=0, status=200, first_s=2.0, gaps_s=[0.01], tokens=2, total_s=2.01)
    slow = Sample(started_s=0, status=200, first_s=0.5, gaps_s=[0.5], tokens=2, total_s=1.0)
    full = Sample(started_s=0, status=429, error="status 429", total_s=0.002)
    lost = Sample(started_s=0, status=200, error="cut", total_s=0.1)
    row = summary("open", 5, [good, late, slow, full, lost], 2.0, ServeBench())
    assert (row["ok"], row["rejected"], row["failed"], row["goodput_per_s"]) == (3, 1, 1, 0.5)
    assert (row["reject_p99_ms"], row["tokens_per_s"]) == (2.0, 3.0)
