"""gptj: one norm before both branches side by side, interleaved rotation of the first columns, a head with a bias."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Layer, Mlp, Rope
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.gpt2 import layer_norm, plain_attention
from trivium.models.families.settings import Settings

_LAYER = "transformer.h.{layer}."


def _read(settings: Settings) -> Architecture:
    dim, heads = settings.whole("n_embd", "hidden_size"), settings.whole("n_head", "num_attention_heads")
    width = settings.divided(dim, "n_embd", heads, "n_head")
    positions = settings.whole("n_positions", "max_position_embeddings", default=2048)
    turned = settings.whole("rotary_dim", default=64)
    if turned % 2 or turned > width:
        raise settings.wrong("rotary_dim", turned, f"an even number up to the heads' width, {width}")
    rope = Rope(dim=turned, theta=10000.0, positions=positions, interleaved=True)
    norm = layer_norm(settings)
    mlp = Mlp(
        ffn_dim=settings.whole("n_inner", default=4 * dim),
        activation=settings.activation("activation_function", default="gelu_new"),
        gated=False,
        bias=True,
    )
    attention = replace(plain_attention(heads, width, bias=False), rope=rope)
    layer = Layer(attention=attention, feed_forward=mlp, attention_norm=norm, parallel=True)
    return Architecture(
        family="gptj",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=(layer,) * settings.layers("n_layer", "num_hidden_layers"),
        max_positions=positions,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", False),
        head_bias=True,
    )


def _names(model: Architecture) -> Names:
    return {
        "embed": Part(name="transformer.wte"),
        "attention_norm": Part(name=_LAYER + "ln_1"),
        "attention.q": Part(name=_LAYER + "attn.q_proj"),
        "attention.k": Part(name=_LAYER + "attn.k_proj"),
        "attention.v": Part(name=_LAYER + "attn.v_proj"),
        "attention.o": Part(name=_LAYER + "attn.out_proj"),
        "mlp.up": Part(name=_LAYER + "mlp.fc_in"),
        "mlp.down": Part(name=_LAYER + "mlp.fc_out"),
        "norm": Part(name="transformer.ln_f"),
        "head": Part(name="lm_head"),
    }


GPTJ = Family(
    name="gptj",
    architectures=("GPTJForCausalLM",),
    read=_read,
    names=_names,
    base="transformer.",
    dropped=(r".*\.attn\.(masked_)?bias", r".*\.attn\.embed_positions"),
)
