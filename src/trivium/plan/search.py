"""Does it fit, and if not, what would: the nearest settings that fit and the largest preset that does.

ZeRO section 5.4: each stage and each rank makes room. Every answer is a whole forecast, not a rule of thumb.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from trivium.models import PRESETS, DecoderConfig
from trivium.plan.forecast import Plan, Setting, forecast, inventory_of
from trivium.plan.inventory import Inventory

MOST_RANKS = 2**16


@dataclass(frozen=True, kw_only=True)
class Option:
    """A setting that fits, told as what changes."""

    change: str
    plan: Plan


def options(
    inventory: Inventory, setting: Setting, memory_bytes: int, config: DecoderConfig | None = None, *, count: int = 3
) -> list[Option]:
    """Up to ``count`` nearby settings that fit, the smallest change first. Empty if it fits already or nothing does."""

    def plan_of(one: Setting) -> Plan:
        return forecast(inventory, one, config)

    if plan_of(setting).memory.total <= memory_bytes:
        return []
    found: list[Option] = []
    for change, candidate in _candidates(setting, plan_of, memory_bytes):
        plan = plan_of(candidate)
        if plan.memory.total <= memory_bytes and all(plan != option.plan for option in found):
            found.append(Option(change=change, plan=plan))
            if len(found) == count:
                break
    return found


def largest_preset(setting: Setting, memory_bytes: int) -> tuple[str, Plan] | None:
    """The largest dense preset that fits under ``setting`` (its sequence cut to its positions); None: not one."""
    setting = replace(setting, ep=1)
    dense = [(name, config) for name, config in PRESETS.items() if config.moe is None]
    for name, config in sorted(dense, key=lambda item: -item[1].num_parameters()):
        batch = replace(setting.batch, sequence=min(setting.batch.sequence, config.max_positions))
        lower = config.num_parameters() * setting.dtype.itemsize // setting.ranks
        if lower > memory_bytes:
            continue
        plan = forecast(inventory_of(config, setting.dtype), replace(setting, batch=batch), config)
        if plan.memory.total <= memory_bytes:
            return name, plan
    return None


def _candidates(
    setting: Setting, plan_of: Callable[[Setting], Plan], memory_bytes: int
) -> Iterator[tuple[str, Setting]]:
    """From the smallest change to the largest: stage up, recompute, batch down, both, then more ranks."""
    higher = [stage for stage in range(setting.zero.stage + 1, 4) if setting.ranks > 1]
    for stage in higher:
        yield f"stage {stage}", setting.at_stage(stage)
    recomputed = replace(setting, batch=replace(setting.batch, recompute=True))
    if not setting.batch.recompute:
        yield "recompute activations", recomputed
    yield from _smaller(setting, "")
    if not setting.batch.recompute:
        for stage in higher:
            yield f"stage {stage}, recompute activations", recomputed.at_stage(stage)
        yield from _smaller(recomputed, ", recompute activations")
    for stage in higher:
        yield from _smaller(recomputed.at_stage(stage), f", stage {stage}, recompute activations")
    smallest = replace(recomputed, batch=replace(recomputed.batch, rows=1)).at_stage(3)
    variants = (
        ("", setting.at_stage(3)),
        (", recompute activations", recomputed.at_stage(3)),
        (", recompute activations, micro-batch 1", smallest),
    )
    for words, variant in variants:
        ranks = _enough_ranks(variant, plan_of, memory_bytes)
        if ranks is not None:
            yield f"{ranks} ranks, stage 3{words}", replace(variant, ranks=ranks)
            yield f"{2 * ranks} ranks, stage 3{words}", replace(variant, ranks=2 * ranks)
    for ranks in (setting.ranks, *(setting.ranks * 2**power for power in range(1, 11))):
        for sequence in (setting.batch.sequence // 2**power for power in range(1, 5)):
            if sequence:
                shorter = replace(smallest, ranks=ranks, batch=replace(smallest.batch, sequence=sequence))
                words = f"sequence {sequence}, stage 3, recompute activations, micro-batch 1"
                yield words if ranks == setting.ranks else f"{ranks} ranks, {words}", shorter


def _smaller(setting: Setting, words: str) -> Iterable[tuple[str, Setting]]:
    """Smaller micro-batches and as much more accumulation, the largest divisor first."""
    total = setting.batch.rows
    for parts in range(2, total + 1):
        if total % parts == 0:
            rows, accumulation = total // parts, setting.accumulation * parts
            smaller = replace(setting, batch=replace(setting.batch, rows=rows), accumulation=accumulation)
            yield f"micro-batch {rows}, accumulation {accumulation}{words}", smaller


def _enough_ranks(setting: Setting, plan_of: Callable[[Setting], Plan], memory_bytes: int) -> int | None:
    """The smallest doubling of the ranks that fits."""
    ranks = setting.ranks * 2
    while ranks <= MOST_RANKS:
        if plan_of(replace(setting, ranks=ranks)).memory.total <= memory_bytes:
            return ranks
        ranks *= 2
    return None
