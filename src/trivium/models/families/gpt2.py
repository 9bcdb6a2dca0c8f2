"""gpt2: learned positions, layer norms, weights stored [in, out], one projection for queries, keys and values."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Norm
from trivium.models.families.family import Family, Names, Part, fused
from trivium.models.families.settings import Settings

_LAYER = "transformer.h.{layer}."


def _read(settings: Settings) -> Architecture:
    settings.fixed("add_cross_attention", False)
    dim, heads = settings.whole("n_embd", "hidden_size"), settings.whole("n_head", "num_attention_heads")
    width = settings.divided(dim, "n_embd", heads, "n_head")
    positions = settings.whole("n_positions", "max_position_embeddings", default=1024)
    norm = layer_norm(settings)
    scale = width**-0.5 if settings.flag("scale_attn_weights", True) else 1.0
    by_layer = settings.flag("scale_attn_by_inverse_layer_idx", False)
    attention = plain_attention(heads, width, bias=True)
    mlp = Mlp(
        ffn_dim=settings.whole("n_inner", default=4 * dim),
        activation=settings.activation("activation_function", default="gelu_new"),
        gated=False,
        bias=True,
    )
    layers = tuple(
        Layer(
            attention=replace(attention, scale=scale / (i + 1) if by_layer else scale),
            feed_forward=mlp,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for i in range(settings.layers("n_layer", "num_hidden_layers"))
    )
    return Architecture(
        family="gpt2",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=dim,
        layers=layers,
        max_positions=positions,
        positions=positions,
        final_norm=norm,
        tied=settings.flag("tie_word_embeddings", True),
    )


def layer_norm(settings: Settings, *keys: str) -> Norm:
    """A layer norm with weight and bias."""
    eps = settings.number(*(keys or ("layer_norm_epsilon", "layer_norm_eps")), default=1e-5)
    return Norm(kind="layer", eps=eps, bias=True)


def plain_attention(heads: int, width: int, *, bias: bool) -> Attention:
    """As many key/value heads as query heads."""
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        value_dim=width,
        scale=width**-0.5,
        q_bias=bias,
        kv_bias=bias,
        out_bias=bias,
    )


def _names(model: Architecture) -> Names:
    q, k, v = fused(_LAYER + "attn.c_attn", model.dim, model.dim, model.dim, transposed=True)
    return {
        "embed": Part(name="transformer.wte"),
        "positions": Part(name="transformer.wpe"),
        "attention_norm": Part(name=_LAYER + "ln_1"),
        "attention.q": q,
        "attention.k": k,
        "attention.v": v,
        "attention.o": Part(name=_LAYER + "attn.c_proj", transposed=True),
        "mlp_norm": Part(name=_LAYER + "ln_2"),
        "mlp.up": Part(name=_LAYER + "mlp.c_fc", transposed=True),
        "mlp.down": Part(name=_LAYER + "mlp.c_proj", transposed=True),
        "norm": Part(name="transformer.ln_f"),
        "head": Part(name="lm_head"),
    }


GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    read=_read,
    names=_names,
    base="transformer.",
    dropped=(r".*\.attn\.(masked_)?bias",),
)
