"""phi3: llama with fused projections, partly turned heads, and positions stretched by a list of factors (longrope)."""

from __future__ import annotations

from trivium.models.architecture import Architecture
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, fused
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings


def _read(settings: Settings) -> Architecture:
    settings.fixed("attention_bias", False)
    positions, norm = llama.max_positions(settings, 4096), llama.rms(settings, 1e-5)
    rope = read_rope(
        settings,
        llama.heads(settings)[2],
        positions,
        partial=1.0,
        kinds=("default", "longrope"),
        renamed=(("su", "longrope"), ("yarn", "longrope")),
    )
    windows = [settings.whole_or_none("sliding_window")] * settings.layers("num_hidden_layers")
    layers = llama.stack(settings, llama.attention(settings, rope=rope), llama.mlp(settings), norm, windows)
    return llama.model("phi3", settings, layers, norm, positions=positions)


def _names(model: Architecture) -> Names:
    attention, mlp = model.layers[0].attention, model.layers[0].feed_forward
    queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
    q, k, v = fused("model.layers.{layer}.self_attn.qkv_proj", queries, keys, keys)
    gate, up = fused("model.layers.{layer}.mlp.gate_up_proj", mlp.ffn_dim, mlp.ffn_dim)
    return {**llama.NAMES, "attention.q": q, "attention.k": k, "attention.v": v, "mlp.gate": gate, "mlp.up": up}


PHI3 = Family(name="phi3", architectures=("Phi3ForCausalLM",), read=_read, names=_names)
