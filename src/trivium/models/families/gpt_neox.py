"""gpt_neox: both branches side by side (or not), partly turned heads, queries, keys and values fused head by head."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Layer, Mlp
from trivium.models.families.family import Family, Names, Part, fused
from trivium.models.families.gpt2 import layer_norm, plain_attention
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings

_LAYER = "gpt_neox.layers.{layer}."


def _read(settings: Settings) -> Architecture:
    dim, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    width = settings.divided(dim, "hidden_size", heads, "num_attention_heads")
    positions = settings.whole("max_position_embeddings", default=2048)
    norm = layer_norm(settings, "layer_norm_eps")
    rope = read_rope(settings, width, positions, partial=0.25)
    attention = replace(plain_attention(heads, width, bias=settings.flag("attention_bias", True)), rope=rope)
    mlp = Mlp(
        ffn_dim=settings.whole("intermediate_size"),
        activation=settings.activation("hidden_act", default="gelu"),
        gated=False,
        bias=True,
    )
    layer = Layer(
        attention=attention,
        feed_forward=mlp,
        attention_norm=norm,
        mlp_norm=norm,
        parallel=settings.flag("use_parallel_residual", True),
    )
    return Architecture(
        family="gpt_neox",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=(layer,) * settings.layers("num_hidden_layers"),
        max_positions=positions,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", False),
    )


def _names(model: Architecture) -> Names:
    heads, width = model.layers[0].attention.heads, model.layers[0].attention.head_dim
    q, k, v = fused(_LAYER + "attention.query_key_value", width, width, width, groups=heads)
    return {
        "embed": Part(name="gpt_neox.embed_in"),
        "attention_norm": Part(name=_LAYER + "input_layernorm"),
        "attention.q": q,
        "attention.k": k,
        "attention.v": v,
        "attention.o": Part(name=_LAYER + "attention.dense"),
        "mlp_norm": Part(name=_LAYER + "post_attention_layernorm"),
        "mlp.up": Part(name=_LAYER + "mlp.dense_h_to_4h"),
        "mlp.down": Part(name=_LAYER + "mlp.dense_4h_to_h"),
        "norm": Part(name="gpt_neox.final_layer_norm"),
        "head": Part(name="embed_out"),
    }


GPT_NEOX = Family(
    name="gpt_neox",
    architectures=("GPTNeoXForCausalLM",),
    read=_read,
    names=_names,
    base="gpt_neox.",
    head="embed_out.weight",
    dropped=(r".*\.attention\.(masked_)?bias", r".*\.rotary_emb\.inv_freq"),
)
