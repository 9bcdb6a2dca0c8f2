"""olmo2 and olmoe: queries and keys normed over all heads at once; olmo2 norms what its branches put out."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Attention, Layer, Moe, Norm
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.mixtral import top_k
from trivium.models.families.qwen import experts_of
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings

_LAYER = "model.layers.{layer}."


def _attention(settings: Settings, positions: int, norm: Norm) -> Attention:
    rope = read_rope(settings, llama.heads(settings)[2], positions)
    attend = llama.attention(settings, rope=rope, bias=settings.flag("attention_bias", False))
    return replace(attend, q_norm=norm, k_norm=norm, qk_norm="all")


def _read2(settings: Settings) -> Architecture:
    positions, norm = llama.max_positions(settings), llama.rms(settings, 1e-5)
    layer = Layer(
        attention=_attention(settings, positions, norm),
        feed_forward=llama.mlp(settings),
        attention_out_norm=norm,
        mlp_out_norm=norm,
    )
    layers = (layer,) * settings.layers("num_hidden_layers")
    return llama.model("olmo2", settings, layers, norm, positions=positions)


def _read_moe(settings: Settings) -> Architecture:
    positions, norm = llama.max_positions(settings, 4096), llama.rms(settings, 1e-5)
    attend = replace(_attention(settings, positions, norm), clip=settings.number_or_none("clip_qkv"))
    experts = settings.whole("num_experts", "num_local_experts", default=64)
    moe = Moe(
        experts=experts,
        top_k=top_k(settings, experts, 8),
        ffn_dim=settings.whole("intermediate_size"),
        activation=settings.activation("hidden_act", default="silu"),
        renormalise=settings.flag("norm_topk_prob", False),
    )
    return llama.model("olmoe", settings, llama.stack(settings, attend, moe, norm, None), norm, positions=positions)


def _names2(model: Architecture) -> Names:
    return {
        **llama.NAMES,
        "attention_out_norm": Part(name=_LAYER + "post_attention_layernorm"),
        "mlp_out_norm": Part(name=_LAYER + "post_feedforward_layernorm"),
    }


def _names_moe(model: Architecture) -> Names:
    at = _LAYER + "mlp"
    experts = experts_of(at, model.layers[0].feed_forward.ffn_dim)
    return {**llama.NAMES, "router": Part(name=at + ".gate"), **experts}


OLMO2 = Family(name="olmo2", architectures=("Olmo2ForCausalLM",), read=_read2, names=_names2)
OLMOE = Family(name="olmoe", architectures=("OlmoeForCausalLM",), read=_read_moe, names=_names_moe)
