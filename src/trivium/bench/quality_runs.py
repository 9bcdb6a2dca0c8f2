"""The runs of ``trivium bench quality``: which there are, each a process of `trivium train` or `trivium distill`.

DeepSpeed-MoE sections 3.3 (MoE against dense), 4.1 (PR-MoE) and 4.2 (mixture of students).

[Note: paired seeds]
A seed sets both the order of the text and the weights at the start, which are drawn by (seed, name): runs of one seed
read the same batches and begin with the same weights wherever their models have the same tensors. The split of the
text and the tokenizer depend on no seed. So differences are taken within a seed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from trivium.base import config as configs
from trivium.base.errors import ConfigError, DataError, TriviumError
from trivium.train.config import TrainConfig
from trivium.train.metrics import FILE, read

_SCHEMA = 1
MOST_SEEDS = 10


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One kind of run: its configuration's name, what it replaces there, and the arm that is its teacher."""

    config: str
    overrides: tuple[str, ...] = ()
    teacher: str | None = None


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "dense": Arm(config="dense.toml"),
        "moe": Arm(config="moe.toml"),
        "pr-moe": Arm(config="pr-moe.toml"),
        "student-staged": Arm(config="student.toml", teacher="pr-moe"),
        "student-alone": Arm(config="student.toml", overrides=("distill.stop=0",), teacher="pr-moe"),
        "student-full": Arm(config="student.toml", overrides=('distill.stop="never"',), teacher="pr-moe"),
        "pr-moe-narrow": Arm(config="pr-moe-narrow.toml"),
    }
)
CLAIMS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "a": ("dense", "moe"),
        "b": ("moe", "pr-moe", "pr-moe-narrow"),
        "c": ("pr-moe", "student-staged", "student-alone", "student-full"),
    }
)


@dataclass(frozen=True, kw_only=True)
class QualityBench:
    """What to train. ``claims``: some of a, b, c. ``seeds``: 0 up to, not including, this. ``jobs``: runs at once.

    ``configs`` holds the arms' files, ``folder`` takes the runs and what they found; ``overrides`` go on top of every
    file (``train.steps=1000``).
    """

    claims: tuple[str, ...] = ("a", "b", "c")
    seeds: int = 3
    jobs: int = 1
    configs: Path = Path("configs/quality")
    folder: Path = Path("runs/quality")
    overrides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for claim in self.claims:
            if claim not in CLAIMS:
                raise ConfigError(f"claim {claim!r}: expected some of {', '.join(CLAIMS)}, or all")
        for name in ("seeds", "jobs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.seeds > MOST_SEEDS:
            raise ConfigError(f"seeds={self.seeds}: expected 1 to {MOST_SEEDS}")
        if not self.claims:
            raise ConfigError("no claim to measure: expected some of a, b, c, or all")

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that the claims need, teachers before students."""
        return tuple(name for name in ARMS if any(name in CLAIMS[claim] for claim in self.claims))

    def place(self, arm: str, seed: int) -> Path:
        """The run's own folder."""
        return self.folder / f"{arm}-seed{seed}"

    def command(self, arm: str, seed: int) -> list[str]:
        """The words of the run's command, after ``trivium``."""
        one = ARMS[arm]
        told = [
            *one.overrides,
            *self.overrides,
            f"train.seed={seed}",
            f"run={json.dumps(str(self.place(arm, seed)))}",
            f"data.cache={json.dumps(str(self.folder / 'text'))}",
        ]
        if one.teacher is not None:
            told.append(f"distill.teacher={json.dumps(str(self.place(one.teacher, seed)))}")
        verb = "train" if one.teacher is None else "distill"
        return [verb, str(self.configs / one.config), *(word for text in told for word in ("--set", text)), "--json"]

    def config(self, arm: str, seed: int) -> TrainConfig:
        """The run's whole configuration. Raises ConfigError, also for a file that is not there."""
        command = self.command(arm, seed)
        if not Path(command[1]).is_file():
            raise ConfigError(
                f"{command[1]} does not exist: call from the project's folder, or name the folder that holds "
                f"{', '.join(sorted({one.config for one in ARMS.values()}))} with --configs"
            )
        return configs.load(TrainConfig, command[1], command[3:-1:2])


Found = dict[str, dict[int, dict[str, Any]]]


def train_all(bench: QualityBench, say: Callable[[str], None]) -> Found:
    """Train what is not there yet, ``jobs`` at once: arm → seed → what its run found. ``say`` hears a line per run.

    Raises ConfigError when a run of other settings lies in its place, TriviumError when a run fails.
    """
    seeds = range(bench.seeds)
    kept = {(arm, seed): finished(bench, arm, seed) for arm in bench.arms for seed in seeds}
    bench.folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(bench.jobs) as pool:
        under_way: dict[tuple[str, int], Future[dict[str, Any]]] = {}

        def make(arm: str, seed: int) -> dict[str, Any]:
            teacher = ARMS[arm].teacher
            if (teacher, seed) in under_way:
                under_way[str(teacher), seed].result()  # begun before: the pool takes runs in order
            say(f"{arm}, seed {seed}")
            return _train(bench, arm, seed)

        for (arm, seed), one in kept.items():
            if one is None:
                under_way[arm, seed] = pool.submit(make, arm, seed)
        try:
            made = {key: future.result() for key, future in under_way.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return {arm: {seed: kept[arm, seed] or made[arm, seed] for seed in seeds} for arm in bench.arms}


def finished(bench: QualityBench, arm: str, seed: int) -> dict[str, Any] | None:
    """What the run found when it lies complete in its place, else None. Raises ConfigError when it is another run."""
    path = _kept(bench, arm, seed)
    if not path.is_file():
        return None
    try:
        one = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not what a run of this study leaves ({error}): remove it to train again") from error
    if not isinstance(one, dict) or one.get("schema") != _SCHEMA:
        raise DataError(f"{path} is not what a run of this study leaves: remove it to train again")
    there = configs.build(TrainConfig, one["config"], str(path))  # keys that came later have their defaults
    changed = configs.diff(there, bench.config(arm, seed))
    if changed:
        told = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, (old, new) in list(changed.items())[:4])
        raise ConfigError(f"{path} is of a run with other settings ({told}): use another --folder, or remove it")
    return one


def _kept(bench: QualityBench, arm: str, seed: int) -> Path:
    return bench.place(arm, seed).with_suffix(".json")


def _train(bench: QualityBench, arm: str, seed: int) -> dict[str, Any]:
    """One run as a process of its own; its words go to a log beside its folder."""
    command, config = bench.command(arm, seed), bench.config(arm, seed)
    log = bench.place(arm, seed).with_suffix(".log")
    begun = time.perf_counter()
    with log.open("a", encoding="utf-8") as words:
        process = subprocess.Popen([sys.executable, "-m", "trivium", *command], stdout=subprocess.DEVNULL, stderr=words)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-5:]).strip()
        raise TriviumError(
            f"the run {arm} of seed {seed} ended with code {process.returncode}; the same command goes on where it "
            f"stopped. The end of {log}:\n{last}"
        )
    found = {
        "schema": _SCHEMA,
        "command": shlex.join(["trivium", *command]),
        "config": configs.to_dict(config),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
        "wall_s": round(time.perf_counter() - begun, 1),
        **_read(config),
    }
    path = _kept(bench, arm, seed)
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    fresh.replace(path)
    return found


def _read(config: TrainConfig) -> dict[str, Any]:
    """What counts of a run's rows of metrics."""
    rows = read(config.folder / FILE)
    start = _of(rows, "start")[-1]
    return {
        "parameters": start["parameters"],
        "activated": start["activated"],
        "sequences": start["sequences"],
        "text": start["text"],
        "unigram": start["unigram"],
        "bigram": start["bigram"],
        "lives": len(_of(rows, "start")),
        "distilled": [row["step"] for row in _of(rows, "objective") if row.get("ended")],
        "skipped": _of(rows, "end")[-1]["skipped"],
        "validation": [[row["step"], row["loss"]] for row in _of(rows, "validation")],
    }


def _of(rows: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["kind"] == kind]
