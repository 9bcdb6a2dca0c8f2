"""How the server bears load, with the stub engine: nothing lost, nothing kept, whatever comes (faults.md section 4).

Counts only: bounds on time hold for a machine with nothing else to do, and are rows of ``trivium bench serve
--promises``.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.serve.process import Spawner
from trivium.bench.serve import ServeBench, percentile, run, summary
from trivium.bench.serve_client import Sample, Target, closed_loop, get, open_loop
from trivium.bench.serve_press import completion, for_seconds, hammer, idle, mixed, request
from trivium.bench.serve_process import ServerProcess

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


def test_small_answers(spawner: Spawner) -> None:
    with serving(spawner, 0.0, 64) as (pid, target):
        raw = request("/v1/completions", completion("stub", 1))
        port = ServerProcess(pid=pid, url=target.url, start_s=0).port
        asyncio.run(hammer(port, raw, 16, for_seconds(0.3)))
        process = psutil.Process(pid)
        before = sum(process.cpu_times()[:2])
        found = asyncio.run(hammer(port, raw, 16, for_seconds(2.0)))
        spent = sum(process.cpu_times()[:2]) - before
        assert set(found.statuses) == {200}
        assert len(found.seconds) >= 16
        assert spent / len(found.seconds) < 1.3e-3


def test_many_streams(spawner: Spawner) -> None:
    with serving(spawner, 0.02, 128) as (_, target):
        samples = asyncio.run(closed_loop(target, 128, 256))
        row = summary("closed", 128, samples, 1.0, ServeBench())
        assert (row["ok"], row["rejected"], row["failed"]) == (256, 0, 0)
        assert all(sample.tokens == 20 for sample in samples)


def test_far_too_much(spawner: Spawner) -> None:
    """8 slots at 50 steps a second serve 20 answers of 20 tokens a second; 160 arrive."""
    with serving(spawner, 0.02, 8) as (_, target):
        held: list[int] = []

        async def watch() -> None:
            while True:
                _, status = await get(target.url, "/status")
                held.append(status["running"] + status["waiting"])
                await asyncio.sleep(0.1)

        samples = asyncio.run(open_loop(target, 160, 3.0, watch=watch))
        assert {sample.status for sample in samples} == {200, 429}
        assert all(sample.ok and sample.tokens == 20 for sample in samples if sample.status == 200)
        assert 8 < max(held) <= 8 + 64
        after = asyncio.run(closed_loop(target, 1, 8))
        assert all(sample.ok for sample in after)


def test_memory_does_not_grow(spawner: Spawner) -> None:
    """Good, bad, left and streamed requests: below 1 MB per 1,000 once warm.

    Warm: a thousand of the same have gone through every path, and have shown how many circles stand between two
    collections of garbage.
    """
    with serving(spawner, 0.0, 64) as (pid, target):
        process = psutil.Process(pid)
        server = ServerProcess(pid=pid, url=target.url, start_s=0)
        statuses: list[int] = []

        async def some(count: int, first: int) -> None:
            for start in range(first, first + count, 50):
                statuses.extend(
                    await asyncio.gather(*(mixed(server, "stub", number) for number in range(start, start + 50)))
                )

        asyncio.run(some(1000, 0))
        growth = []
        for round_ in range(1, 5):
            before = process.memory_info().rss
            asyncio.run(some(1000, round_ * 1000))
            growth.append(process.memory_info().rss - before)
            if growth[-1] < 1 << 20:
                break
        assert set(statuses) <= {0, 200, 400, 429}  # 429: the workers for grammars were all busy
        assert growth[-1] < 1 << 20, growth
        assert asyncio.run(idle(server, 30)) < 30
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
        assert all(row["tokens_per_s"] > 0 and row["gap_p50_ms"] >= 0 for row in rows)
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
    row = summary("open", 5, [good, late, slow, full, lost], 2.0, ServeBench(first_ms=1000, gap_ms=100))
    assert (row["ok"], row["rejected"], row["failed"], row["goodput_per_s"]) == (3, 1, 1, 0.5)
    assert (row["reject_p99_ms"], row["tokens_per_s"]) == (2.0, 3.0)
