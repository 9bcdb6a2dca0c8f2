"""The optimizer over this rank's segments: the user's own torch optimizer, stepped unit by unit.

ZeRO section 5.1 (P_os): each rank updates its partition, then parameters are gathered where they are replicated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trivium.base.errors import ConfigError
from trivium.dist.comm import Handle
from trivium.zero.conductor import Meeting
from trivium.zero.engine import Engine
from trivium.zero.flat import Flat
from trivium.zero.norm import order_free_norm
from trivium.zero.placement import Cut

_CUTS: Mapping[str, Cut] = MappingProxyType(
    {
        **dict.fromkeys(
            ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "ASGD", "Adadelta", "Adagrad", "RMSprop", "Rprop"),
            "element",
        ),
        **dict.fromkeys(("Muon", "Adafactor"), "parameter"),
    }
)
_REFUSED = MappingProxyType(
    {
        "LBFGS": "it looks at all parameters at once and re-evaluates the loss",
        "SparseAdam": "it needs sparse gradients, which are not reduced here",
    }
)


def cut_of(optimizer: Optimizer, elementwise: bool) -> Cut:
    """How parameters may be cut for ``optimizer``: by element, or only whole. Raises ConfigError for one that cannot
    be."""
    kind = type(optimizer)
    known = f"{kind.__module__}.".startswith("torch.optim.")
    if known and kind.__name__ in _REFUSED:
        raise ConfigError(f"torch.optim.{kind.__name__} cannot be sharded: {_REFUSED[kind.__name__]}")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ConfigError(f"{kind.__name__}(differentiable=True) cannot be sharded: its step is part of the graph")
    if known and kind.__name__ in _CUTS:
        return _CUTS[kind.__name__]
    if elementwise:
        return "element"
    raise ConfigError(
        f"{kind.__module__}.{kind.__name__} is not known to update each element on its own: pass elementwise=True "
        f"to shard if it does; known are {', '.join(sorted(_CUTS))}"
    )


class ZeroOptimizer(Optimizer):
    """The user's optimizer over sharded parameters. ``param_groups`` holds the user's own dict objects.

    ``group["params"]`` are this rank's segments; after backward their ``.grad`` is the reduced gradient. ``step``,
    ``zero_grad`` and
    ``clip_grad_norm_`` must be called on every rank.
    """

    def __init__(self, inner: Optimizer, number: int, engine: Engine) -> None:
        self._inner, self._engine = inner, engine
        self._adding = False
        super().__init__(inner.param_groups, inner.defaults)
        self._adding, self._counted = True, False
        self.state = inner.state
        self._flats = tuple(flat for flat in engine.trainable if flat.optimizer == number)
        self._chunks = _chunk(self._flats, engine.config.bucket_bytes)

    @property
    def num_skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite."""
        return self._engine.scale.num_skipped_steps

    @property
    def loss_scale(self) -> float:
        """The present factor on the loss (1 unless parameters are fp16)."""
        return self._engine.scale.value

    @property
    def finite(self) -> bool:
        """Whether all gradients since the last ``zero_grad`` were finite, on every rank."""
        return self._engine.finite

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible after sharding; raises ConfigError."""
        if self._adding:
            raise ConfigError("parameters cannot be added after shard: add the group to the optimizer before")
        self.param_groups.append(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; ``set_to_none=False`` is the same, since absent gradients are skipped."""
        orphans = [flat for flat in self._engine.trainable if flat.optimizer is None]
        self._engine.zero_grad([*self._flats, *orphans])

    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale gradients so that their norm over all ranks is at most ``max_norm``; returns the norm before (fp64,
        0-dim).

        The norm has the same bits for the same gradient at every stage and number of ranks.
        """
        return clip_grad_norm_([self], max_norm)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update this rank's segments, then bring the parameters up to date everywhere. Skipped when a gradient is
        not finite. Raises ConfigError inside `gathered`, whose values would replace what the step wrote."""
        loss: float | None = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        engine = self._engine
        if any(unit.pins for unit in engine.units):
            raise ConfigError(
                "optimizer.step() inside `with trivium.zero.gathered(…):`, whose values are kept at its end and would "
                "replace what the step wrote: leave the block first"
            )
        engine.come_to(Meeting.STEP)
        finite = engine.finite
        if finite:
            engine.release(keep=False)
            self._step()
        engine.after_step(finite=finite)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state, as the inner optimizer gives it, with the loss scale."""
        return {**self._inner.state_dict(), "loss_scale": self._engine.scale.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave on this rank. For other stages or numbers of ranks use
        ``trivium.checkpoint``."""
        state = dict(state_dict)
        scale = state.pop("loss_scale", None)
        self._inner.load_state_dict(state)
        self.param_groups, self.state = self._inner.param_groups, self._inner.state
        if scale is not None:
            self._engine.scale.load_state_dict(scale)

    def _step(self) -> None:
        groups = self._inner.param_groups
        everything = [group["params"] for group in groups]
        handles: list[Handle] = []
        try:
            for chunk in self._chunks:
                mine = {id(segment) for flat in chunk for segment in flat.segments if segment is not None}
                for group, params in zip(groups, everything, strict=True):
                    group["params"] = [param for param in params if id(param) in mine]
                scale = self._engine.scale_in_use
                restore = [_widen(flat, scale) for flat in chunk if flat.low_precision or scale != 1.0]
                self._inner.step()
                for put_back in restore:
                    put_back()
                handles += [handle for flat in chunk if (handle := flat.start_publish()) is not None]
        finally:
            for group, params in zip(groups, everything, strict=True):
                group["params"] = params
        for handle in handles:
            handle.wait()
        if not self._counted:
            self._counted = True
            self._engine.meter.add(
                "optimizer",
                sum(
                    value.numel() * value.element_size()
                    for state in self._inner.state.values()
                    for value in state.values()
                    if isinstance(value, torch.Tensor) and value.dim() > 0
                ),
            )


@torch.no_grad()
def clip_grad_norm_(optimizers: Sequence[ZeroOptimizer], max_norm: float) -> torch.Tensor:
    """Clip several optimizers of one model together, by the norm over all their parameters. Returns it (fp64,
    0-dim)."""
    engine = optimizers[0]._engine
    engine.come_to(Meeting.CLIP)
    flats = [flat for optimizer in optimizers for flat in optimizer._flats]
    norm = order_free_norm(engine.used_parts(flats), engine.control) / engine.scale_in_use
    factor = max_norm / (norm + 1e-6)
    if factor < 1.0:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for segment in group["params"]:
                    if segment.grad is not None:
                        segment.grad.mul_(factor)
    return torch.tensor(norm, dtype=torch.float64)


def take_segments(inner: Optimizer, flats: Iterable[Flat], old: dict[int, nn.Parameter]) -> None:
    """Put this rank's segments where ``inner`` holds whole parameters: in its groups and as keys of its state.

    ``old`` maps ``id`` of a parameter now in a flat to the object the optimizer was built with (another one only for
    meta parameters).
    """
    place = {id(old.get(id(param), param)): (flat, index) for flat in flats for index, param in enumerate(flat.params)}
    for group in inner.param_groups:
        kept = []
        for param in group["params"]:
            if id(param) not in place:
                raise ConfigError(
                    f"the optimizer holds a parameter of shape {tuple(param.shape)} that is not in the model"
                )
            flat, index = place[id(param)]
            segment = flat.segments[index]
            state = inner.state.pop(param, None)
            if segment is None:
                continue
            kept.append(segment)
            if state:
                inner.state[segment] = {key: _cut_state(value, flat, index) for key, value in state.items()}
        group["params"] = kept


def _cut_state(value: Any, flat: Flat, index: int) -> Any:
    """This rank's part of one state value that was kept for a whole parameter."""
    if not isinstance(value, torch.Tensor) or value.shape != flat.shapes[index] or value.dim() == 0:
        return value
    if value.is_meta:
        raise ConfigError(
            f"the optimizer keeps state for {flat.names[index]} on the meta device: build it from real parameters"
        )
    segment = flat.segments[index]
    overlap = flat.layout.overlap(index, flat.comm.rank)
    if segment is None or overlap is None or not flat.row.optimizer:
        return value.reshape(-1).clone() if not flat.whole_parameters else value.clone()
    return value.reshape(-1)[overlap.start : overlap.start + overlap.length].clone().view(segment.shape)


def _widen(flat: Flat, scale: float) -> Callable[[], None]:
    """Let segments see their gradients in their own dtype, unscaled, for one step; returns what undoes it."""
    kept: list[tuple[nn.Parameter, torch.Tensor]] = []
    for segment in flat.segments:
        if segment is not None and segment.grad is not None:
            narrow = segment.grad
            kept.append((segment, narrow))
            segment.grad = None
            segment.grad_dtype = segment.dtype
            wide = narrow.to(segment.dtype)
            segment.grad = wide / scale if scale != 1.0 else wide

    def put_back() -> None:
        for segment, narrow in kept:
            segment.grad = None
            segment.grad_dtype = narrow.dtype
            segment.grad = narrow

    return put_back


def _chunk(flats: Sequence[Flat], bucket_bytes: int) -> list[list[Flat]]:
    """Flats that are stepped together: all at once where nothing is sent or cast afterwards, else about a bucket at a
    time."""
    if not any(flat.low_precision or (flat.row.optimizer and not flat.row.parameter) for flat in flats):
        return [list(flats)] if flats else []
    chunks: list[list[Flat]] = []
    size = bucket_bytes
    for flat in flats:
        if size >= bucket_bytes:
            chunks.append([])
            size = 0
        chunks[-1].append(flat)
        size += flat.whole_bytes
    return chunks
