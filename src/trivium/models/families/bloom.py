"""bloom: biases linear in the distance instead of positions, a norm after the embedding, projections fused by head."""

from __future__ import annotations

import math
from dataclasses import replace

from trivium.models.architecture import Alibi, Architecture, Layer, Mlp
from trivium.models.families.family import Family, Names, Part, fused
from trivium.models.families.gpt2 import layer_norm, plain_attention
from trivium.models.families.settings import Settings

_LAYER = "transformer.h.{layer}."


def slopes(heads: int) -> tuple[float, ...]:
    """One slope per head: powers of two for a power of two of heads; further heads take every other of twice as many.

    Of the published code also the single precision of base and power is kept.
    """
    power = 2 ** math.floor(math.log2(heads))
    found = [single(single(2 ** (-(2 ** -(math.log2(power) - 3)))) ** i) for i in range(1, power + 1)]
    if power != heads:
        base = single(2 ** (-(2 ** -(math.log2(2 * power) - 3))))
        found += [single(base**i) for i in range(1, 1 + 2 * min(power, heads - power), 2)]
    return tuple(found)


def single(value: float) -> float:
    """``value`` rounded to single precision."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(mantissa * 2**24) / 2**24, exponent)


def _read(settings: Settings) -> Architecture:
    dim = settings.whole("n_embed", "hidden_size")
    heads = settings.whole("n_head", "num_attention_heads")
    width = settings.divided(dim, "hidden_size", heads, "n_head")
    norm = layer_norm(settings)
    attention = replace(plain_attention(heads, width, bias=True), alibi=Alibi(slopes=slopes(heads)))
    layer = Layer(
        attention=attention,
        feed_forward=Mlp(ffn_dim=4 * dim, activation="gelu_tanh", gated=False, bias=True),
        attention_norm=norm,
        mlp_norm=norm,
        residual_after_norm=settings.flag("apply_residual_connection_post_layernorm", False),
    )
    return Architecture(
        family="bloom",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=(layer,) * settings.layers("n_layer", "num_hidden_layers"),
        max_positions=settings.whole("seq_length", "max_position_embeddings", default=2048),
        embed_norm=norm,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", True),
    )


def _names(model: Architecture) -> Names:
    heads, width = model.layers[0].attention.heads, model.layers[0].attention.head_dim
    q, k, v = fused(_LAYER + "self_attention.query_key_value", width, width, width, groups=heads)
    return {
        "embed": Part(name="transformer.word_embeddings"),
        "embed_norm": Part(name="transformer.word_embeddings_layernorm"),
        "attention_norm": Part(name=_LAYER + "input_layernorm"),
        "attention.q": q,
        "attention.k": k,
        "attention.v": v,
        "attention.o": Part(name=_LAYER + "self_attention.dense"),
        "mlp_norm": Part(name=_LAYER + "post_attention_layernorm"),
        "mlp.up": Part(name=_LAYER + "mlp.dense_h_to_4h"),
        "mlp.down": Part(name=_LAYER + "mlp.dense_4h_to_h"),
        "norm": Part(name="transformer.ln_f"),
        "head": Part(name="lm_head"),
    }


BLOOM = Family(
    name="bloom", architectures=("BloomForCausalLM",), read=_read, names=_names, base="transformer.", dropped=()
)
