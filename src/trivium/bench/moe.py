"""``trivium bench moe``: our layer beside transformers' and DeepSpeed's, in turns; exchanges; a step with EP=2.

DeepSpeed-MoE sections 5.3 (all-to-all) and 5.4 (kernels): > 6× over one-hot einsums is the paper's claim.
"""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from trivium.base.errors import ConfigError
from trivium.bench import machine
from trivium.bench.launch import launch
from trivium.bench.moe_layers import Shape
from trivium.bench.runner import Times, ratios, slowest, spread, summary

SCHEMA = 1
PARTS = ("layer", "memory", "dispatch", "step", "crossover")
LAYERS = ("trivium", "grouped", "eager", "deepspeed")
MOVERS = ("trivium", "einsum", "deepspeed")
SHAPES = (
    Shape(experts=64, top_k=8, dim=512, ffn_dim=256, tokens=1024),
    Shape(experts=8, top_k=2, dim=512, ffn_dim=2048, tokens=1024),
)
SKEWED = (Shape(experts=8, top_k=2, dim=512, ffn_dim=2048, tokens=1024, skew=2.0),)
MOVED = (
    Shape(experts=32, top_k=1, dim=512, ffn_dim=1, tokens=1024),
    Shape(experts=64, top_k=8, dim=512, ffn_dim=1, tokens=1024),
)
STEP = Shape(experts=16, top_k=2, dim=512, ffn_dim=256, tokens=512)
DEPTH = 2
SIZES = (256, 1024, 4096, 16384, 65536, 262144)
_LAYER_TARGETS = {"grouped": 1.2, "eager": 5.0, "deepspeed": 3.0}
_MOVER_TARGETS = {"einsum": 6.0, "deepspeed": 1.5}
_MEMORY_TARGET = 0.7
_RANKS_MODULE = "trivium.bench.moe_ranks"


@dataclass(frozen=True, kw_only=True)
class MoEBench:
    """What to measure. ``clock``: ``cpu`` times what one thread computes, whatever else the machine does.

    A turn of which more than `stolen.LITTLE` of the cores was taken away is taken again, ``tries`` times in all, unless
    ``clock`` is ``cpu`` or half of a launch's ``timeout_s`` has passed.
    """

    parts: tuple[str, ...] = PARTS
    threads: int = 2
    rounds: int = 7
    tries: int = 4
    clock: Literal["wall", "cpu"] = "wall"
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise ConfigError(f"part {part!r}: expected some of {', '.join(PARTS)}")
        for name in ("threads", "rounds", "tries"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.clock not in ("wall", "cpu"):
            raise ConfigError(f"clock={self.clock!r}: expected 'wall' or 'cpu'")
        if self.clock == "cpu" and self.threads > 1:
            raise ConfigError(
                f"clock='cpu' adds up what threads burn while they wait: use threads=1, not {self.threads}"
            )


def run(bench: MoEBench, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report. ``say`` hears one line per launch."""
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "bench": "moe",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.describe("cpu"),
        "settings": {"threads": bench.threads, "rounds": bench.rounds, "clock": bench.clock, "dtype": "float32"},
        "targets": [],
    }
    parts = {"layer": _layer, "memory": _memory, "dispatch": _dispatch, "step": _step, "crossover": _crossover}
    for part in bench.parts:
        report[part] = parts[part](bench, report["targets"], say)
    return report


def _layer(bench: MoEBench, targets: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for shape in (*SHAPES, *SKEWED):
        say(f"layer: {_told(shape)}, forward and backward of {', '.join(LAYERS)} and of bare matrix products")
        (one,) = _launch(bench, 1, "layers", shape=asdict(shape), contestants=LAYERS)
        turns = _turns(one["times"], "trivium", one["stolen"])
        share = turns["products"]["ratio"]["median"]
        made = {"shape": asdict(shape), "load": one["load"], "contestants": turns, "apart": one["apart"]}
        found.append({**made, "products_share": share})
        for name, least in _LAYER_TARGETS.items() if shape in SHAPES else ():
            targets.append(_judge(f"layer {_told(shape)}", f"{name} ÷ trivium", turns[name], least))
    return found


def _memory(bench: MoEBench, targets: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for shape in SHAPES:
        held = {}
        for name in ("trivium", "grouped"):
            say(f"memory: {_told(shape)}, {name}")
            (held[name],) = _launch(bench, 1, "memory", shape=asdict(shape), contestants=[name])
        extra = {name: one["peak_bytes"] - one["gradient_bytes"] for name, one in held.items()}
        ratio = held["trivium"]["peak_bytes"] / held["grouped"]["peak_bytes"]
        found.append({"shape": asdict(shape), "contestants": held, "ratio": ratio, "without_gradients_bytes": extra})
        targets.append(
            {
                "what": f"memory {_told(shape)}",
                "of": "peak above parameters, trivium ÷ grouped",
                "value": ratio,
                "at_most": _MEMORY_TARGET,
                "met": ratio <= _MEMORY_TARGET,
            }
        )
    return found


def _dispatch(bench: MoEBench, targets: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for shape in MOVED:
        say(f"dispatch: gate, dispatch and combine without experts, {_told(shape)}, capacity factor 1")
        (one,) = _launch(bench, 1, "movers", shape=asdict(shape), contestants=MOVERS)
        forward = {name: taken for name, taken in one["times"].items() if not name.endswith("+backward")}
        both = {name.removesuffix("+backward"): taken for name, taken in one["times"].items() if name not in forward}
        turns = {
            "forward": _turns(forward, "trivium", one["stolen"]),
            "forward and backward": _turns(
                both, "trivium", {name.removesuffix("+backward"): gone for name, gone in one["stolen"].items()}
            ),
        }
        found.append({"shape": asdict(shape), "capacity_factor": 1.0, "apart": one["apart"], **turns})
        for name, least in _MOVER_TARGETS.items():
            for way, made in turns.items():
                targets.append(_judge(f"dispatch {_told(shape)}, {way}", f"{name} ÷ trivium", made[name], least))
    return found


def _step(bench: MoEBench, targets: list[dict[str, Any]], say: Callable[[str], None]) -> dict[str, Any]:
    say(f"step: {DEPTH} layers of {_told(STEP)} on 2 ranks of 1 thread")
    ranks = _launch(bench, 2, "training", shape=asdict(STEP), depth=DEPTH)
    step_s = [max(pair) for pair in zip(*(one["step_s"] for one in ranks), strict=True)]
    inside_s = [max(pair) for pair in zip(*(one["exchange_s"] for one in ranks), strict=True)]
    sent, formula = (sum(one[key] for one in ranks) for key in ("bytes", "formula_bytes"))  # what one sends, one gets
    targets.append(
        {"what": "step", "of": "bytes ÷ formula", "value": sent / formula, "at_most": 1.0, "met": sent == formula}
    )
    return {
        "shape": asdict(STEP),
        "layers": DEPTH,
        "ranks": 2,
        "step_s": spread(step_s).to_dict(),
        "exchange_s": spread(inside_s).to_dict(),
        "exchange_share": statistics.median(a / b for a, b in zip(inside_s, step_s, strict=True)),
        "bytes": sent,
        "formula_bytes": formula,
    }


def _crossover(bench: MoEBench, targets: list[dict[str, Any]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    found = []
    for ranks, nodes in ((4, (2,)), (8, (2, 4))):
        say(f"crossover: there and back on {ranks} ranks, flat and by nodes of {' and '.join(map(str, nodes))}")
        by_rank = _launch(bench, ranks, "crossover", nodes=nodes, dim=16, sizes=SIZES)
        table = {}
        for size in SIZES:
            told = [one["by_size"][str(size)] for one in by_rank]
            table[str(size)] = _columns(slowest([one["times"] for one in told]), "flat", told[0]["stolen"])
        found.append({"ranks": ranks, "by_message_bytes": table})
    return found


def _launch(bench: MoEBench, ranks: int, mode: str, **more: Any) -> list[dict[str, Any]]:
    alone = ranks == 1
    clock = bench.clock if alone else "wall"
    request = {
        "mode": mode,
        "ranks": ranks,
        "threads": bench.threads if alone else 1,
        "rounds": 3 if mode == "memory" else bench.rounds,
        "per_round": 1 if alone else 3,
        "warm_up": 1,
        "tries": 1 if clock == "cpu" else bench.tries,
        "repeat_s": bench.timeout_s / 2,
        "clock": clock,
        **more,
    }
    return launch(_RANKS_MODULE, request, ranks, timeout_s=bench.timeout_s)


def _turns(times: Times, base: str, stolen: Mapping[str, Any]) -> dict[str, Any]:
    columns = _columns(times, base, stolen)
    return {name: {column: told[name] for column, told in columns.items()} for name in times}


def _columns(times: Times, base: str, stolen: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "step_s": summary(times, stolen),
        "ratio": {name: one.to_dict() for name, one in ratios(times, base, stolen).items()},
        "stolen": {name: stolen[name] for name in times},
    }


def _judge(what: str, of: str, one: Mapping[str, Any], at_least: float) -> dict[str, Any]:
    value = one["ratio"]["median"]
    return {"what": what, "of": of, "value": value, "at_least": at_least, "met": value >= at_least}


def _told(shape: Shape) -> str:
    inner = f", ffn {shape.ffn_dim}" if shape.ffn_dim > 1 else ""
    skew = f", Zipf {shape.skew:g}" if shape.skew else ""
    return f"E={shape.experts} k={shape.top_k} hidden {shape.dim}{inner}, {shape.tokens} tokens{skew}"


def lines(report: Mapping[str, Any]) -> Sequence[str]:
    """The report for people: one line per figure."""
    said = []
    for one in report.get("layer", ()):
        said.append(f"layer {_told(Shape(**one['shape']))}: products are {one['products_share']:.0%} of ours")
        said += _rows(one["contestants"])
    for one in report.get("dispatch", ()):
        for way in ("forward", "forward and backward"):
            said.append(f"gate, dispatch, combine {_told(Shape(**one['shape']))}, {way}")
            said += _rows(one[way])
    for one in report.get("memory", ()):
        peaks = ", ".join(f"{name} {held['peak_bytes'] / 1e6:.0f} MB" for name, held in one["contestants"].items())
        said.append(f"memory {_told(Shape(**one['shape']))}: {peaks}")
    if "step" in report:
        step = report["step"]
        said.append(
            f"step with EP=2: {step['step_s']['median'] * 1e3:.1f} ms, {step['exchange_share']:.0%} in all-to-all, "
            f"{step['bytes']} bytes sent, {step['formula_bytes']} by the formula"
        )
    for one in report.get("crossover", ()):
        for size, made in one["by_message_bytes"].items():
            ways = ", ".join(f"{name} {r['median']:.2f}" for name, r in made["ratio"].items() if name != "flat")
            flat = made["step_s"]["flat"]["median"] * 1e3
            said.append(f"exchange on {one['ranks']} ranks, {size} bytes a message: flat {flat:.2f} ms; ÷ flat: {ways}")
    for one in report["targets"]:
        bound = f"at least {one['at_least']:g}" if "at_least" in one else f"at most {one['at_most']:g}"
        said.append(
            f"{'met   ' if one['met'] else 'missed'} {one['what']}: {one['of']} {one['value']:.2f}, target {bound}"
        )
    return said


def _rows(contestants: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name:10} {one['step_s']['median'] * 1e3:9.1f} ms  {one['ratio']['median']:6.2f} × ours "
        f"({one['ratio']['least']:.2f} to {one['ratio']['greatest']:.2f})"
        for name, one in contestants.items()
    ]
