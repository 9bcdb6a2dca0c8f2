"""One forecast: a model, a layout of ranks and a batch, and what they take in bytes and traffic. Nothing is run.

ZeRO sections 3, 5 and 7, through the runtime's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch

from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig, build
from trivium.plan import experts
from trivium.plan.activations import Batch, activations
from trivium.plan.communication import Communication, communication
from trivium.plan.experts import keep_own
from trivium.plan.inventory import Inventory, cut, take
from trivium.plan.memory import ADAMW_COPIES, NO_ACTIVATIONS, Memory, memory
from trivium.zero.placement import ZeroConfig

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a run is laid out: everything that the search may turn."""

    ranks: int = 1
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    dtype: torch.dtype = torch.float32
    batch: Batch = field(default_factory=Batch)
    accumulation: int = 1
    no_sync: bool = False
    rank: int = 0
    ep: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name, value in (("ranks", self.ranks), ("accumulation", self.accumulation)):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")
        if not 0 <= self.rank < self.ranks:
            raise ConfigError(f"rank={self.rank}: expected 0 to {self.ranks - 1}")

    def at_stage(self, stage: int) -> Setting:
        """The same at another stage."""
        return replace(self, zero=replace(self.zero, stage=stage))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank will hold and send. ``num_parameters`` is Ψ."""

    setting: Setting
    num_parameters: int
    memory: Memory
    communication: Communication

    @property
    def volume(self) -> float:
        """What one micro-batch sends, in multiples of Ψ elements and of (N-1)/N: the paper's 2 or 3."""
        ranks = self.setting.ranks
        unit = self.num_parameters * self.setting.dtype.itemsize * (ranks - 1) / ranks
        return self.communication.per_micro_batch.sent_bytes / unit if unit else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        setting, traffic = self.setting, self.communication
        return {
            "parameters": self.num_parameters,
            "ranks": setting.ranks,
            "rank": setting.rank,
            "stage": setting.zero.stage,
            "dtype": str(setting.dtype).removeprefix("torch."),
            "micro_batch": setting.batch.rows,
            "sequence": setting.batch.sequence,
            "recompute": setting.batch.recompute,
            "accumulation": setting.accumulation,
            "memory_bytes": {
                **asdict(self.memory),
                "states": self.memory.states,
                "total": self.memory.total,
            },
            "sent_bytes": {
                "per_micro_batch": traffic.per_micro_batch.sent_bytes,
                "per_step": traffic.per_step.sent_bytes,
                "by_phase": {phase: sent.sent_bytes for phase, sent in traffic.by_phase.items()},
            },
            "ep": setting.ep if isinstance(setting.ep, int) else list(setting.ep),
            "calls": {phase: sent.calls for phase, sent in traffic.by_phase.items()},
            "volume_psi": round(self.volume, 4),
        }


def inventory_of(
    config: DecoderConfig,
    dtype: torch.dtype = torch.float32,
    *,
    ep: int | tuple[int, ...] = 1,
    rank: int = 0,
) -> Inventory:
    """The decoder's inventory, from a build on the meta device; with ``ep`` above 1 as ``rank`` would hold it."""
    model = build(config, device="meta", dtype=dtype)
    if config.moe is not None:
        keep_own(model, ep, rank)
    return replace(take(model), whole=config.num_parameters(), ep=ep)


def forecast(
    inventory: Inventory,
    setting: Setting,
    config: DecoderConfig | None = None,
    *,
    axes: Mapping[str, int] | None = None,
    optimizer_copies: int = ADAMW_COPIES,
) -> Plan:
    """Plan ``inventory`` under ``setting``; with a decoder's ``config`` activations are counted too.

    The inventory's own dtypes count for what is stored; ``axes`` adds the sizes of axes other than dp. With experts on
    several ranks the inventory must have been taken for the setting's ``ep``, and rank.
    """
    if inventory.ep != setting.ep:
        raise ConfigError(f"the inventory was taken for ep={inventory.ep}, the setting has ep={setting.ep}")
    known = experts.axes(config, setting.ep, setting.ranks)
    units = cut(inventory, setting.zero, {**known, **(axes or {})})
    return Plan(
        setting=setting,
        num_parameters=inventory.num_parameters,
        memory=memory(
            units,
            setting.zero,
            rank=setting.rank,
            accumulation=setting.accumulation,
            no_sync=setting.no_sync,
            optimizer_copies=optimizer_copies,
            activations=NO_ACTIVATIONS
            if config is None
            else activations(config, setting.batch, setting.dtype, experts.degrees(config, setting.ep)),
            module_buffers=inventory.module_buffer_bytes,
        ),
        communication=communication(
            units,
            setting.zero,
            accumulation=setting.accumulation,
            no_sync=setting.no_sync,
            exchange=experts.exchange(config, setting.ep, setting.batch, setting.dtype),
        ),
    )
