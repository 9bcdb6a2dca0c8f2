"""New weights into a loaded model, in place: each tensor goes wherever the program holds something made of it.

No paper. For a trainer that hands its weights to an engine: nothing is built anew, no pointer moves.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from trivium.base.errors import CheckpointError
from trivium.inference.program_builder import Slot
from trivium.inference.weights import LoadedModel
from trivium.kernels.matrix import Matrix, arrange, pack
from trivium.models.families import KNOWN, Part
from trivium.models.families.trivium import TRIVIUM

Weights = Iterable[tuple[str, torch.Tensor]]


def replace_weights(model: LoadedModel, weights: Weights) -> int:
    """Replace what ``weights`` names, as the folder that was loaded names it; returns how many tensors were used.

    Tensors may come in any order and dtype; each is kept only until all that are fused with it have come. Weights not
    named stay; a tied head's second name is skipped.

    Raises:
        CheckpointError: an unknown name, another shape, or whole numbers for floats; a fused weight of which only some
            parts came. What came before it has been replaced, and the message says so.
    """
    ignored = {
        one.head for one in (TRIVIUM, *KNOWN) if model.architecture.tied and one.name == model.architecture.family
    }
    by_stored: dict[str, list[tuple[str, Part]]] = {}
    for name, part in model.parts.items():
        by_stored.setdefault(part.name, []).append((name, part))
    users: dict[str, list[Slot]] = {}
    for slot in model.slots:
        for piece in slot.pieces:
            users.setdefault(piece, []).append(slot)
    arrived: dict[str, torch.Tensor] = {}
    wanted: dict[str, int] = {}
    used = filled = 0
    for stored, tensor in weights:
        if stored in ignored and stored not in by_stored:
            continue
        if stored not in by_stored:
            raise CheckpointError(f"weight {stored!r} is not one of {model.name}'s{_partly(filled)}")
        try:
            for name, part in by_stored[stored]:
                arrived[name] = _cut(stored, tensor, part)
                wanted[name] = len(users.get(name, ()))
                for slot in users.get(name, ()):
                    if all(piece in arrived for piece in slot.pieces):
                        _fill(slot, [arrived[piece] for piece in slot.pieces])
                        filled += 1
                        for piece in slot.pieces:
                            wanted[piece] -= 1
                for piece in [piece for piece, count in wanted.items() if count == 0]:
                    del wanted[piece], arrived[piece]
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_partly(filled)}") from None
        used += 1
    if arrived:
        missing = sorted(
            model.parts[piece].name
            for slot in model.slots
            if any(piece in arrived for piece in slot.pieces)
            for piece in slot.pieces
            if piece not in arrived
        )
        raise CheckpointError(
            f"weights that are kept together came apart: {', '.join(missing[:5])} did not come{_partly(filled)}"
        )
    return used


def _partly(filled: int) -> str:
    return "; some weights have been replaced already: give a whole set before the next request" if filled else ""


def _cut(stored: str, tensor: torch.Tensor, part: Part) -> torch.Tensor:
    shape = part.shape(tuple(tensor.shape))
    if shape is None:
        raise CheckpointError(f"weight {stored!r} has shape {list(tensor.shape)}, which {part} cannot be taken from")
    if not tensor.dtype.is_floating_point:
        raise CheckpointError(f"weight {stored!r} is {str(tensor.dtype).removeprefix('torch.')}, expected floats")
    whole = tensor.detach().to("cpu")
    return part.take(whole if part.expert is None else whole[part.expert])


def _fill(slot: Slot, pieces: list[torch.Tensor]) -> None:
    holds = slot.holds
    made = slot.make(pieces)
    if isinstance(holds, torch.Tensor):
        if made.shape != holds.shape:
            raise CheckpointError(f"{slot.name}: new shape {list(made.shape)}, the model has {list(holds.shape)}")
        holds.copy_(made)
        return
    if tuple(made.shape) != (holds.rows, holds.columns):
        raise CheckpointError(f"{slot.name}: new shape {list(made.shape)}, the model has {[holds.rows, holds.columns]}")
    fresh = arrange(pack(made, holds.format, group=holds.group), holds.layout)
    _copy(holds, fresh, slot.name)


def _copy(holds: Matrix, fresh: Matrix, name: str) -> None:
    pairs = ((holds.data, fresh.data), (holds.scales, fresh.scales), (holds.zeros, fresh.zeros))
    for old, new in pairs:
        if (old is None) != (new is None) or (old is not None and new is not None and old.shape != new.shape):
            raise CheckpointError(
                f"{name}: packed as the checkpoint stored it, new weights cannot be packed alike; load anew"
            )
    for old, new in pairs:
        if old is not None and new is not None:
            old.copy_(new)
