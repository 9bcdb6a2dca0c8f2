"""Generation side by side: decode and prefill of Trivium and its rivals on the same weights, interleaved.

DeepSpeed Inference section 3.1: generation is bound by the weights' bytes, so each figure stands beside the share of
the memory's read limit (on a GPU: of its copy bandwidth), measured in the same round. Every contestant is a process of
its own, idle while others run; one that dies is named with its last words, and what it had measured stays.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch

from trivium.base.errors import ConfigError, SetupError
from trivium.bench.inference_process import SECOND_WAYS, ContestantDied, Worker
from trivium.bench.inference_shapes import SHAPES, write_folder
from trivium.bench.machine import describe
from trivium.bench.stolen import LITTLE, least_stolen
from trivium.kernels import registry
from trivium.memory.arena import Arena

# Contestants, and bytes per parameter while they are loaded.
CONTESTANTS: dict[str, float] = {
    "trivium bfloat16": 2.0,
    "trivium int8": 1.1,
    "trivium int4": 0.7,
    "trivium float32": 4.0,
    "transformers float32": 4.0,
    "transformers bfloat16": 2.0,
    "llama.cpp BF16": 2.0,
    "llama.cpp Q8_0": 2.2,
    "llama.cpp Q4_0": 1.2,
    "OpenVINO int8": 1.5,
    "OpenVINO int4": 1.0,
}
ON_CUDA = ("trivium bfloat16", "transformers bfloat16")  # unless others are named that run there
T = TypeVar("T")

SPARE_BYTES = 2 << 30  # what a process takes beside its weights, with room for loading them


@dataclass(frozen=True, kw_only=True)
class InferenceBench:
    """What runs: a shape, contestants, and per round ``steps`` decode steps of each batch and one prefill.

    A figure during which more than `stolen.LITTLE` of the cores was taken away is taken again, ``tries`` times in all;
    the one that lost least counts. ``context``: tokens that all sequences of a batch hold together, at least 8 each.
    No round begins that would not end within ``budget_s`` seconds of the start, except the first, and nothing is taken
    again after them. ``device`` "cuda": Trivium and transformers alone.
    """

    shape: str = "0.5b"
    contestants: tuple[str, ...] = tuple(CONTESTANTS)
    rounds: int = 5
    steps: int = 6
    threads: int = 2
    batches: tuple[int, ...] = (1, 16)
    context: int = 64
    prefill: int = 512
    tries: int = 8
    budget_s: float = 330.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ConfigError(f"--shape {self.shape}: expected one of {', '.join(SHAPES)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"--device {self.device}: expected cpu or cuda")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ConfigError(f"--contestants {name}: expected some of {', '.join(CONTESTANTS)}")
            if self.device != "cpu" and name.partition(" ")[0] not in ("trivium", "transformers"):
                raise ConfigError(f"--contestants {name}: runs on the CPU here, not on {self.device}")
        if min(self.rounds, self.steps, self.tries, self.threads, self.context, self.prefill, *self.batches) < 1:
            raise ConfigError("rounds, steps, tries, threads, batches, context and prefill must be at least 1")

    def context_of(self, batch: int) -> int:
        """Tokens that each of ``batch`` sequences holds before the measured steps."""
        return max(8, self.context // batch)


def run(
    bench: InferenceBench,
    command: str,
    say: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """The report: per contestant and round the seconds of a decode step per batch and of a prefill; medians and shares.

    ``keep`` is handed the report so far after every round.

    Raises:
        SetupError: the device is not there.
    """
    if bench.device == "cuda" and not torch.cuda.is_available():
        raise SetupError("--device cuda: torch sees no CUDA GPU here")
    started = time.monotonic()
    kernels = registry.explain() if bench.device == "cpu" else "kernels: torch"
    machine = {**describe(bench.device), "kernels": kernels}
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as folder:
        say(f"{bench.shape}: writing random weights")
        parameters = write_folder(bench.shape, Path(folder))
        say(kernels)
        field = Field(bench, Path(folder), parameters, say, until_s=started + bench.budget_s)
        try:
            while len(rounds) < bench.rounds:
                begun, loading = time.monotonic(), field.loading_s
                rounds.append(_round(bench, field, len(rounds), say))
                report = {
                    "command": command,
                    "machine": {**machine, "load_after": round(os.getloadavg()[0], 2)},
                    "shape": {"name": bench.shape, **SHAPES[bench.shape], "parameters": parameters},
                    "device": bench.device,
                    "threads": bench.threads,
                    "context": {str(batch): bench.context_of(batch) for batch in bench.batches},
                    "prefill": bench.prefill,
                    **field.report(),
                    "read_limit_gb_per_s": statistics.median(r["read_limit_gb_per_s"] for r in rounds),
                    "rounds": rounds,
                    "summary": summary(rounds, field.step_bytes),
                    "seconds": round(time.monotonic() - started),
                }
                keep(report)
                another = time.monotonic() - begun - (field.loading_s - loading)
                if time.monotonic() - started + another > bench.budget_s and len(rounds) < bench.rounds:
                    say(f"{len(rounds)} of {bench.rounds} rounds fit into {bench.budget_s:.0f} s")
                    break
        finally:
            field.close()
    return report


class Field:
    """The contestants: those that memory can hold stay loaded between rounds, the largest come anew for each turn."""

    def __init__(
        self, bench: InferenceBench, folder: Path, parameters: int, say: Callable[[str], None], *, until_s: float
    ) -> None:
        self._bench, self._folder, self._say, self._until_s = bench, folder, say, until_s
        self._need = {name: int(CONTESTANTS[name] * parameters) + SPARE_BYTES for name in bench.contestants}
        self._loaded: dict[str, Worker] = {}
        self._usual = "cuda" if bench.device == "cuda" else ""
        self._ways: dict[str, str] = {}
        self._notes: dict[str, str] = {}
        self._absent: dict[str, str] = {}
        self.step_bytes: dict[str, int] = {}
        self._kernels: dict[str, str] = {}
        self.loading_s = 0.0

    def report(self) -> dict[str, Any]:
        """Who is absent and why, what else is to be known, what computed in each, and bytes per step."""
        return {
            "absent": self._absent,
            "notes": self._notes,
            "kernels": self._kernels,
            "step_bytes": self.step_bytes,
        }

    def repeated(self, measure: Callable[[], T]) -> tuple[T, float]:
        """What was measured when least was stolen, and the share; taken again as often as the bench may."""
        return least_stolen(measure, self._bench.tries, until_s=self._until_s)

    def turn(self, name: str, questions: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
        """Per workload, as far as the contestant lives to tell: seconds, and the share of the cores that was stolen."""
        found: dict[str, tuple[float, float]] = {}
        while name not in self._absent and len(found) < len(questions):
            try:
                worker = self._load(name)
                for workload, question in questions.items():
                    if workload not in found:
                        answer, share = self.repeated(partial(worker.ask, question))
                        found[workload] = answer["seconds"], share
            except ContestantDied as error:
                self._loaded.pop(name, None)
                way = SECOND_WAYS.get(name.partition(" ")[0], "")
                if error.signalled and way and name not in self._ways:
                    self._ways[name] = way
                    self._notes[name] = f"{error}; it runs without what died there ({way})"
                else:
                    self._absent[name] = str(error)
                self._say(str(error))
            except NotImplementedError as error:
                self._absent[name] = f"{name}: {error}"
                self._say(self._absent[name])
        return found

    def _load(self, name: str) -> Worker:
        if name in self._loaded:
            return self._loaded[name]
        while self._loaded and psutil.virtual_memory().available < self._need[name]:
            self._loaded.pop(max(self._loaded, key=lambda other: self._need[other])).close()
        begun = time.monotonic()
        worker = Worker(name, self._folder, self._bench.threads, way=self._ways.get(name, self._usual))
        taken = time.monotonic() - begun
        self.loading_s += taken
        if "error" in worker.ready:
            worker.close()
            raise NotImplementedError(worker.ready["error"])
        self._loaded[name] = worker
        self.step_bytes[name] = worker.ready["step_bytes"]
        self._kernels[name] = worker.ready["kernels"]
        self._say(f"{name}: loaded in {taken:.0f} s; {self._kernels[name]}")
        return worker

    def close(self) -> None:
        """End all of them."""
        for worker in self._loaded.values():
            worker.close()


def _round(bench: InferenceBench, field: Field, number: int, say: Callable[[str], None]) -> dict[str, Any]:
    limit, share = field.repeated(lambda: copy_limit() if bench.device == "cuda" else read_limit(bench.threads))
    found: dict[str, Any] = {"read_limit_gb_per_s": limit, "seconds": {}, "stolen": {"read limit": round(share, 3)}}
    questions: dict[str, dict[str, Any]] = {
        f"decode {batch}": {"do": "decode", "batch": batch, "context": bench.context_of(batch), "steps": bench.steps}
        for batch in bench.batches
    }
    questions[f"prefill {bench.prefill}"] = {"do": "prefill", "tokens": bench.prefill}
    for name in bench.contestants:
        if times := field.turn(name, questions):
            found["seconds"][name] = {workload: seconds for workload, (seconds, _) in times.items()}
            found["stolen"][name] = {workload: round(share, 3) for workload, (_, share) in times.items()}
    what = "copy bandwidth" if bench.device == "cuda" else "read limit"
    say(f"round {number + 1} of {bench.rounds}: {what} {found['read_limit_gb_per_s']:.1f} GB/s")
    return found


def read_limit(threads: int, size_bytes: int = 512 << 20) -> float:
    """GB/s at which ``threads`` threads of torch read memory that no cache holds, on huge pages: the best of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = Arena().keep(torch.zeros((), dtype=torch.int64).expand(size_bytes // 8))  # one number, copied all over
        times = []
        for _ in range(5):
            start = time.perf_counter()
            data.sum()
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return size_bytes / min(times) / 1e9


def copy_limit(size_bytes: int = 2 << 30, device: str = "cuda") -> float:
    """GB/s, read and written together, at which ``device`` copies its own memory: the best of five."""
    source = torch.ones(size_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()  # the contestants are other processes
    return 2 * size_bytes / min(times[1:]) / 1e9


def undisturbed(rounds: list[dict[str, Any]], workload: str, names: Iterable[str]) -> list[dict[str, Any]]:
    """The rounds in which little was stolen from these contestants during this workload; all where there is none."""

    def worst(round_: dict[str, Any]) -> float:
        shares = [round_.get("stolen", {}).get(name, 0.0) for name in names]
        told = (share.get(workload, 0.0) if isinstance(share, dict) else share for share in shares)
        return float(max(told, default=0.0))

    return [r for r in rounds if worst(r) <= LITTLE] or rounds


def summary(rounds: list[dict[str, Any]], step_bytes: dict[str, int]) -> dict[str, Any]:
    """Per contestant and workload: median seconds, tokens/s, and for decoding alone the share of the read limit; of the
    rounds in which little was stolen from these figures, or of all where there is none."""
    made: dict[str, Any] = {}
    for name in dict.fromkeys(name for r in rounds for name in r["seconds"]):
        made[name] = {}
        own = [r for r in rounds if name in r["seconds"]]
        for workload in dict.fromkeys(workload for r in own for workload in r["seconds"][name]):
            told = undisturbed([r for r in own if workload in r["seconds"][name]], workload, ["read limit", name])
            middle = statistics.median(r["seconds"][name][workload] for r in told)
            entry = {"seconds": middle, "tokens_per_s": int(workload.partition(" ")[2]) / middle}
            if workload == "decode 1":
                entry["share_of_read_limit"] = statistics.median(
                    step_bytes[name] / r["seconds"][name][workload] / 1e9 / r["read_limit_gb_per_s"] for r in told
                )
            made[name][workload] = entry
    return made
