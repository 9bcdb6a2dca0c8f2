"""Generation side by side: decode and prefill of Trivium, transformers and llama.cpp on the same weights, interleaved.

DeepSpeed Inference section 3.1: generation is bound by the weights' bytes, so each figure stands beside the share of
the memory's read limit, measured in the same round. Every contestant is a process of its own, idle while others run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import ConfigError, SetupError
from trivium.bench.inference_shapes import SHAPES, write_folder
from trivium.bench.machine import describe
from trivium.kernels import registry

CONTESTANTS = (
    "trivium bfloat16",
    "trivium int8",
    "trivium int4",
    "trivium float32",
    "transformers float32",
    "transformers bfloat16",
    "llama.cpp BF16",
    "llama.cpp Q8_0",
    "llama.cpp Q4_0",
)
DEFAULT = tuple(name for name in CONTESTANTS if name != "trivium float32")


@dataclass(frozen=True, kw_only=True)
class InferenceBench:
    """What runs: a shape, contestants, rounds, and per round ``steps`` decode steps of each batch and one prefill."""

    shape: str = "0.5b"
    contestants: tuple[str, ...] = DEFAULT
    rounds: int = 5
    steps: int = 8
    threads: int = 2
    batches: tuple[int, ...] = (1, 16)
    context: int = 64
    prefill: int = 512

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"--shape {self.shape}: expected one of {', '.join(SHAPES)}")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ConfigError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
        if min(self.rounds, self.steps, self.threads, self.context, self.prefill, *self.batches) < 1:
            raise ConfigError("rounds, steps, threads, batches, context and prefill must be at least 1")


def run(bench: InferenceBench, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The report: per contestant and round the seconds of a decode step per batch and of a prefill; medians and shares.

    Raises:
        ConfigError: an unknown shape or contestant.
        SetupError: a contestant's process died; its last words are told.
    """
    machine = describe("cpu")
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as folder:
        say(f"{bench.shape}: writing random weights")
        write_folder(bench.shape, Path(folder))
        say(registry.explain())
        workers = {}
        try:
            for name in bench.contestants:
                workers[name] = Worker(name, Path(folder), bench)
                say(f"{name}: {workers[name].ready.get('error') or 'ready'}")
            live = {name: worker for name, worker in workers.items() if "error" not in worker.ready}
            rounds = [_round(bench, live, number, say) for number in range(bench.rounds)]
        finally:
            for worker in workers.values():
                worker.close()
    return {
        "command": command,
        "machine": {**machine, "kernels": registry.explain()},
        "shape": {"name": bench.shape, **SHAPES[bench.shape]},
        "threads": bench.threads,
        "context": bench.context,
        "prefill": bench.prefill,
        "absent": {name: w.ready["error"] for name, w in workers.items() if "error" in w.ready},
        "step_bytes": {name: w.ready["step_bytes"] for name, w in live.items()},
        "read_limit_gb_per_s": statistics.median(r["read_limit_gb_per_s"] for r in rounds),
        "rounds": rounds,
        "summary": _summary(rounds, {name: worker.ready["step_bytes"] for name, worker in live.items()}),
    }


def _round(
    bench: InferenceBench, workers: dict[str, Worker], number: int, say: Callable[[str], None]
) -> dict[str, Any]:
    found: dict[str, Any] = {"read_limit_gb_per_s": read_limit(bench.threads), "seconds": {}}
    for name, worker in workers.items():
        times = {}
        for batch in bench.batches:
            asked = {"do": "decode", "batch": batch, "context": bench.context, "steps": bench.steps}
            times[f"decode {batch}"] = worker.ask(asked)["seconds"]
        times[f"prefill {bench.prefill}"] = worker.ask({"do": "prefill", "tokens": bench.prefill})["seconds"]
        found["seconds"][name] = times
    say(f"round {number + 1} of {bench.rounds}: read limit {found['read_limit_gb_per_s']:.1f} GB/s")
    return found


def read_limit(threads: int, size_bytes: int = 512 << 20) -> float:
    """GB/s at which ``threads`` threads read memory that no cache holds: the best of three."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.zeros(size_bytes // 8, dtype=torch.int64)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            data.sum()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return size_bytes / min(times) / 1e9


def _summary(rounds: list[dict[str, Any]], step_bytes: dict[str, int]) -> dict[str, Any]:
    """Per contestant and workload: median seconds, tokens/s, and for decoding alone the share of the read limit."""
    summary: dict[str, Any] = {}
    for name, times in rounds[0]["seconds"].items():
        summary[name] = {}
        for workload in times:
            count = workload.partition(" ")[2]
            values = [r["seconds"][name][workload] for r in rounds]
            entry = {"seconds": statistics.median(values), "tokens_per_s": int(count) / statistics.median(values)}
            if workload == "decode 1":
                shares = [
                    step_bytes[name] / value / 1e9 / r["read_limit_gb_per_s"]
                    for value, r in zip(values, rounds, strict=True)
                ]
                entry["share_of_read_limit"] = statistics.median(shares)
            summary[name][workload] = entry
    return summary


class Worker:
    """One contestant in a process of its own, which answers one line of JSON per line of JSON."""

    def __init__(self, name: str, folder: Path, bench: InferenceBench) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        contestant, _, form = name.partition(" ")
        module = {
            "trivium": "trivium.bench.inference_ours",
            "transformers": "trivium.bench.peers.inference_transformers",
            "llama.cpp": "trivium.bench.peers.inference_llama_cpp",
        }[contestant]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder), form, str(bench.threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ready = self._read()

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One workload; waits for its answer."""
        if self._process.stdin is not None:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self._errors.seek(0)
            words = self._errors.read().decode(errors="replace").strip().splitlines()
            self.close()
            raise SetupError(f"{self.name}: its process ended: {words[-1] if words else 'without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
