"""Which of a teacher's layers a shallower student begins as: pure numbers.

DeepSpeed-MoE section 4.2: the student has the same architecture, fewer layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig


def pair_layers(teacher: DecoderConfig, student: DecoderConfig, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The teacher's layer for each of the student's, ascending: ``layers`` if given, else spread evenly.

    Evenly among those that fit: a layer begins as one with as many experts (0: a dense one). Raises ConfigError when
    the shapes differ in more than depth and experts, or no layers fit.
    """
    for key, theirs, ours in _widths(teacher, student):
        if theirs != ours:
            raise ConfigError(
                f"the teacher has {key}={theirs}, the student {ours}: its layers cannot begin as the teacher's; make "
                "them equal or set distill.init = 'fresh'"
            )
    given, wanted = teacher.num_experts, student.num_experts
    if layers is not None:
        return _checked(layers, given, wanted)
    found = _spread(given, wanted)
    if found is None:
        raise ConfigError(
            f"the student's layers have {list(wanted)} experts (0: dense), the teacher's {list(given)}: no ascending "
            "choice of the teacher's layers fits; change model.moe or set distill.init = 'fresh'"
        )
    return found


def _widths(teacher: DecoderConfig, student: DecoderConfig) -> list[tuple[str, object, object]]:
    keys = ("dim", "heads", "kv_head_count", "head_size", "ffn_dim", "tied", "rope_theta")
    pairs: list[tuple[str, object, object]] = [(key, getattr(teacher, key), getattr(student, key)) for key in keys]
    if teacher.moe is not None and student.moe is not None:
        pairs.append(("moe.ffn_dim", teacher.expert_dim, student.expert_dim))
        pairs += [
            (f"moe.{key}", getattr(teacher.moe, key), getattr(student.moe, key))
            for key in ("expert", "residual", "shared")
        ]
        pairs += [
            (f"moe.gate.{key}", getattr(teacher.moe.gate, key), getattr(student.moe.gate, key))
            for key in ("score", "scale", "num_groups", "top_groups")  # what its weights mean
        ]
        theirs, own = (moe.gate.renormalizes(moe.top_k) for moe in (teacher.moe, student.moe))
        pairs.append(("moe.gate.renormalize", theirs, own))
    return pairs


def _checked(layers: Sequence[int], given: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...]:
    if len(layers) != len(wanted) or any(not 0 <= layer < len(given) for layer in layers):
        raise ConfigError(
            f"distill.layers={list(layers)}: expected one of the teacher's layers 0 to {len(given) - 1} for each of "
            f"the student's {len(wanted)}"
        )
    for place, layer in enumerate(layers):
        if given[layer] != wanted[place]:
            raise ConfigError(
                f"distill.layers: layer {place} of the student has {wanted[place]} experts, layer {layer} of the "
                f"teacher {given[layer]}"
            )
    return tuple(layers)


def _spread(given: Sequence[int], wanted: Sequence[int]) -> tuple[int, ...] | None:
    """The ascending choice that lies nearest to even spacing, first to first and last to last; None: there is none."""
    scale = (len(given) - 1) / max(1, len(wanted) - 1)
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for place, experts in enumerate(wanted):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer, theirs in enumerate(given):
            if theirs != experts:
                continue
            before = [found for last, found in best.items() if last < layer]
            if before:
                cost, chosen = min(before)
                following[layer] = (cost + abs(layer - place * scale), (*chosen, layer))
        best = following
    return min(best.values())[1] if best else None
