"""What serving a model must bear: rows over ``trivium serve`` with a small real one."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from trivium.bench.serve import ServeBench, percentile, summary
from trivium.bench.serve_client import Sample, Target, ask, closed_loop, get, open_loop
from trivium.bench.serve_press import completion, gauge, idle, leave, mixed, request, slope, watched
from trivium.bench.serve_process import ServerProcess
from trivium.bench.serve_row import Row
from trivium.inference import LLM, SamplingParams

LOADS = ((1, 24), (16, 128), (64, 256))  # requests under way, and how many in all
_PLACES = 64  # what `trivium serve` computes at once; who is admitted beyond waits
_WARM = 10_000_000  # prompts that no measured load uses


def offline(llm: LLM, work: Target) -> dict[int, str]:
    """The text of every prompt of `LOADS`, without a server."""
    settings = SamplingParams(max_tokens=work.max_tokens, temperature=0, ignore_eos=True)
    numbers = range(sum(count for _, count in LOADS))
    outs = llm.generate([work.prompt(number) for number in numbers], settings)
    return {number: out.text for number, out in zip(numbers, outs, strict=True)}


async def cold_start(server: ServerProcess, work: Target) -> Row:
    """From the process's start to its first token; to be called first."""
    row = Row(name="cold start", about="from starting the process to the first token")
    sample = await ask(work, _WARM)
    first = None if sample.first_s is None else server.start_s + sample.first_s
    row.at_most("first token after s", first, 6)
    row.also["processor_s"] = round(server.processor_s()[1], 2)
    return row


async def concurrency(
    server: ServerProcess, work: Target, texts: dict[int, str], bench: ServeBench
) -> tuple[Row, list[dict[str, Any]]]:
    """1, 16 and 64 requests under way; also as loads, whose goodput is by ``bench``'s times."""
    row = Row(name="1, 16, 64 under way", about="greedy answers of a small model")
    await closed_loop(work, 16, 32, first=_WARM + 1)
    loads: list[dict[str, Any]] = []
    wrong = first = 0
    for under_way, count in LOADS:
        http, whole = server.processor_s()
        begun = time.perf_counter()
        samples = await closed_loop(work, under_way, count, first=first)
        took = time.perf_counter() - begun
        http, whole = (after - before for after, before in zip(server.processor_s(), (http, whole), strict=True))
        first += count
        wrong += sum(not sample.ok or sample.text != texts[sample.number] for sample in samples)
        load = summary("closed", under_way, samples, took, bench)
        tokens = sum(sample.tokens for sample in samples)
        load["http_us_per_token"] = round(http / max(tokens, 1) * 1e6, 1)
        load["http_share"] = round(http / max(whole - http, 1e-9), 4)
        loads.append(load)
    rates = [load["tokens_per_s"] for load in loads]
    row.at_least("tokens per second, 16 against 1", rates[1] / max(rates[0], 1e-9), 0.95)
    row.at_least("tokens per second, 64 against 16", rates[2] / max(rates[1], 1e-9), 0.95)
    row.at_most("HTTP's processor time at 64, of the engine's", loads[2]["http_share"], 0.10)
    row.at_most("texts that differ from generate's", wrong, 0)
    row.also["http_us_per_token"] = loads[2]["http_us_per_token"]
    return row, loads


async def overload(
    server: ServerProcess, work: Target, seconds: float, bench: ServeBench, peak_requests: int = 192
) -> tuple[Row, dict[str, Any]]:
    """Four times as many arrivals as can be answered; also as a load, and second by second.

    ``peak_requests``, 64 of them under way, show how many can be. Goodput is by ``bench``'s times, the peak's as well;
    all whole answers, however late, are told beside it.
    """
    row = Row(name="4× overload", about=f"{seconds:g} s of random arrivals at four times the highest rate of answers")
    baseline = await closed_loop(work, 1, 8, first=_WARM + 100)
    begun = time.perf_counter()
    full = await closed_loop(work, 64, peak_requests, first=_WARM + 200)
    best = summary("closed", 64, full, time.perf_counter() - begun, bench)
    peak = float(best["requests_per_s"])
    held: list[int] = []

    async def look() -> None:
        _, status = await get(server.url, "/status")
        held.append(max(status["running"] + status["waiting"] - _PLACES, 0))

    looking = asyncio.ensure_future(watched(look, 0.2))
    begun = time.perf_counter()
    samples = await open_loop(work, 4 * peak, seconds, first=_WARM + 1000)
    took = time.perf_counter() - begun
    looking.cancel()
    recovered = await _recovered(work, statistics.median(sample.total_s for sample in baseline))
    load = summary("open", round(4 * peak, 1), samples, took, bench)
    goodput = f"goodput (first token in {bench.first_ms:g} ms, then {bench.gap_ms:g} ms a token), of the peak's"
    row.at_least(goodput, share(load["goodput_per_s"], best["goodput_per_s"]), 0.8)
    row.at_most("429 p99 ms", load["reject_p99_ms"], 50)
    row.at_most("longest queue", max(held, default=None), 64)
    row.at_most("failed", load["failed"], 0)
    row.at_most("p50 back at the baseline after s", recovered, 2)
    row.also["whole answers per second, of the peak's"] = share(load["requests_per_s"], peak)
    row.also |= {"first_p50_ms": load["first_p50_ms"], "peak_goodput_per_s": best["goodput_per_s"]}
    row.also |= {"peak_per_s": round(peak, 2), "rejected": load["rejected"], "answered": load["ok"]}
    row.also["by_second"] = by_second(samples)
    return row, load


def share(part: float, whole: float) -> float | None:
    """``part`` of ``whole``; None where there is no whole to be a part of."""
    return part / whole if whole > 0 else None


def by_second(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """How many answers ended, and how many were refused, in each second of a load."""
    start = min(sample.started_s for sample in samples)
    ends = [(int(sample.started_s + sample.total_s - start), sample.ok) for sample in samples]
    counts = {True: Counter(at for at, ok in ends if ok), False: Counter(at for at, ok in ends if not ok)}
    seconds = range(max(at for at, _ in ends) + 1)
    return {"answered": [counts[True][at] for at in seconds], "refused": [counts[False][at] for at in seconds]}


async def _recovered(work: Target, baseline_s: float) -> float:
    """Seconds until the median of the last five single requests is at most half above the baseline."""
    begun = time.perf_counter()
    times: list[float] = []
    while time.perf_counter() - begun < 20:
        times.append((await ask(work, _WARM + 900_000 + len(times))).total_s)
        if statistics.median(times[-5:]) <= 1.5 * baseline_s:
            break
    return time.perf_counter() - begun


async def cancels(server: ServerProcess, work: Target, count: int = 1000) -> Row:
    """Streams that are left at random moments, 32 at a time; before, single ones, to see how soon each is freed."""
    row = Row(name="random cancels", about=f"{count} streams left at random moments")
    raw = request("/v1/completions", completion(work.model, 200, stream=True, ignore_eos=True))
    draw = random.Random(5)

    async def some(number: int) -> None:
        for _ in range(number):
            await leave(server, raw, draw.random() * 0.1)

    await asyncio.gather(*(some(count // 128 + 1) for _ in range(32)))
    await idle(server, 10)
    free = await gauge(server, "trivium_kv_cache_blocks_free")
    freed = []
    for _ in range(30):
        await leave(server, raw, 0.05)
        freed.append(await idle(server, 10))
    descriptors, memory = server.descriptors(), server.memory_bytes()
    await asyncio.gather(*(some(count // 32 + 1) for _ in range(32)))
    row.at_most("s until nothing runs and all blocks are free", await idle(server, 10, free), 1)
    row.at_most("memory, MB more", (server.memory_bytes() - memory) / 1e6, 10)
    row.at_most("descriptors more", server.descriptors() - descriptors, 0)
    row.at_most("one alone is freed within ms, p99", percentile(freed, 99), 100)
    return row


async def soak(server: ServerProcess, work: Target, requests: int, seconds: float) -> Row:
    """Good, bad, streamed and left requests, until so many have been sent and so many seconds have passed."""
    row = Row(name="soak", about=f"at least {requests} requests and {seconds:g} s, good, bad, streamed and left")
    statuses: Counter[int] = Counter()
    ready: Counter[int] = Counter()
    memory: list[tuple[float, float]] = []

    async def look() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(request("/readyz", None, ["Connection: close"]))
        ready[int((await reader.read()).split(b" ", 2)[1])] += 1
        writer.close()

    looking = asyncio.ensure_future(watched(look, 0.5))
    begun = time.perf_counter()
    sent = 0
    while sent < requests or time.perf_counter() - begun < seconds:
        for start in range(sent, sent + 200, 20):
            statuses.update(
                await asyncio.gather(*(mixed(server, work.model, number) for number in range(start, start + 20)))
            )
        sent += 200
        memory.append((sent / 1000, server.memory_bytes() / 1e6))
    looking.cancel()
    warm = [pair for pair in memory if pair[0] > sent / 4000]
    row.at_most("memory, MB more per 1,000 requests", slope(warm), 1)
    row.at_most("5xx", sum(count for status, count in statuses.items() if status >= 500), 0)
    row.at_most("readyz was wrong", sum(ready.values()) - ready[200], 0)
    row.at_most("s until nothing is held", await idle(server, 10), 1)
    row.also |= {"requests": sent, "statuses": dict(sorted(statuses.items())), "ready_asked": sum(ready.values())}
    row.also["memory_mb"] = [round(megabytes, 1) for _, megabytes in memory]
    return row
