"""``trivium bench quality``: what experts, a pyramid of them, and distilling a student do to the loss, seed by seed.

DeepSpeed-MoE sections 3.3, 4.1 and 4.2. Differences are taken within a seed; a claim whose interval covers 0 is told as
not resolved.
"""

from __future__ import annotations

import datetime
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any

from trivium.base.errors import ConfigError
from trivium.bench import machine
from trivium.bench.quality_runs import CLAIMS, Found, QualityBench, train_all

SCHEMA = 1
# Two-sided 95 % points of Student's t with n - 1 degrees of freedom, for n = 2 to 10 seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_TOLD = MappingProxyType(
    {
        "a": "MoE against dense at equal activated size",
        "b": "PR-MoE against MoE with all layers large",
        "c": "a student distilled for part of its run, never, and to the end",
    }
)

Curve = Sequence[Sequence[float]]


def run(bench: QualityBench, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train what is missing, and return the report. ``say`` hears one line per run."""
    described = machine.describe("cpu")
    return report(bench, train_all(bench, say), command, described)


def report(bench: QualityBench, found: Found, command: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """The report of the runs in ``found``: settings, curves, claims. Plain JSON values."""
    runs = {}
    for arm, by_seed in found.items():
        first = next(iter(by_seed.values()))
        runs[arm] = {
            **{key: first[key] for key in ("parameters", "activated", "config")},
            "seeds": {
                str(seed): {
                    key: one[key]
                    for key in ("command", "validation", "cpu_s", "wall_s", "lives", "distilled", "skipped")
                }
                for seed, one in by_seed.items()
            },
        }
    every = [one for by_seed in found.values() for one in by_seed.values()]
    claims = {"a": _experts, "b": _pyramid, "c": _students}
    return {
        "schema": SCHEMA,
        "bench": "quality",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": dict(described),
        "settings": {"seeds": bench.seeds, "jobs": bench.jobs, "overrides": list(bench.overrides)},
        "text": {key: every[0][key] for key in ("text", "unigram", "bigram")},
        "cpu_s": round(math.fsum(one["cpu_s"] for one in every), 1),
        "claims": {claim: claims[claim](found) for claim in bench.claims},
        "runs": runs,
    }


def paired(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation, range and 95 % interval (Student's t) of one difference per seed.

    ``resolved``: the interval does not cover 0. One seed alone has no spread and resolves nothing. Raises ConfigError
    for none, or more than ten.
    """
    if not 1 <= len(values) <= len(_T) + 1:
        raise ConfigError(f"{len(values)} seeds: expected 1 to {len(_T) + 1}")
    mean = statistics.fmean(values)
    deviation = half = None
    if len(values) > 1:
        deviation = statistics.stdev(values)
        half = _T[len(values) - 2] * deviation / math.sqrt(len(values))
    return {
        "values": [round(value, 6) for value in values],
        "mean": round(mean, 6),
        "deviation": None if deviation is None else round(deviation, 6),
        "least": round(min(values), 6),
        "greatest": round(max(values), 6),
        "interval": None if half is None else [round(mean - half, 6), round(mean + half, 6)],
        "resolved": half is not None and abs(mean) > half,
    }


def reached(curve: Curve, loss: float) -> float | None:
    """The step, between two points by a straight line, at which ``curve`` is first at or below ``loss``; else None."""
    if curve and curve[0][1] <= loss:
        return float(curve[0][0])
    for (before, high), (after, low) in pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def _final(found: Found, arm: str, seed: int) -> float:
    return float(found[arm][seed]["validation"][-1][1])


def _gap(found: Found, arm: str, base: str) -> dict[str, Any]:
    """``arm``'s final validation loss minus ``base``'s, seed by seed."""
    return paired([_final(found, arm, seed) - _final(found, base, seed) for seed in found[base]])


def _losses(found: Found, arms: Sequence[str]) -> dict[str, Any]:
    return {arm: paired([_final(found, arm, seed) for seed in found[arm]]) for arm in arms}


def _size(found: Found, arm: str, key: str) -> int:
    return int(next(iter(found[arm].values()))[key])


def _experts(found: Found) -> dict[str, Any]:
    steps = {}
    for seed, one in found["dense"].items():
        last, loss = one["validation"][-1]
        at = reached(found["moe"][seed]["validation"], loss)
        steps[seed] = {"dense": last, "loss": loss, "moe": None if at is None else round(at, 1)}
    arrived = [one["dense"] / one["moe"] for one in steps.values() if one["moe"] is not None]
    return {
        "title": _TOLD["a"],
        "final": _losses(found, CLAIMS["a"]),
        "gaps": {"moe - dense": _gap(found, "moe", "dense")},
        "steps": {str(seed): one for seed, one in steps.items()},
        # log: a ratio of 1 is 0, and 2 is as far from it as 1/2
        "fewer_steps": _times(arrived) if len(arrived) == len(steps) else None,
        "activated": {arm: _size(found, arm, "activated") for arm in CLAIMS["a"]},
        "parameters": {arm: _size(found, arm, "parameters") for arm in CLAIMS["a"]},
    }


def _times(ratios: Sequence[float]) -> dict[str, Any]:
    """A ratio's spread, by its logarithm; ``resolved``: it is not 1."""
    one = paired([math.log(ratio) for ratio in ratios])
    return {
        "values": [round(ratio, 4) for ratio in ratios],
        "mean": round(math.exp(one["mean"]), 4),
        "interval": None if one["interval"] is None else [round(math.exp(edge), 4) for edge in one["interval"]],
        "resolved": one["resolved"],
    }


def _pyramid(found: Found) -> dict[str, Any]:
    large = _size(found, "moe", "parameters")
    return {
        "title": _TOLD["b"],
        "final": _losses(found, CLAIMS["b"]),
        "gaps": {f"{arm} - moe": _gap(found, arm, "moe") for arm in CLAIMS["b"][1:]},
        "parameters": {arm: _size(found, arm, "parameters") for arm in CLAIMS["b"]},
        "smaller": {arm: round(large / _size(found, arm, "parameters"), 4) for arm in CLAIMS["b"][1:]},
        "activated": {arm: _size(found, arm, "activated") for arm in CLAIMS["b"]},
    }


def _students(found: Found) -> dict[str, Any]:
    pairs = (
        ("student-staged", "student-alone"),
        ("student-staged", "student-full"),
        ("student-full", "student-alone"),
        ("student-staged", "pr-moe"),
    )
    return {
        "title": _TOLD["c"],
        "final": _losses(found, CLAIMS["c"]),
        "gaps": {f"{arm} - {base}": _gap(found, arm, base) for arm, base in pairs},
        "parameters": {arm: _size(found, arm, "parameters") for arm in CLAIMS["c"]},
        "activated": {arm: _size(found, arm, "activated") for arm in CLAIMS["c"]},
    }


def lines(report: Mapping[str, Any]) -> Sequence[str]:
    """The report for people: one line per figure, losses in nats per token."""
    said = []
    for claim, one in report["claims"].items():
        said.append(f"({claim}) {one['title']}")
        for arm, loss in one["final"].items():
            sizes = f"{one['parameters'][arm]:,} parameters, {one['activated'][arm]:,} per token"
            said.append(f"  {arm:<15} {loss['mean']:.4f}{_plus(loss)}  {sizes}")
        for name, gap in one["gaps"].items():
            said.append(f"  {name}: {gap['mean']:+.4f}{_plus(gap)}, seeds {_shown(gap['values'])}: {_verdict(gap)}")
        if "steps" in one:
            said.append(f"  {_arrival(one)}")
        for arm, ratio in one.get("smaller", {}).items():
            said.append(f"  {arm}: {ratio:.2f} times fewer parameters than moe")
    said.append(
        f"{len(report['runs'])} kinds of run, {report['settings']['seeds']} seeds, {report['cpu_s']:.0f} s of CPU"
    )
    return said


def _arrival(one: Mapping[str, Any]) -> str:
    steps = one["steps"].values()
    at = "; ".join(f"{'not within' if seed['moe'] is None else seed['moe']} of {seed['dense']}" for seed in steps)
    fewer = one["fewer_steps"]
    if fewer is None:
        return f"moe reaches dense's final loss at step {at}: not for every seed"
    edges = "" if fewer["interval"] is None else f" (95 %: {fewer['interval'][0]:.2f} to {fewer['interval'][1]:.2f})"
    return f"moe reaches dense's final loss at step {at}: {fewer['mean']:.2f} times fewer{edges}, {_verdict(fewer)}"


def _plus(one: Mapping[str, Any]) -> str:
    return "" if one["deviation"] is None else f" ± {one['deviation']:.4f}"


def _shown(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)


def _verdict(one: Mapping[str, Any]) -> str:
    return "resolved" if one["resolved"] else "not resolved at this scale"
