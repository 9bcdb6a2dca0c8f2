"""``trivium bench serve --promises``: every row of what serving must hold, one after the other, measured beside bound.

Rows over an engine that computes nothing show HTTP alone; rows over a small model show the whole way.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from trivium.base.errors import ConfigError
from trivium.bench import serve_http_rows as http
from trivium.bench import serve_model_rows as small
from trivium.bench.machine import describe
from trivium.bench.serve import ServeBench
from trivium.bench.serve_client import Target
from trivium.bench.serve_model import write
from trivium.bench.serve_process import started
from trivium.bench.serve_row import Row, line
from trivium.inference import LLM

HTTP: dict[str, Callable[[], Awaitable[Row]]] = {
    "small-answers": http.small_answers,
    "streams": http.many_streams,
    "slow-heads": http.slow_clients,
    "full-queue": http.full_queue,
    "one-key-floods": http.one_key_floods,
    "wrong-keys": http.wrong_keys,
    "engine-fails": http.engine_fails,
    "connect-and-leave": http.left_at_once,
}
MODEL = ("cold-start", "concurrency", "overload", "cancels", "soak")
ROWS = (*HTTP, *MODEL)
_NAME = "small"
_TOKENS = 64
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Promises:
    """Which rows, how long the two that are about endurance, and by which times goodput is counted."""

    only: Sequence[str] = ROWS
    overload_s: float = 60.0
    soak_requests: int = 10_000
    soak_s: float = 0.0
    first_ms: float = ServeBench.first_ms
    gap_ms: float = ServeBench.gap_ms

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in ROWS]
        if unknown or not self.only:
            raise ConfigError(f"bench serve --only {','.join(unknown)}: expected some of {', '.join(ROWS)}")
        if self.overload_s <= 0 or self.soak_requests < 1000 or self.soak_s < 0:
            raise ConfigError("bench serve: --overload-s is above 0, --soak-requests 1000 or more, --soak-s 0 or more")


def run(promises: Promises, command: str, say: Callable[[str], object]) -> dict[str, Any]:
    """Every row in turn; the report. Raises SetupError where a server does not start."""
    report: dict[str, Any] = {"command": command, "machine": describe("cpu"), "rows": [], "loads": []}
    report["workload"] = {"prompt_words": Target(url="", model="").prompt_words, "max_tokens": _TOKENS, "model": _NAME}
    report["promises"] = {"first_ms": promises.first_ms, "gap_ms": promises.gap_ms}

    def note(row: Row) -> None:
        report["rows"].append(row.told())
        say(line(report["rows"][-1]))

    for name, measure in HTTP.items():
        if name in promises.only:
            note(asyncio.run(_through(measure())))
    if set(promises.only) & set(MODEL):
        with tempfile.TemporaryDirectory() as folder:
            _with_model(promises, Path(folder) / _NAME, report, note)
    report["kept"] = all(one["kept"] for row in report["rows"] for one in row["promises"])
    return report


async def _through(measured: Awaitable[T]) -> T:
    """What was measured, once the connections that were let go have closed."""
    try:
        return await measured
    finally:
        await asyncio.sleep(0.05)


def _with_model(promises: Promises, folder: Path, report: dict[str, Any], note: Callable[[Row], None]) -> None:
    report["workload"]["parameters"] = write(folder)
    work = Target(url="", model=_NAME, prompt_words=8, max_tokens=_TOKENS)
    report["workload"]["prompt_words"] = work.prompt_words
    bench = ServeBench(first_ms=promises.first_ms, gap_ms=promises.gap_ms)
    texts: dict[int, str] = {}
    if "concurrency" in promises.only:
        texts = small.offline(LLM(folder), work)
    with started(str(folder)) as server:
        asked = Target(url=server.url, model=_NAME, prompt_words=work.prompt_words, max_tokens=_TOKENS)
        if "cold-start" in promises.only:
            note(asyncio.run(_through(small.cold_start(server, asked))))
        if "concurrency" in promises.only:
            row, loads = asyncio.run(_through(small.concurrency(server, asked, texts, bench)))
            report["loads"] += loads
            note(row)
        if "overload" in promises.only:
            row, load = asyncio.run(_through(small.overload(server, asked, promises.overload_s, bench)))
            report["loads"].append(load)
            note(row)
        if "cancels" in promises.only:
            note(asyncio.run(_through(small.cancels(server, asked))))
        if "soak" in promises.only:
            note(asyncio.run(_through(small.soak(server, asked, promises.soak_requests, promises.soak_s))))
