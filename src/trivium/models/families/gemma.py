"""gemma2 and gemma3's text model: norms around both branches, soft caps, windows in most layers, a scaled embedding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Rope
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings, windows


def _model(
    name: str, settings: Settings, attend: Attention, ropes: tuple[Rope, Rope], each: list[int | None], positions: int
) -> Architecture:
    """``ropes``: of layers with a window, of the others."""
    settings.fixed("use_bidirectional_attention", False)
    norm = llama.rms(settings, offset=1.0)
    activation = settings.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh")
    layers = tuple(
        Layer(
            attention=replace(attend, window=window, rope=ropes[window is None]),
            feed_forward=Mlp(ffn_dim=settings.whole("intermediate_size"), activation=activation),
            attention_norm=norm,
            attention_out_norm=norm,
            mlp_norm=norm,
            mlp_out_norm=norm,
        )
        for window in each
    )
    whole = llama.model(name, settings, layers, norm, positions=positions, tied=True)
    cap = settings.number_or_none("final_logit_softcapping")
    return replace(whole, embed_scale=float(whole.dim) ** 0.5, head_softcap=cap)


def _attention(settings: Settings, cap: float | None) -> Attention:
    scalar = settings.number("query_pre_attn_scalar", default=256.0)
    bias = settings.flag("attention_bias", False)
    attend = llama.attention(settings, rope=None, bias=bias, head_dim=256)
    return replace(attend, scale=scalar**-0.5, softcap=cap)


def _read2(settings: Settings) -> Architecture:
    positions, count = llama.max_positions(settings, 8192), settings.layers("num_hidden_layers")
    attend = _attention(settings, _cap(settings, "attn_logit_softcapping", 50.0))
    rope = read_rope(settings, attend.head_dim, positions)
    window = settings.whole("sliding_window", default=4096)
    each = windows(settings, count, window, [i % 2 == 0 for i in range(count)])
    whole = _model("gemma2", settings, attend, (rope, rope), each, positions)
    return replace(whole, head_softcap=_cap(settings, "final_logit_softcapping", 30.0))


def _cap(settings: Settings, key: str, default: float) -> float | None:
    """A cap that null turns off, while absence means ``default``."""
    return settings.number_or_none(key) if key in settings.values else default


def _read3(settings: Settings) -> Architecture:
    positions, count = llama.max_positions(settings, 131072), settings.layers("num_hidden_layers")
    norm = llama.rms(settings, offset=1.0)
    attend = _attention(settings, settings.number_or_none("attn_logit_softcapping"))
    attend = replace(attend, q_norm=norm, k_norm=norm)
    pattern = settings.whole("sliding_window_pattern", "_sliding_window_pattern", default=6)
    window = settings.whole("sliding_window", default=4096)
    each = windows(settings, count, window, [bool((i + 1) % pattern) for i in range(count)])
    width = attend.head_dim
    local: dict[str, Any] = {"rope_theta": settings.number("rope_local_base_freq", default=10000.0)}
    nested = settings.part("rope_parameters")
    if nested is not None and nested.get("sliding_attention") is not None:
        local = {**local, "rope_parameters": nested.values}
    ropes = (
        read_rope(Settings(local, settings.what), width, positions, layer_type="sliding_attention"),
        read_rope(settings, width, positions, theta=1e6, layer_type="full_attention"),
    )
    return _model("gemma3_text", settings, attend, ropes, each, positions)


def _names(model: Architecture) -> Names:
    layer = "model.layers.{layer}."
    return {
        **llama.NAMES,
        "attention_out_norm": Part(name=layer + "post_attention_layernorm"),
        "mlp_norm": Part(name=layer + "pre_feedforward_layernorm"),
        "mlp_out_norm": Part(name=layer + "post_feedforward_layernorm"),
    }


GEMMA2 = Family(name="gemma2", architectures=("Gemma2ForCausalLM",), read=_read2, names=_names)
GEMMA3 = Family(
    name="gemma3_text", architectures=("Gemma3ForCausalLM",), read=_read3, names=_names, bare="Gemma3TextModel"
)
