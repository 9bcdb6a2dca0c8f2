"""Which slice of which logical tensor this rank holds: the vocabulary between `zero`, `moe` and `checkpoint`.

ZeRO section 5 (partitioned states) names the slices; this file only describes them, it moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from trivium.base.errors import ConfigError

_ATTRIBUTE = "shard_map"


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Declared by a module as its attribute ``placement``: the mesh axis its parameters' gradients are reduced over.

    ``axis`` is ``"dp"`` for ordinary modules and the expert-data axis for experts. ``apart`` names another axis whose
    ranks hold different ones too (a coordinated exchange's ``"tp"``): neither `zero` nor `checkpoint` reaches those.
    """

    axis: str = "dp"
    apart: str | None = None


def require_together(model: nn.Module, doing: str) -> None:
    """Raise ConfigError where a placement inside ``model`` is ``apart``: data-parallel ranks do not hold all of it."""
    for name, module in model.named_modules():
        found = module.__dict__.get("placement")
        if isinstance(found, Placement) and found.apart is not None:
            raise ConfigError(
                f"{doing}: {name or type(module).__name__} is spread over the {found.apart} axis "
                f"(exchange='coordinated'), and the ranks of one data-parallel group hold only a part of it; build the "
                "layer with exchange='flat' or 'hierarchical', which spread experts over ep alone"
            )


@dataclass(kw_only=True)
class Piece:
    """A contiguous range of one logical tensor, flattened: elements ``[start, start + tensor.numel())``.

    ``tensor`` is 1-D (element cut) or has the parameter's own shape (whole-parameter cut), live: writing to it
    changes the training state.
    It has the dtype of the most precise copy (the fp32 master where there is one) and is the very key under
    which the optimizer keeps this range's state.
    """

    start: int
    tensor: torch.Tensor


@dataclass(kw_only=True)
class Entry:
    """One logical parameter as this rank sees it.

    ``names`` are all its fully qualified names (tied parameters have several, the first is canonical); ``dtype`` is
    the dtype that the module computes with; ``piece`` is what this rank owns (None: nothing of it); ``writes`` is
    False on
    the ranks whose piece is a replica that another rank writes.
    """

    names: tuple[str, ...]
    shape: torch.Size
    dtype: torch.dtype
    piece: Piece | None
    writes: bool = True

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.names[0]


@dataclass(kw_only=True)
class ShardMap:
    """All parameters of a sharded module on this rank, in the order of ``named_parameters``.

    ``publish`` must be called on every rank after pieces were written from outside: it brings all
    copies (16-bit parameters, replicated parameters, gathered units) up to the pieces.
    """

    entries: dict[str, Entry]
    publish: Callable[[], None]


def attach_shard_map(module: nn.Module, shard_map: ShardMap) -> None:
    """Declare ``shard_map`` on ``module``; done once by `zero.shard`."""
    object.__setattr__(module, _ATTRIBUTE, shard_map)


def shard_map_of(module: nn.Module) -> ShardMap | None:
    """The map that `zero.shard` attached to ``module``, or None for a module that is not sharded."""
    found = module.__dict__.get(_ATTRIBUTE)
    return found if isinstance(found, ShardMap) else None


def whole_map(module: nn.Module, *, writes: bool = True) -> ShardMap:
    """The map of a module that nobody sharded: every parameter whole on this rank, its piece the parameter itself."""
    entries: dict[str, Entry] = {}
    seen: dict[int, Entry] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        known = seen.get(id(parameter))
        if known is not None:
            known.names = (*known.names, name)
            continue
        entry = Entry(
            names=(name,),
            shape=parameter.shape,
            dtype=parameter.dtype,
            piece=Piece(start=0, tensor=parameter),
            writes=writes,
        )
        seen[id(parameter)] = entry
        entries[name] = entry
    return ShardMap(entries=entries, publish=lambda: None)
