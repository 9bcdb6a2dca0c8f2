"""Experts in a forecast: which of them one rank holds, and the rows that a step exchanges for them.

DeepSpeed-MoE sections 4.1 (degrees per layer) and 5.3 (all-to-all); placed by the runtime's own `owners`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from trivium.base.errors import ConfigError
from trivium.dist.exchange import ExchangeConfig
from trivium.dist.shard import Placement
from trivium.models import Decoder, DecoderConfig, MoEBlock
from trivium.models.decoder import expert_degrees
from trivium.moe.dispatch import owners
from trivium.plan.activations import Batch
from trivium.plan.traffic import Traffic

STATUS_NUMBERS = 3
_INTEGER_BYTES = 8


def axis_of(degree: int) -> str:
    """The axis of the ranks that hold the same experts as this one, where ``degree`` neighbours share them all."""
    return "dp" if degree == 1 else f"edp of ep {degree}"


def axes(config: DecoderConfig | None, ep: int | Sequence[int], ranks: int) -> dict[str, int]:
    """Axis → ranks on it, of dp and of every degree in use. Raises ConfigError for a degree that does not divide."""
    found = {"dp": ranks}
    for degree in set(degrees(config, ep)) - {1}:
        if ranks % degree:
            raise ConfigError(f"ep={degree} does not divide {ranks} ranks")
        found[axis_of(degree)] = ranks // degree
    return found


def degrees(config: DecoderConfig | None, ep: int | Sequence[int]) -> tuple[int, ...]:
    """The degree of each layer that has experts."""
    if config is None:
        return ()
    return tuple(degree or 1 for degree in expert_degrees(config, ep))


def keep_own(model: Decoder, ep: int | Sequence[int], rank: int) -> None:
    """Leave in ``model``, which is on the meta device, the experts that ``rank`` would hold."""
    blocks = [block for block in model.blocks if isinstance(block, MoEBlock)]
    for block, degree in zip(blocks, degrees(model.config, ep), strict=True):
        layer = block.moe
        if layer.num_experts < degree:
            raise ConfigError(
                f"ep={degree} for {layer.num_experts} experts: some ranks would hold none; at most {layer.num_experts}"
            )
        mine = owners(layer.num_experts, degree)[rank % degree]
        for number in layer.experts.numbers:
            if number not in mine:
                del layer.experts._modules[str(number)]
        layer.experts.numbers = tuple(mine)
        layer.experts.placement = Placement(axis=axis_of(degree))


def exchange(
    config: DecoderConfig | None, ep: int | Sequence[int], batch: Batch, dtype: torch.dtype
) -> Mapping[str, Traffic]:
    """What one rank sends for one micro-batch, under the ledger's names of the phases, by the config's all-to-all.

    If its tokens choose experts evenly and none are dropped: of T · top_k rows (ep - 1) / ep go elsewhere, and come
    back, in forward and again in backward; recomputation repeats the forward. A hierarchy of nodes of G ranks sends
    (G - 1) / G of them inside, then (ep / G - 1) / (ep / G) across. The counts that the ranks agree on before are
    exact, the rows an expectation. Without ``moe.exchange.node`` all ranks are taken to be on one host.
    """
    counts = way = Traffic()
    if config is not None and config.moe is not None:
        experts = [count for count in config.num_experts if count]
        row_bytes, rows = config.dim * dtype.itemsize, batch.tokens * config.moe.top_k
        for number, degree in zip(experts, degrees(config, ep), strict=True):
            node = config.moe.node_of(degree)
            integers = (STATUS_NUMBERS + number) * _INTEGER_BYTES
            for ranks, told in ((node, 1), (degree // node, node)):
                if ranks > 1:
                    counts += Traffic(sent_bytes=(ranks - 1) * told * integers, calls=1)
            if _is_flat(config.moe.exchange, degree, rows * row_bytes):
                node = 1
            for ranks in (node, degree // node):
                if ranks > 1:
                    way += Traffic(sent_bytes=round(rows * (ranks - 1) / ranks) * row_bytes, calls=1)
    if not way.calls:
        return {}
    again = 2 if batch.recompute else 1
    return {
        "dispatch.counts": counts.times(again),
        "dispatch": way.times(again),
        "combine": way.times(again),
        "dispatch.backward": way,
        "combine.backward": way,
    }


def _is_flat(config: ExchangeConfig, degree: int, sent_bytes: int) -> bool:
    """Whether `auto` takes messages of this size straight, where it has the choice."""
    return config.kind == "auto" and (config.crossover_bytes is None or sent_bytes / degree >= config.crossover_bytes)
