"""``trivium bench serve``: load on a server with OpenAI's completions, ours or any other, at rest and beyond capacity.

Closed loop: so many requests always under way. Open loop: arrivals that do not wait for answers (Poisson), which is
what shows whether a server sheds load or drowns. Goodput: requests per second that kept both promised times.
"""

from __future__ import annotations

import asyncio
import csv
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trivium.base.errors import ConfigError, SetupError
from trivium.bench.machine import describe
from trivium.bench.serve_client import Sample, Target, closed_loop, get, open_loop

COLUMNS = (
    "load", "offered", "requests", "ok", "rejected", "failed", "seconds", "requests_per_s", "tokens_per_s",
    "goodput_per_s", "first_p50_ms", "first_p99_ms", "gap_p50_ms", "gap_p99_ms", "total_p50_ms", "total_p99_ms",
    "reject_p99_ms",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServeBench:
    """What to measure. ``rates`` are requests per second; ``first_ms`` and ``gap_ms`` are the promises of goodput."""

    concurrency: Sequence[int] = (1, 16, 64)
    rates: Sequence[float] = ()
    requests: int = 64
    duration_s: float = 20.0
    first_ms: float = 2000.0
    gap_ms: float = 100.0

    def __post_init__(self) -> None:
        if any(one < 1 for one in self.concurrency) or any(rate <= 0 for rate in self.rates):
            raise ConfigError("bench serve: concurrency and rates are positive")
        if self.requests < 1 or self.duration_s <= 0:
            raise ConfigError("bench serve: requests and duration are positive")


def run(bench: ServeBench, target: Target, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Every load in turn; the report. Raises SetupError where the server does not answer."""
    return asyncio.run(_run(bench, target, command, say))


async def _run(bench: ServeBench, target: Target, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    target = await _named(target)
    say(f"{target.url}: {target.model}; warming up")
    warm = await closed_loop(target, 2, 4, first=10_000_000)
    if not any(sample.ok for sample in warm):
        raise SetupError(f"{target.url}: no request was answered ({warm[0].error})")
    rows: list[dict[str, Any]] = []
    number = 0
    for concurrency in bench.concurrency:
        begun = time.perf_counter()
        samples = await closed_loop(target, concurrency, max(bench.requests, concurrency), first=number)
        number += len(samples)
        rows.append(summary("closed", concurrency, samples, time.perf_counter() - begun, bench))
        say(_line(rows[-1]))
    for rate in bench.rates:
        begun = time.perf_counter()
        samples = await open_loop(target, rate, bench.duration_s, first=number)
        number += len(samples)
        rows.append(summary("open", rate, samples, time.perf_counter() - begun, bench))
        say(_line(rows[-1]))
    work = {"prompt_words": target.prompt_words, "max_tokens": target.max_tokens, "model": target.model}
    promises = {"first_ms": bench.first_ms, "gap_ms": bench.gap_ms}
    return {"command": command, "machine": describe("cpu"), "workload": work, "promises": promises, "loads": rows}


def summary(load: str, offered: float, samples: Sequence[Sample], seconds: float, bench: ServeBench) -> dict[str, Any]:
    """One row of the table; times in milliseconds, None where nothing was measured."""
    good = [sample for sample in samples if sample.ok]
    refused = [sample for sample in samples if sample.status in (429, 503)]
    kept = sum(
        (sample.first_s or 0) * 1000 <= bench.first_ms and sample.per_token_s * 1000 <= bench.gap_ms for sample in good
    )
    gaps = [gap for sample in good for gap in sample.gaps_s]
    first = [sample.first_s for sample in good if sample.first_s is not None]
    total = [sample.total_s for sample in good]
    return {
        "load": load,
        "offered": offered,
        "requests": len(samples),
        "ok": len(good),
        "rejected": len(refused),
        "failed": len(samples) - len(good) - len(refused),
        "seconds": round(seconds, 3),
        "requests_per_s": round(len(good) / seconds, 3),
        "tokens_per_s": round(sum(sample.tokens for sample in good) / seconds, 2),
        "goodput_per_s": round(kept / seconds, 3),
        "first_p50_ms": percentile(first, 50),
        "first_p99_ms": percentile(first, 99),
        "gap_p50_ms": percentile(gaps, 50),
        "gap_p99_ms": percentile(gaps, 99),
        "total_p50_ms": percentile(total, 50),
        "total_p99_ms": percentile(total, 99),
        "reject_p99_ms": percentile([sample.total_s for sample in refused], 99),
    }


def percentile(seconds: Sequence[float], part: int) -> float | None:
    """The ``part``-th percentile in milliseconds."""
    if not seconds:
        return None
    if len(seconds) == 1:
        return round(seconds[0] * 1000, 2)
    return round(statistics.quantiles(seconds, n=100, method="inclusive")[part - 1] * 1000, 2)


def write_csv(report: dict[str, Any], path: Path) -> None:
    """One line per load."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(report["loads"])


async def _named(target: Target) -> Target:
    try:
        status, found = await get(target.url, "/models", target.key)
        names = [str(entry["id"]) for entry in found["data"]] if status == 200 else []
    except (OSError, ValueError, KeyError, TypeError, asyncio.IncompleteReadError) as error:
        raise SetupError(f"{target.url} does not answer as a model server: {error}") from None
    if not names:
        raise SetupError(f"{target.url}/models: status {status}; is a key needed (--key)?")
    if target.model and target.model not in names:
        raise ConfigError(f"--model-name {target.model}: the server has {', '.join(names)}")
    return target if target.model else replace(target, model=names[0])


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['load']} {row['offered']:g}: {row['tokens_per_s']:.0f} tokens/s, {row['requests_per_s']:.1f} req/s, "
        f"first p50 {row['first_p50_ms']} ms p99 {row['first_p99_ms']} ms, gap p99 {row['gap_p99_ms']} ms, "
        f"{row['rejected']} rejected, {row['failed']} failed"
    )
