"""``trivium bench zero``: DDP, FSDP2, DeepSpeed and our stages 0 to 3 train one model side by side.

Ours run twice: as users have it, where ranks of one host read each other's memory, and over loopback like the rivals.

ZeRO sections 5 and 7: memory and communication of each stage, here measured next to the libraries people use.

Launches: one in which all contestants take turns (times); one of ours with a delay injected (overlap); one per
contestant (memory); one inside a network namespace (bytes as the kernel counts them).
"""

from __future__ import annotations

import datetime
import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import psutil

from trivium.base.errors import CapacityError, ConfigError
from trivium.base.units import format_bytes
from trivium.bench import loopback, machine
from trivium.bench.launch import launch
from trivium.bench.runner import Times, counting, ratios, slowest, summary
from trivium.models import DecoderConfig, preset
from trivium.plan.forecast import Setting, forecast, inventory_of
from trivium.zero import ZeroConfig

SCHEMA = 1
CONTESTANTS = (
    "ddp",
    "fsdp2",
    "fsdp2-keep",
    "deepspeed-1",
    "deepspeed-2",
    "deepspeed-3",
    "trivium-0",
    "trivium-1",
    "trivium-2",
    "trivium-3",
    "loopback-1",
    "loopback-2",
    "loopback-3",
)
BASES = ("ddp", "fsdp2", "deepspeed-3")
_RANKS_MODULE = "trivium.bench.zero_ranks"
_BYTES_PER_PARAMETER = 30  # what the hungriest contestant but DeepSpeed 3 held per parameter and rank
_BATCHES: Mapping[str, tuple[int, int]] = MappingProxyType({"34m": (2, 256), "7.4m": (1, 64)})
_SMALL_BATCH = (1, 64)

# contestant, base, what is compared, shape (None: any), at most
_TARGETS = (
    ("trivium-1", "ddp", "time", None, 1.03),
    ("trivium-2", "ddp", "time", None, 1.03),
    ("trivium-3", "fsdp2", "time", "34m", 0.85),
    ("trivium-3", "deepspeed-3", "time", "34m", 0.85),
    ("trivium-3", "fsdp2", "time", "7.4m", 0.6),
    ("trivium-3", "deepspeed-3", "time", "7.4m", 0.6),
    ("trivium-3", "fsdp2", "memory", None, 0.5),
)


@dataclass(frozen=True, kw_only=True)
class ZeroBench:
    """What to measure. ``delay_ms``: per collective of ours, 0 for none; ``memory`` and ``wire``: take these too.

    A turn of which more than `stolen.LITTLE` of the cores was taken away is taken again, ``tries`` times in all, until
    half of a launch's ``timeout_s`` has passed.
    """

    shape: str = "34m"
    ranks: int = 2
    rounds: int = 10
    tries: int = 4
    per_round: int = 2
    warm_up: int = 2
    contestants: tuple[str, ...] = CONTESTANTS
    delay_ms: float = 0.0
    device: str = "cpu"
    memory: bool = True
    wire: bool = True
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for name in ("ranks", "rounds", "tries", "per_round", "warm_up"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: expected 1 or more")
        for name in self.contestants:
            if name not in CONTESTANTS:
                raise ConfigError(f"contestant {name!r}: expected some of {', '.join(CONTESTANTS)}")
        if not self.contestants:
            raise ConfigError(f"no contestants: expected some of {', '.join(CONTESTANTS)}")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device={self.device!r}: expected cpu or cuda")
        if self.delay_ms < 0:
            raise ConfigError(f"delay_ms={self.delay_ms}: expected 0 or more")
        preset(self.shape)

    @property
    def model(self) -> DecoderConfig:
        """The model's shape."""
        return preset(self.shape)

    @property
    def batch(self) -> tuple[int, int]:
        """Sequences per rank and tokens per sequence."""
        return _BATCHES.get(self.shape.lower(), _SMALL_BATCH)


def run(bench: ZeroBench, command: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and return the report that `docs/benchmarks.md` describes. ``say`` hears one line per launch."""
    names, skipped = _present(bench.contestants, bench.device)
    _require_memory(bench, names)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "bench": "zero",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": machine.describe(bench.device),
        "workload": _workload(bench),
        "skipped": skipped,
        "contestants": found,
    }
    for name, reason in skipped.items():
        say(f"{name} is skipped: {reason}")
    say(f"times: {len(names)} contestants, {bench.rounds} rounds of {bench.per_round} steps")
    report["near"] = _time(bench, names, found)
    if bench.delay_ms and any(_ours(name) for name in names):
        say(f"overlap: ours with {bench.delay_ms:g} ms more per collective, in turns with none")
        _delay(bench, [name for name in names if _ours(name)], found)
    if bench.memory:
        for name in names:
            say(f"memory: {name}")
            _memory(bench, name, found[name])
    _wire(bench, names, found, say, near=any(report["near"]))
    report["targets"] = _judge(bench, found)
    return report


def _time(bench: ZeroBench, names: Sequence[str], found: dict[str, dict[str, Any]]) -> list[list[int]]:
    """By rank, the ranks whose memory it read in ``trivium-*``."""
    by_rank = launch(_RANKS_MODULE, _request(bench, "time", names), bench.ranks, timeout_s=bench.timeout_s)
    times = slowest([one["times"] for one in by_rank])
    stolen = by_rank[0]["stolen"]
    for name, step_s in summary(times, stolen).items():
        found[name]["step_s"] = step_s
        found[name]["stolen"] = stolen[name]
        found[name]["losses"] = by_rank[0]["losses"][name]
        found[name]["rounds_s"] = [[round(step, 6) for step in taken] for taken in times[name]]
        found[name]["bytes"] = _bytes(bench, name, [one["counts"][name] for one in by_rank])
    for base in BASES:
        if base in names:
            for name, ratio in ratios(times, base, stolen).items():
                found[name].setdefault("ratio", {})[base] = ratio.to_dict()
    return [one["near"] for one in by_rank]


def _bytes(bench: ZeroBench, name: str, counts: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes per rank and step: the paper's, and for ours the plan's and the ledger's (rank 0; all are equal)."""
    share = (bench.ranks - 1) / bench.ranks
    multiple = 3 if name == "fsdp2" or name.endswith("-3") else 2
    told: dict[str, float] = {"paper": multiple * 4 * bench.model.num_parameters() * share}
    if _ours(name):
        config = ZeroConfig(stage=int(name[-1]))
        plan = forecast(inventory_of(bench.model), Setting(ranks=bench.ranks, zero=config))
        told["plan"] = plan.communication.per_step.sent_bytes
        told["ledger"] = counts[0]["payload_bytes"] / counts[0]["steps"]
        told["agreeing"] = counts[0]["bytes_by_phase"].get("agree", 0) / counts[0]["steps"]
    return told


def _delay(bench: ZeroBench, names: Sequence[str], found: dict[str, dict[str, Any]]) -> None:
    delay_s = bench.delay_ms / 1000
    request = {**_request(bench, "time", names), "delay_s": delay_s}
    by_rank = launch(_RANKS_MODULE, request, bench.ranks, timeout_s=bench.timeout_s)
    times, stolen = slowest([one["times"] for one in by_rank]), by_rank[0]["stolen"]
    step_s = summary(times, stolen)
    for name in names:
        counts = [one["counts"][name] for one in by_rank]
        steps = counts[0]["steps"]
        calls = sum(n for phase, n in counts[0]["calls_by_phase"].items() if phase != "agree") / steps
        waited_s = statistics.mean(one["waited_s"] for one in counts) / steps
        longer_s = _longer_s(times, stolen, name)
        injected_s = calls * delay_s
        found[name]["delay"] = {
            "delay_s": delay_s,
            "collectives_per_step": calls,
            "injected_s": injected_s,
            "waited_s": waited_s,
            "longer_s": longer_s,
            "hidden": 1 - waited_s / injected_s if injected_s else None,
            "hidden_by_step_time": 1 - longer_s / injected_s if injected_s else None,
            "step_s": step_s[f"{name}+delay"],
        }


def _longer_s(times: Times, stolen: Mapping[str, Sequence[float]], name: str) -> float:
    """How much longer a delayed step takes: the median over rounds that count of the difference within a round."""
    late, plain = times[f"{name}+delay"], times[name]
    calm = counting(len(plain), stolen, name, f"{name}+delay")
    return statistics.median(statistics.median(late[n]) - statistics.median(plain[n]) for n in calm)


def _memory(bench: ZeroBench, name: str, found: dict[str, Any]) -> None:
    by_rank = launch(_RANKS_MODULE, _request(bench, "memory", [name]), bench.ranks, timeout_s=bench.timeout_s)
    key = "gpu_peak_bytes" if bench.device == "cuda" else "peak_bytes"
    peak = max(one[key] for one in by_rank)
    found["memory"] = {
        "peak_bytes": peak,
        "bytes_per_parameter": peak / bench.model.num_parameters(),
        "by_rank": by_rank,
    }


def _wire(
    bench: ZeroBench, names: Sequence[str], found: dict[str, dict[str, Any]], say: Callable[[str], None], *, near: bool
) -> None:
    """Bytes per rank and step that the kernel saw on loopback, headers included; not of those that read memory."""
    sending = [name for name in names if not (near and name.startswith("trivium-"))]
    if not bench.wire or bench.device != "cpu" or not sending:
        return
    before = loopback.prefix()
    if before is None:
        say("wire: skipped, this system does not let a user make a network namespace (unshare --map-root-user --net)")
        return
    say("wire: bytes on loopback in a network namespace")
    request = {**_request(bench, "traffic", sending), "per_round": 3}
    by_rank = launch(_RANKS_MODULE, request, bench.ranks, timeout_s=bench.timeout_s, before=before)
    for name, sent in by_rank[0]["sent_bytes"].items():
        found[name]["bytes"]["wire"] = sent / bench.ranks


def _judge(bench: ZeroBench, found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    judged = []
    for name, base, what, shape, at_most in _TARGETS:
        if name not in found or base not in found or shape not in (None, bench.shape.lower()) or bench.device != "cpu":
            continue
        if what == "time":
            value = found[name]["ratio"][base]["median"]
        elif "memory" in found[name]:
            value = found[name]["memory"]["peak_bytes"] / found[base]["memory"]["peak_bytes"]
        else:
            continue
        judged.append(
            {"contestant": name, "base": base, "of": what, "value": value, "at_most": at_most, "met": value <= at_most}
        )
    return judged


def _request(bench: ZeroBench, mode: str, names: Sequence[str]) -> dict[str, Any]:
    batch, sequence = bench.batch
    return {
        "mode": mode,
        "model": asdict(bench.model),
        "batch": batch,
        "sequence": sequence,
        "contestants": list(names),
        "rounds": bench.rounds,
        "per_round": bench.per_round,
        "warm_up": bench.warm_up,
        "tries": bench.tries,
        "repeat_s": bench.timeout_s / 2,
        "delay_s": 0.0,
        "device": bench.device,
    }


def _workload(bench: ZeroBench) -> dict[str, Any]:
    batch, sequence = bench.batch
    return {
        "shape": bench.shape.lower(),
        "parameters": bench.model.num_parameters(),
        "batch": batch,
        "sequence": sequence,
        "ranks": bench.ranks,
        "threads_per_rank": 1,
        "dtype": "float32",
        "optimizer": "AdamW(fused=True)",
        "rounds": bench.rounds,
        "steps_per_round": bench.per_round,
        "tries": bench.tries,
        "warm_up": bench.warm_up,
        "device": bench.device,
    }


def _present(names: Sequence[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Contestants that can be run here, and why the others cannot."""
    reasons = {}
    if importlib.util.find_spec("deepspeed") is None:
        reasons["deepspeed"] = "deepspeed is not installed; pip install 'trivium[bench]'"
    if device != "cpu":
        reasons["loopback"] = f"on {device} no rank reads another's memory: it would be trivium once more"
    skipped = {name: reasons[kind] for name in names if (kind := name.partition("-")[0]) in reasons}
    if len(skipped) == len(names):
        raise ConfigError(f"nothing to measure: {'; '.join(dict.fromkeys(skipped.values()))}")
    return [name for name in names if name not in skipped], skipped


def _require_memory(bench: ZeroBench, names: Sequence[str]) -> None:
    """All contestants are alive at once in the launch that takes times."""
    if bench.device != "cpu":
        return
    needed = _BYTES_PER_PARAMETER * bench.model.num_parameters() * bench.ranks * len(names)
    free = psutil.virtual_memory().available
    if needed > free:
        raise CapacityError(
            f"{len(names)} contestants of {bench.shape} on {bench.ranks} ranks need about {format_bytes(needed)}, "
            f"{format_bytes(free)} are free: choose fewer with --contestants, or a smaller --shape"
        )


def _ours(name: str) -> bool:
    return name.startswith(("trivium-", "loopback-"))
