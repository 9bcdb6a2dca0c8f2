"""What a foreign config says of rotary positions, old keys and new: one `Rope`, or an error that names the kind."""

from __future__ import annotations

import math
from typing import Literal

from trivium.base.errors import ConfigError
from trivium.models.architecture import Rope
from trivium.models.families.settings import Settings

_KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def read_rope(
    settings: Settings,
    head_dim: int,
    positions: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    interleaved: bool = False,
    first: int = 0,
    kinds: tuple[str, ...] = _KINDS,
    renamed: tuple[tuple[str, str], ...] = (),
    layer_type: str | None = None,
) -> Rope:
    """The rotary positions of heads of ``head_dim``.

    ``theta`` and ``partial`` are what absence means; ``partial`` None: this family turns whole heads. ``renamed`` pairs
    old names of a kind with new ones. ``layer_type`` picks one of several under ``rope_parameters``.
    """
    inner = settings.part("rope_parameters")
    if inner is not None and layer_type is not None and inner.get(layer_type) is not None:
        inner = inner.part(layer_type)
    inner = inner or settings.part("rope_scaling") or Settings({}, settings.what)
    base = inner.get("rope_theta")
    base = (
        settings.number("rope_theta", "rotary_emb_base", default=theta) if base is None else inner.number("rope_theta")
    )
    dim = _turned(settings, inner, head_dim, partial)
    kind = dict(renamed).get(str(inner.get("rope_type", "type")), inner.get("rope_type", "type")) or "default"
    if kind not in kinds or inner.get("mrope_section") is not None:
        found = "mrope_section" if kind in kinds else kind
        raise ConfigError(f"rope_type={found!r} in the config of {settings.what}: Trivium computes {', '.join(kinds)}")
    plain = Rope(dim=dim, theta=base, positions=positions, interleaved=interleaved, first=first)
    return plain if kind == "default" else _scaled(plain, kind, settings, inner)


def _turned(settings: Settings, inner: Settings, head_dim: int, partial: float | None) -> int:
    share = inner.number_or_none("partial_rotary_factor") or settings.number_or_none(
        "partial_rotary_factor", "rotary_pct"
    )
    if partial is None and share not in (None, 1.0):
        raise settings.wrong("partial_rotary_factor", share, "1.0: this family turns whole heads")
    dim = int(head_dim * (share or partial or 1.0))
    if dim % 2 or not 2 <= dim <= head_dim:
        raise settings.wrong("head_dim", head_dim, f"an even number of turned columns in each head, not {dim}")
    return dim


def _scaled(plain: Rope, kind: Literal["linear"] | str, settings: Settings, inner: Settings) -> Rope:
    values = dict(vars(plain), kind=kind)
    told = settings.whole_or_none("original_max_position_embeddings")
    original = told or inner.whole("original_max_position_embeddings", default=plain.positions)
    if kind in ("linear", "dynamic", "llama3"):
        values["factor"] = inner.number("factor")
    if kind == "dynamic" and plain.dim <= 2:
        raise settings.wrong("head_dim", plain.dim, "more than 2 turned columns for dynamic scaling")
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if not low < high:
            raise inner.wrong("high_freq_factor", high, f"more than low_freq_factor={low}")
        values.update(original_positions=original, low_freq_factor=low, high_freq_factor=high)
    if kind in ("yarn", "longrope"):
        factor = inner.number_or_none("factor") or plain.positions / original
        values.update(original_positions=original, factor=factor)
    if kind == "yarn":
        values.update(
            attention_factor=_yarn_attention(inner, values["factor"]),
            beta_fast=inner.number("beta_fast", default=32.0),
            beta_slow=inner.number("beta_slow", default=1.0),
            truncate=inner.flag("truncate", True),
        )
    if kind == "longrope":
        told_factor = inner.number_or_none("attention_factor")
        grown = math.sqrt(1 + math.log(values["factor"]) / math.log(original)) if values["factor"] > 1 else 1.0
        values.update(
            attention_factor=grown if told_factor is None else told_factor,
            short_factors=inner.numbers("short_factor", plain.dim // 2),
            long_factors=inner.numbers("long_factor", plain.dim // 2),
        )
    return Rope(**values)


def _yarn_attention(inner: Settings, factor: float) -> float:
    told = inner.number_or_none("attention_factor")
    if told is not None:
        return told
    scale, all_dim = inner.get("mscale"), inner.get("mscale_all_dim")
    if scale and all_dim:
        return yarn_scale(factor, inner.number("mscale")) / yarn_scale(factor, inner.number("mscale_all_dim"))
    return yarn_scale(factor)


def yarn_scale(factor: float, by: float = 1.0) -> float:
    """By how much yarn raises the attention's temperature for a context ``factor`` times as long."""
    return 1.0 if factor <= 1 else 0.1 * by * math.log(factor) + 1.0
