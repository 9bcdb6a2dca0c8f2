"""One family: how its config becomes an `Architecture`, and where each canonical tensor lies in its checkpoints.

No paper. A name map leads from canonical names (`trivium.models.tensors`) to `Part`s of stored tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from trivium.base.errors import ConfigError
from trivium.models.architecture import Architecture
from trivium.models.families.settings import Settings
from trivium.models.tensors import tensors


@dataclass(frozen=True, kw_only=True)
class Part:
    """A stored tensor, or the part of it that is meant. ``name`` may hold ``{layer}`` and ``{expert}``.

    In this order: ``expert`` picks an entry of the first dimension; ``transposed`` turns [in, out] into [out, in]; the
    first dimension is seen as ``groups`` equal groups, of each of which rows start, start + step, … are taken,
    ``length`` of them (None: to the end).
    """

    name: str
    expert: int | None = None
    transposed: bool = False
    groups: int = 1
    start: int = 0
    length: int | None = None
    step: int = 1

    def shape(self, stored: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of this part of a tensor of shape ``stored``; None when there is no such part."""
        if self.expert is not None:
            if len(stored) < 2 or self.expert >= stored[0]:
                return None
            stored = stored[1:]
        if self.transposed and len(stored) == 2:
            stored = (stored[1], stored[0])
        if not stored or stored[0] % self.groups:
            return None
        rows = len(range(stored[0] // self.groups)[self._rows])
        if self.length is not None and rows != self.length:
            return None
        return (self.groups * rows, *stored[1:])

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This part of ``tensor``, which is the whole, or already the expert's entry when ``expert`` is set."""
        if self.transposed and tensor.dim() == 2:
            tensor = tensor.t()
        whole = self.groups == 1 and self.start == 0 and self.length is None and self.step == 1
        if not whole:
            grouped = tensor.reshape(self.groups, tensor.shape[0] // self.groups, *tensor.shape[1:])
            tensor = grouped[:, self._rows].flatten(0, 1)
        return tensor.contiguous()

    @property
    def _rows(self) -> slice:
        return slice(self.start, None if self.length is None else self.start + self.length * self.step, self.step)


Names = Mapping[str, Part | tuple[Part, ...]]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of checkpoints. ``read`` makes the architecture, ``names`` the map for it.

    The map's keys are canonical names without the layer's and the expert's number and, unless it differs, without the
    last ``.weight`` or ``.bias``; several parts are alternatives, of which a checkpoint has one. ``base`` is a prefix
    that checkpoints saved from the bare model lack, ``bare`` the bare model's class where its name does not follow from
    the other's. ``dropped`` are patterns of stored tensors that carry nothing.
    """

    name: str
    architectures: tuple[str, ...]
    read: Callable[[Settings], Architecture]
    names: Callable[[Architecture], Names]
    base: str = "model."
    bare: str | None = None
    head: str = "lm_head.weight"
    dropped: tuple[str, ...] = (r".*\.rotary_emb\.inv_freq",)

    def parts(self, model: Architecture) -> dict[str, tuple[Part, ...]]:
        """Canonical name → where it lies: alternatives, in order of preference."""
        names = self.names(model)
        return {name: _look_up(names, name) for name in tensors(model)}


def _look_up(names: Names, name: str) -> tuple[Part, ...]:
    layer, expert, key = _numbers(name)
    suffix = ""
    if key not in names:
        key, _, last = key.rpartition(".")
        suffix = f".{last}"
    if key not in names:
        raise ConfigError(f"{name}: this family's checkpoints have no such tensor")
    found = names[key]
    return tuple(
        replace(
            part,
            name=part.name.format(layer=layer, expert=expert) + suffix,
            expert=None if part.expert is None else expert,
        )
        for part in (found if isinstance(found, tuple) else (found,))
    )


def _numbers(name: str) -> tuple[int, int, str]:
    """Layer, expert and the rest of a canonical name."""
    match = re.fullmatch(r"(?:layers\.(\d+)\.)?(experts\.)?(?:(?<=experts\.)(\d+)\.)?(.+)", name)
    if match is None:
        raise ConfigError(f"{name!r} is not a canonical name")
    layer, experts, expert, rest = match.groups()
    return int(layer or 0), int(expert or 0), (experts or "") + rest


def canonical_names(model: Architecture) -> Names:
    """The map of folders that keep canonical names."""
    found: dict[str, Part | tuple[Part, ...]] = {}
    for name in tensors(model):
        _, _, key = _numbers(name)
        at = "layers.{layer}." if name.startswith("layers.") else ""
        inner = key.replace("experts.", "experts.{expert}.", 1) if key.startswith("experts.") else key
        found[key] = Part(name=at + inner)
    return found


def fused(name: str, *lengths: int, groups: int = 1, transposed: bool = False) -> tuple[Part, ...]:
    """Consecutive parts, of these ``lengths``, of each group of rows of one stored tensor."""
    parts, start = [], 0
    for length in lengths:
        parts.append(Part(name=name, groups=groups, start=start, length=length, transposed=transposed))
        start += length
    return tuple(parts)
