"""Which stored tensor each canonical name is: all of them found, none left over, every shape as the config says.

No paper. Nothing is read here; what does not fit is told in one table, with names and shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trivium.base.errors import CheckpointError
from trivium.inference.source import table
from trivium.models.architecture import Architecture, Moe
from trivium.models.families import Family, Part
from trivium.models.tensors import tensors

_MOST_EXPERTS = 1 << 18
_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,8})\.")
Shapes = Mapping[str, tuple[int, ...]]


def resolve(where: Path, family: Family, model: Architecture, stored: Shapes, spare_layers: int = 0) -> dict[str, Part]:
    """Canonical name → where it lies in ``stored``.

    ``spare_layers``: so many layers behind the last one may be there and are left out (extra prediction heads).

    Raises:
        CheckpointError: tensors are missing, left over or of another shape; the message lists them.
    """
    experts = sum(layer.feed_forward.experts for layer in model.layers if isinstance(layer.feed_forward, Moe))
    if experts > _MOST_EXPERTS:
        raise CheckpointError(f"{where}: config.json tells of {experts} experts in all layers: at most {_MOST_EXPERTS}")
    bare = bool(family.base) and not any(name.startswith(family.base) for name in stored)
    expected = tensors(model)
    found: dict[str, Part] = {}
    missing: list[str] = []
    for name, options in family.parts(model).items():
        if bare:
            options = tuple(replace(part, name=part.name.removeprefix(family.base)) for part in options)
        present = [part for part in options if part.name in stored]
        if present:
            found[name] = present[0]
        else:
            missing.append(f"{options[0].name} {list(expected[name])} ({name})")
    if missing:
        raise table(where, f"{len(missing)} tensors of a {family.name} model are missing", missing)
    wrong = [
        f"{part.name}: stored {list(stored[part.name])}, {name} needs {list(expected[name])}"
        for name, part in found.items()
        if part.shape(stored[part.name]) != expected[name]
    ]
    if wrong:
        raise table(where, f"{len(wrong)} tensors do not have the shape that config.json gives", wrong)
    _check_leftovers(where, family, model, stored, {part.name for part in found.values()}, spare_layers)
    return found


def _check_leftovers(
    where: Path, family: Family, model: Architecture, stored: Shapes, used: set[str], spare_layers: int
) -> None:
    patterns = [re.compile(text) for text in family.dropped]
    count = len(model.layers)
    left = [
        f"{name} {list(shape)}"
        for name, shape in stored.items()
        if name not in used
        and not (model.tied and name == family.head)
        and not any(pattern.fullmatch(name) for pattern in patterns)
        and not count <= _layer(name) < count + spare_layers
    ]
    if left:
        raise table(
            where,
            f"{len(left)} tensors that the {family.name} family does not have, so the model would not be what it was",
            left,
        )


def _layer(name: str) -> int:
    """The number in ``model.layers.N.…``; −1 where there is none."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1
