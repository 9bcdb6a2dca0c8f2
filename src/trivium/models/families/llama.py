"""llama, and what its many relatives share with it: RMS norms, rotary positions, grouped queries, a gated MLP."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Moe, Norm, Rope
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings

NAMES: dict[str, Part | tuple[Part, ...]] = {
    "embed": Part(name="model.embed_tokens"),
    "attention_norm": Part(name="model.layers.{layer}.input_layernorm"),
    "attention.q": Part(name="model.layers.{layer}.self_attn.q_proj"),
    "attention.k": Part(name="model.layers.{layer}.self_attn.k_proj"),
    "attention.v": Part(name="model.layers.{layer}.self_attn.v_proj"),
    "attention.o": Part(name="model.layers.{layer}.self_attn.o_proj"),
    "attention.q_norm": Part(name="model.layers.{layer}.self_attn.q_norm"),
    "attention.k_norm": Part(name="model.layers.{layer}.self_attn.k_norm"),
    "mlp_norm": Part(name="model.layers.{layer}.post_attention_layernorm"),
    "mlp.gate": Part(name="model.layers.{layer}.mlp.gate_proj"),
    "mlp.up": Part(name="model.layers.{layer}.mlp.up_proj"),
    "mlp.down": Part(name="model.layers.{layer}.mlp.down_proj"),
    "norm": Part(name="model.norm"),
    "head": Part(name="lm_head"),
}


def rms(settings: Settings, default: float = 1e-6, offset: float = 0.0) -> Norm:
    """The family's RMS norm."""
    return Norm(kind="rms", eps=settings.number("rms_norm_eps", default=default), offset=offset)


def heads(settings: Settings, head_dim: int | None = None) -> tuple[int, int, int]:
    """Query heads, key/value heads and their width; ``head_dim`` is the family's own default."""
    dim, count = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    kv_count = settings.whole("num_key_value_heads", default=count)
    settings.divided(count, "num_attention_heads", kv_count, "num_key_value_heads")
    width = settings.whole_or_none("head_dim") or head_dim
    return count, kv_count, width or settings.divided(dim, "hidden_size", count, "num_attention_heads")


def attention(settings: Settings, *, rope: Rope | None, bias: bool = False, head_dim: int | None = None) -> Attention:
    """Grouped-query attention over the whole context."""
    count, kv_count, width = heads(settings, head_dim)
    return Attention(
        heads=count,
        kv_heads=kv_count,
        head_dim=width,
        value_dim=width,
        scale=width**-0.5,
        q_bias=bias,
        kv_bias=bias,
        out_bias=bias,
        rope=rope,
    )


def max_positions(settings: Settings, default: int = 2048) -> int:
    """How long a sequence the config tells of."""
    return settings.whole("max_position_embeddings", default=default)


def model(
    family: str, settings: Settings, layers: tuple[Layer, ...], norm: Norm, *, positions: int, tied: bool = False
) -> Architecture:
    """The whole from its layers."""
    dim = settings.whole("hidden_size")
    return Architecture(
        family=family,
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=layers,
        max_positions=positions,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", tied),
    )


def mlp(settings: Settings, *, key: str = "intermediate_size", bias: bool = False) -> Mlp:
    """The gated MLP."""
    return Mlp(ffn_dim=settings.whole(key), activation=settings.activation("hidden_act", default="silu"), bias=bias)


def stack(
    settings: Settings, attention: Attention, feed_forward: Mlp | Moe, norm: Norm, windows: list[int | None] | None
) -> tuple[Layer, ...]:
    """Pre-norm layers that differ in their windows alone."""
    count = settings.layers("num_hidden_layers")
    layer = Layer(attention=attention, feed_forward=feed_forward, attention_norm=norm, mlp_norm=norm)
    if windows is None:
        return (layer,) * count
    return tuple(replace(layer, attention=replace(attention, window=window)) for window in windows)


def _read(settings: Settings) -> Architecture:
    settings.fixed("sliding_window", 0)
    positions, norm = max_positions(settings), rms(settings)
    rope = read_rope(settings, heads(settings)[2], positions)
    attend = attention(settings, rope=rope, bias=settings.flag("attention_bias", False))
    feed_forward = mlp(settings, bias=settings.flag("mlp_bias", False))
    return model("llama", settings, stack(settings, attend, feed_forward, norm, None), norm, positions=positions)


def names(model: Architecture) -> Names:
    """The tensors' names, the same for most relatives."""
    return NAMES


LLAMA_FAMILY = Family(name="llama", architectures=("LlamaForCausalLM",), read=_read, names=names)
