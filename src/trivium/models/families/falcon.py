"""falcon: one key/value head, or one per group (the newer layout), beside the MLP; rotary or linear biases."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Alibi, Architecture, Attention, Layer, Mlp
from trivium.models.families.bloom import slopes
from trivium.models.families.family import Family, Names, Part, fused
from trivium.models.families.gpt2 import layer_norm, plain_attention
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings

_LAYER = "transformer.h.{layer}."


def _attention(settings: Settings, dim: int, positions: int) -> Attention:
    heads = settings.whole("num_attention_heads", "n_head")
    width = settings.divided(dim, "hidden_size", heads, "num_attention_heads")
    new, one = settings.flag("new_decoder_architecture", False), settings.flag("multi_query", True)
    kv_heads = settings.whole("num_kv_heads", "n_head_kv", default=heads) if new else 1 if one else heads
    settings.divided(heads, "num_attention_heads", kv_heads, "num_kv_heads")
    attention = replace(
        plain_attention(heads, width, bias=settings.flag("bias", False)),
        kv_heads=kv_heads,
    )
    if settings.flag("alibi", False):
        return replace(attention, alibi=Alibi(slopes=slopes(heads), rounded=True, scale=width**-0.5))
    return replace(attention, rope=read_rope(settings, width, positions))


def _read(settings: Settings) -> Architecture:
    dim, new = settings.whole("hidden_size"), settings.flag("new_decoder_architecture", False)
    positions = settings.whole("max_position_embeddings", default=2048)
    parallel = settings.flag("parallel_attn", True)
    norms = settings.whole("num_ln_in_parallel_attn", default=2 if new else 1)
    if norms > 2 or (norms == 2 and parallel != new) or (new and not parallel):
        raise settings.wrong("num_ln_in_parallel_attn", norms, "1, or 2 with the new decoder architecture")
    norm = layer_norm(settings)
    layer = Layer(
        attention=_attention(settings, dim, positions),
        feed_forward=Mlp(
            ffn_dim=settings.whole("ffn_hidden_size", default=4 * dim),
            activation=settings.activation("activation", default="gelu"),
            gated=False,
            bias=settings.flag("bias", False),
        ),
        attention_norm=norm,
        mlp_norm=norm if norms == 2 or not parallel else None,
        parallel=parallel,
    )
    return Architecture(
        family="falcon",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=(layer,) * settings.layers("num_hidden_layers", "n_layer"),
        max_positions=positions,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", True),
    )


def _names(model: Architecture) -> Names:
    layer, attention = model.layers[0], model.layers[0].attention
    width, groups = attention.head_dim, attention.kv_heads
    qkv = fused(
        _LAYER + "self_attention.query_key_value", attention.heads // groups * width, width, width, groups=groups
    )
    both = layer.parallel and layer.mlp_norm is not None
    return {
        "embed": Part(name="transformer.word_embeddings"),
        "attention_norm": Part(name=_LAYER + ("ln_attn" if both else "input_layernorm")),
        "attention.q": qkv[0],
        "attention.k": qkv[1],
        "attention.v": qkv[2],
        "attention.o": Part(name=_LAYER + "self_attention.dense"),
        "mlp_norm": Part(name=_LAYER + ("ln_mlp" if both else "post_attention_layernorm")),
        "mlp.up": Part(name=_LAYER + "mlp.dense_h_to_4h"),
        "mlp.down": Part(name=_LAYER + "mlp.dense_4h_to_h"),
        "norm": Part(name="transformer.ln_f"),
        "head": Part(name="lm_head"),
    }


FALCON = Family(name="falcon", architectures=("FalconForCausalLM",), read=_read, names=_names, base="transformer.")
