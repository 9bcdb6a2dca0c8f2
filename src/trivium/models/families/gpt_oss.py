"""gpt_oss: experts with biases and a clamped activation, a learned sink in every head, windows in every other layer."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Layer, Moe
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.mixtral import top_k
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings, windows

_MLP = "model.layers.{layer}.mlp."
_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(settings: Settings) -> Architecture:
    settings.fixed("swiglu_alpha", 1.702)
    if settings.get("rope_parameters", "rope_scaling") is None:
        settings = Settings({**settings.values, "rope_parameters": _YARN}, settings.what)
    positions, norm = llama.max_positions(settings, 131072), llama.rms(settings, 1e-5)
    count = settings.layers("num_hidden_layers")
    rope = read_rope(settings, llama.heads(settings, 64)[2], positions, theta=150000.0)
    bias = settings.flag("attention_bias", True)
    attend = replace(llama.attention(settings, rope=rope, bias=bias, head_dim=64), sinks=True)
    window = settings.whole("sliding_window", default=128)
    each = windows(settings, count, window, [i % 2 == 0 for i in range(count)])
    experts = settings.whole("num_local_experts", "num_experts", default=128)
    moe = Moe(
        experts=experts,
        top_k=top_k(settings, experts, 4),
        ffn_dim=settings.whole("intermediate_size"),
        activation=settings.activation("hidden_act", default="silu"),
        bias=True,
        router_bias=True,
        scores="chosen",
        clamp=settings.number("swiglu_limit", default=7.0),
    )
    layers = tuple(
        Layer(attention=replace(attend, window=one), feed_forward=moe, attention_norm=norm, mlp_norm=norm)
        for one in each
    )
    return llama.model("gpt_oss", settings, layers, norm, positions=positions)


def _names(model: Architecture) -> Names:
    both, down = _MLP + "experts.gate_up_proj", _MLP + "experts.down_proj"
    width = model.layers[0].feed_forward.ffn_dim
    gate = Part(name=both, expert=0, transposed=True, start=0, length=width, step=2)
    return {
        **llama.NAMES,
        "attention.sinks": Part(name="model.layers.{layer}.self_attn.sinks"),
        "router": Part(name=_MLP + "router"),
        "experts.gate.weight": gate,
        "experts.up.weight": replace(gate, start=1),
        "experts.down.weight": Part(name=down, expert=0, transposed=True),
        "experts.gate.bias": Part(name=both + "_bias", expert=0, start=0, length=width, step=2),
        "experts.up.bias": Part(name=both + "_bias", expert=0, start=1, length=width, step=2),
        "experts.down.bias": Part(name=down + "_bias", expert=0),
    }


GPT_OSS = Family(name="gpt_oss", architectures=("GptOssForCausalLM",), read=_read, names=_names)
