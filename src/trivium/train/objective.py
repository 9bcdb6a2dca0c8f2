"""What a step makes small: a loss is handed to the loop as an objective. Here the language model's own.

DeepSpeed-MoE section 3.1: the experts' auxiliary losses are part of it; distilling (section 4.2) is another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trivium.models import Decoder, MoEBlock, Record
from trivium.moe import Aux, Routing
from trivium.train.data import Batch


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One micro-batch's sums over the tokens that carry loss. ``total`` is differentiated; the rest is told.

    ``extras`` are what `Objective.names` names, in that order: parts of ``total`` beside the cross-entropy.
    """

    total: torch.Tensor
    cross_entropy: torch.Tensor
    extras: tuple[torch.Tensor, ...] = ()
    aux: Mapping[int, Aux] = field(default_factory=dict)


class Objective(Protocol):
    """A loss for one micro-batch. Every rank calls it equally often; it may be a collective."""

    def names(self) -> tuple[str, ...]:
        """Names of the extras, the same until the next step."""

    def __call__(self, batch: Batch) -> Measured:
        """The loss of ``batch``."""

    def after_step(self, done: int) -> dict[str, Any] | None:
        """Called after each step, ``done`` in all; what it returns becomes a row of metrics."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, JSON-like."""


class LanguageModel:
    """Cross-entropy of the next token, and in training the auxiliary losses of layers with experts."""

    def __init__(self, model: Decoder, *, recompute: bool = False) -> None:
        self.model, self.recompute = model, recompute

    def names(self) -> tuple[str, ...]:
        """``aux_loss`` where there are experts: their auxiliary losses per token."""
        return ("aux_loss",) if self.model.config.moe is not None else ()

    def __call__(self, batch: Batch) -> Measured:
        """One forward; see `Decoder.forward`."""
        record = Record()
        total: torch.Tensor = self.model(
            batch.tokens, batch.targets, reduction="sum", record=record, **settings(batch, self.recompute)
        )
        cross_entropy = total if record.cross_entropy is None else record.cross_entropy
        extras = (total.detach() - cross_entropy.detach(),) if self.names() else ()
        return Measured(total=total, cross_entropy=cross_entropy.detach(), extras=extras, aux=record.aux)

    def after_step(self, done: int) -> dict[str, Any] | None:
        """Nothing to do."""
        return None

    def state(self) -> dict[str, Any]:
        """Nothing to keep."""
        return {}


def settings(batch: Batch, recompute: bool) -> dict[str, Any]:
    """Keywords of `Decoder.forward` for a packed batch; its number keys the gates' random choices."""
    alone = bool((batch.documents == batch.documents[:, :1]).all())
    return {
        "positions_BT": batch.positions,
        "documents_BT": None if alone else batch.documents,
        "run_block": recomputed if recompute and torch.is_grad_enabled() else None,
        "step": batch.number,
    }


def recomputed(block: nn.Module, *arguments: Any) -> Any:
    """Run a block and keep only its input; backward runs it again, with the routing that the first run chose."""
    run: Callable[..., Any] = block
    if isinstance(block, MoEBlock):
        run = _Replayed(block)
    return checkpoint(run, *arguments, use_reentrant=False)


class _Replayed:
    """Calls a block with experts; from the second call on with the first one's routing."""

    def __init__(self, block: MoEBlock) -> None:
        self._block = block
        self._routing: Routing | None = None

    def __call__(self, x_BTC: torch.Tensor, rotary: Any, attend: Any, routing: Any, step: Any) -> Any:
        """As the block."""
        out: tuple[torch.Tensor, Aux] = self._block(x_BTC, rotary, attend, self._routing or routing, step)
        self._routing = out[1].routing.detach()
        return out
