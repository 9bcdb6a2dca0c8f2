"""qwen2 and qwen3, dense and with experts: biases or normed heads, windows in some layers, a gated shared expert."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Moe
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.mixtral import fused_experts, top_k
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings, windows

_MLP = "model.layers.{layer}.mlp"


def _attention(settings: Settings, positions: int, *, third: bool, head_dim: int | None) -> Attention:
    rope = read_rope(settings, llama.heads(settings, head_dim)[2], positions)
    if third:
        bias = settings.flag("attention_bias", False)
        norm = llama.rms(settings)
        attend = llama.attention(settings, rope=rope, bias=bias, head_dim=head_dim)
        return replace(attend, q_norm=norm, k_norm=norm)
    attend = llama.attention(settings, rope=rope, bias=settings.flag("qkv_bias", True))
    return replace(attend, out_bias=False)


def _window(settings: Settings) -> int | None:
    used = settings.flag("use_sliding_window", False)
    return settings.whole("sliding_window", default=4096) if used else None


def _dense(settings: Settings, name: str) -> Architecture:
    positions, norm = llama.max_positions(settings, 32768), llama.rms(settings)
    count = settings.layers("num_hidden_layers")
    window, first = _window(settings), settings.whole("max_window_layers", default=28, least=0)
    each = windows(settings, count, window, [window is not None and i >= first for i in range(count)])
    third = name == "qwen3"
    attend = _attention(settings, positions, third=third, head_dim=128 if third else None)
    layers = llama.stack(settings, attend, llama.mlp(settings), norm, each)
    return llama.model(name, settings, layers, norm, positions=positions)


def _sparse(settings: Settings, name: str) -> Architecture:
    positions, norm = llama.max_positions(settings, 32768), llama.rms(settings)
    count, third = settings.layers("num_hidden_layers"), name == "qwen3_moe"
    window = _window(settings)
    if third:
        each = [window] * count
    else:
        below = settings.whole("max_window_layers", default=28, least=0)
        each = windows(settings, count, window, [window is not None and i % 2 == 0 and i < below for i in range(count)])
    attend = _attention(settings, positions, third=third, head_dim=None)
    dense, moe = llama.mlp(settings), _moe(settings, third)
    plain = settings.indices("mlp_only_layers", count)
    step = settings.whole("decoder_sparse_step", default=1)
    layers = tuple(
        Layer(
            attention=replace(attend, window=each[i]),
            feed_forward=dense if i in plain or (i + 1) % step else moe,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for i in range(count)
    )
    return llama.model(name, settings, layers, norm, positions=positions)


def _moe(settings: Settings, third: bool) -> Moe:
    experts = settings.whole("num_experts", "num_local_experts", default=128 if third else 60)
    activation = settings.activation("hidden_act", default="silu")
    shared = None
    if not third:
        shared = Mlp(ffn_dim=settings.whole("shared_expert_intermediate_size", default=5632), activation=activation)
    return Moe(
        experts=experts,
        top_k=top_k(settings, experts, 8 if third else 4),
        ffn_dim=settings.whole("moe_intermediate_size", default=768 if third else 1408),
        activation=activation,
        renormalise=settings.flag("norm_topk_prob", False),
        shared=shared,
        shared_gate=shared is not None,
    )


def experts_of(at: str, ffn_dim: int) -> dict[str, Part | tuple[Part, ...]]:
    """One tensor per expert and projection, or all experts of a layer in two tensors."""
    both = fused_experts(at, ffn_dim)
    return {
        f"experts.{one}.weight": (Part(name=f"{at}.experts.{{expert}}.{one}_proj.weight"), both[f"experts.{one}"])
        for one in ("gate", "up", "down")
    }


def _names(model: Architecture) -> Names:
    found: dict[str, Part | tuple[Part, ...]] = {
        **llama.NAMES,
        "router": Part(name=_MLP + ".gate"),
        "shared.gate": Part(name=_MLP + ".shared_expert.gate_proj"),
        "shared.up": Part(name=_MLP + ".shared_expert.up_proj"),
        "shared.down": Part(name=_MLP + ".shared_expert.down_proj"),
        "shared_gate": Part(name=_MLP + ".shared_expert_gate"),
    }
    for layer in model.layers:
        if isinstance(layer.feed_forward, Moe):
            found.update(experts_of(_MLP, layer.feed_forward.ffn_dim))
    return found


QWEN2 = Family(name="qwen2", architectures=("Qwen2ForCausalLM",), read=lambda s: _dense(s, "qwen2"), names=llama.names)
QWEN3 = Family(name="qwen3", architectures=("Qwen3ForCausalLM",), read=lambda s: _dense(s, "qwen3"), names=llama.names)
QWEN2_MOE = Family(
    name="qwen2_moe", architectures=("Qwen2MoeForCausalLM",), read=lambda s: _sparse(s, "qwen2_moe"), names=_names
)
QWEN3_MOE = Family(
    name="qwen3_moe", architectures=("Qwen3MoeForCausalLM",), read=lambda s: _sparse(s, "qwen3_moe"), names=_names
)
