"""What HTTP alone must bear: rows over an engine that computes nothing (``trivium.serve.rehearsal``)."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Sequence

from trivium.bench.serve import ServeBench, percentile, summary
from trivium.bench.serve_client import Target, closed_loop, get
from trivium.bench.serve_press import Kept, completion, for_seconds, hammer, idle, once, request, slow_heads
from trivium.bench.serve_process import ServerProcess, rehearsing
from trivium.bench.serve_row import Row

MODEL = "rehearsal"
_KEYS = ("the-key-of-the-flood", "the-key-of-the-other")


def target(server: ServerProcess, max_tokens: int) -> Target:
    """Streams of the rehearsal."""
    return Target(url=server.url, model=MODEL, prompt_words=4, max_tokens=max_tokens)


async def small_answers() -> Row:
    """Whole answers of one token, 16 at once over kept connections."""
    row = Row(name="small answers", about="JSON, 16 at once, an engine that computes nothing")
    with rehearsing() as server:
        raw = request("/v1/completions", completion(MODEL, 1))
        await hammer(server.port, raw, 16, for_seconds(1.0))
        _, before = server.processor_s()
        begun = time.perf_counter()
        found = await hammer(server.port, raw, 16, for_seconds(5.0))
        took = time.perf_counter() - begun
        spent = server.processor_s()[1] - before
    row.at_least("requests per second", len(found.seconds) / took, 1000)
    row.at_most("p99 ms", percentile(found.seconds, 99), 30)
    row.at_most("errors", found.failed, 0)
    row.also["processor_us_per_request"] = round(spent / len(found.seconds) * 1e6, 1)
    return row


async def many_streams() -> Row:
    """128 streams of 50 tokens at 50 tokens per second each, and again."""
    row = Row(name="128 streams", about="50 tokens per second each, an engine that computes nothing")
    with rehearsing(step_s=0.02, slots=128) as server:
        await closed_loop(target(server, 5), 16, 16)
        _, before = server.processor_s()
        begun = time.perf_counter()
        samples = await closed_loop(target(server, 50), 128, 256)
        found = summary("closed", 128, samples, time.perf_counter() - begun, ServeBench())
        spent = server.processor_s()[1] - before
    tokens = sum(sample.tokens for sample in samples)
    row.at_most("gap p99 ms", found["gap_p99_ms"], 60)
    row.at_most("first token p99 ms", found["first_p99_ms"], 150)
    row.at_most("drops", sum(not sample.ok or sample.tokens != 50 for sample in samples), 0)
    row.also["processor_us_per_token"] = round(spent / max(tokens, 1) * 1e6, 1)
    return row


async def slow_clients(count: int = 200) -> Row:
    """Clients that send a head byte by byte beside 16 good ones; the head's deadline is the default, 10 s."""
    row = Row(name="slow heads", about=f"{count} clients at one byte per second beside 16 good ones")
    with rehearsing() as server:
        raw = request("/v1/completions", completion(MODEL, 1))
        await hammer(server.port, raw, 16, for_seconds(1.0))
        baseline = await hammer(server.port, raw, 16, for_seconds(6.0), 0.01)
        slow = asyncio.ensure_future(slow_heads(server.port, count, 30.0))
        found = await hammer(server.port, raw, 16, slow.done, 0.01)
        closed = await slow
    base, busy = percentile(baseline.seconds, 99), percentile(found.seconds, 99)
    row.at_most("good p99, times the baseline", None if not base or not busy else busy / base, 2)
    row.at_most("slowest closed after s", max(closed), 12)
    row.at_least("first closed after s", min(closed), 9.5)
    row.at_most("errors of the good", found.failed + baseline.failed, 0)
    row.also |= {"baseline_p99_ms": base, "good_p99_ms": busy}
    return row


async def full_queue() -> Row:
    """The first request beyond the queue of 64, again and again."""
    row = Row(name="full queue", about="requests beyond 2 places and a queue of 64")
    with rehearsing(step_s=0.05, slots=2) as server:
        held = [Kept(server.port) for _ in range(66)]
        raw = request("/v1/completions", completion(MODEL, 4000))
        holding = [asyncio.ensure_future(kept.ask(raw)) for kept in held]
        while (await get(server.url, "/status"))[1]["waiting"] < 64:
            await asyncio.sleep(0.02)
        kept = Kept(server.port)
        asked = [await kept.ask(raw) for _ in range(200)]
        kept.close()
        for task in holding:
            task.cancel()
        for one in held:
            one.close()
    row.at_most("429 p50 ms", percentile([seconds for _, seconds in asked], 50), 20)
    row.at_most("answers other than 429", sum(status != 429 for status, _ in asked), 0)
    return row


async def one_key_floods() -> Row:
    """One key asks all the time, over 12 connections; another asks now and then, beside it and alone."""
    row = Row(name="one key floods", about="12 clients with one key, 4 admitted at once; one client with another key")
    with rehearsing(step_s=0.005, slots=8, keys=_KEYS, limits={"per_key": 4}) as server:
        flood, other = (
            request("/v1/completions", completion(MODEL, tokens), [f"Authorization: Bearer {key}"])
            for tokens, key in ((40, _KEYS[0]), (10, _KEYS[1]))
        )
        await hammer(server.port, other, 1, for_seconds(0.5))
        alone = await hammer(server.port, other, 1, for_seconds(5.0))
        flooding = asyncio.ensure_future(hammer(server.port, flood, 12, for_seconds(5.5), 0.005))
        await asyncio.sleep(0.3)
        beside = await hammer(server.port, other, 1, flooding.done)
        statuses = (await flooding).statuses
    base, busy = percentile(alone.seconds, 99), percentile(beside.seconds, 99)
    row.at_most("the other's p99, times alone", None if not base or not busy else busy / base, 2)
    row.at_most("the other's errors", alone.failed + beside.failed, 0)
    row.at_most("the flood's answers but 200 and 429", sum(statuses.values()) - statuses[200] - statuses[429], 0)
    row.also |= {"alone_p99_ms": base, "beside_p99_ms": busy, "flood_refused": statuses[429]}
    return row


async def wrong_keys(rounds: int = 600) -> Row:
    """Every way of being wrong in turn over one connection: the times must tell nothing."""
    row = Row(name="wrong keys", about="401s for seven wrong keys, in turn")
    key = _KEYS[0]
    ways: dict[str, Sequence[str]] = {
        "none": (),
        "wrong": (f"Authorization: Bearer {'z' * len(key)}",),
        "all but the last letter": (f"Authorization: Bearer {key[:-1]}z",),
        "shorter": (f"Authorization: Bearer {key[:-1]}",),
        "longer": (f"Authorization: Bearer {key}z",),
        "other scheme": (f"Authorization: Basic {key}",),
        "twice": (f"Authorization: Bearer {key}", f"Authorization: Bearer {key}"),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    statuses: set[int] = set()
    with rehearsing(keys=_KEYS) as server:
        kept = Kept(server.port)
        for turn in range(rounds):
            for name, headers in ways.items():
                status, seconds = await kept.ask(request("/v1/models", None, headers))
                statuses.add(status)
                if turn >= rounds // 10:
                    times[name].append(seconds)
        kept.close()
    medians = {name: statistics.median(one) for name, one in times.items()}
    whole = statistics.median(second for one in times.values() for second in one)
    row.at_most("largest difference of medians, %", 100 * max(abs(m - whole) / whole for m in medians.values()), 5)
    row.at_most("statuses other than 401", len(statuses - {401}), 0)
    row.also["p50_us"] = {name: round(m * 1e6, 1) for name, m in medians.items()}
    return row


async def engine_fails() -> Row:
    """The engine ends, or stands still, while it answers: how soon ``/readyz`` says so."""
    row = Row(name="engine fails", about="it ends without a word, or stands still, under eight streams")
    raw = request("/readyz", None, ["Connection: close"])
    for how, number in (("ended", signal.SIGUSR2), ("stood still", signal.SIGUSR1)):
        with rehearsing(step_s=0.02) as server:
            streams = asyncio.ensure_future(closed_loop(target(server, 4000), 8, 8))
            await asyncio.sleep(0.5)
            os.kill(server.pid, number)
            begun = time.perf_counter()
            status = 200
            while status == 200 and time.perf_counter() - begun < 10:
                status, _ = await once(server.port, raw)
            row.at_most(f"not ready s after it {how}", time.perf_counter() - begun, 2)
            row.at_least(f"status of readyz after it {how}", status, 503)
            if how == "stood still":
                os.kill(server.pid, signal.SIGUSR2)
            samples = await streams
            row.at_most(f"streams that were not told, after it {how}", sum(sample.ok for sample in samples), 0)
    return row


async def left_at_once(rounds: int = 1000) -> Row:
    """Clients that connect and leave, most with half a request, while another's answer is computed."""
    row = Row(name="connect and leave", about=f"{rounds} connections broken during another's answer")
    with rehearsing(step_s=0.02, slots=16) as server:
        raw = request("/v1/completions", completion(MODEL, 100, stream=True))
        other = asyncio.ensure_future(once(server.port, request("/v1/completions", completion(MODEL, 100))))
        for number in range(rounds):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(raw[: (0, 40, len(raw))[number % 3]])
            writer.transport.abort()
        status, _ = await other
        row.at_least("status of the other's answer", status, 200)
        row.at_most("s until nothing is held", await idle(server, 10), 1)
    return row
