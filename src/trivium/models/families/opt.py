"""opt: learned positions that start at row 2, norms before the branches or after the sums, a narrower embedding."""

from __future__ import annotations

from trivium.models.architecture import Architecture, Layer, Mlp, Norm
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.gpt2 import plain_attention
from trivium.models.families.settings import Settings

_LAYER = "model.decoder.layers.{layer}."


def _read(settings: Settings) -> Architecture:
    dim, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    positions = settings.whole("max_position_embeddings", default=2048)
    bias, affine = settings.flag("enable_bias", True), settings.flag("layer_norm_elementwise_affine", True)
    norm = Norm(kind="layer", eps=1e-5, weight=affine, bias=affine)
    before = settings.flag("do_layer_norm_before", True)
    mlp = Mlp(
        ffn_dim=settings.whole("ffn_dim"),
        activation=settings.activation("activation_function", default="relu"),
        gated=False,
        bias=bias,
    )
    width = settings.divided(dim, "hidden_size", heads, "num_attention_heads")
    layer = Layer(
        attention=plain_attention(heads, width, bias=bias),
        feed_forward=mlp,
        attention_norm=norm if before else None,
        mlp_norm=norm if before else None,
        attention_sum_norm=None if before else norm,
        mlp_sum_norm=None if before else norm,
    )
    return Architecture(
        family="opt",
        vocabulary=settings.whole("vocab_size"),
        dim=dim,
        embed_dim=settings.whole("word_embed_proj_dim", default=dim),
        layers=(layer,) * settings.layers("num_hidden_layers"),
        max_positions=positions,
        positions=positions,
        position_offset=2,
        final_norm=norm if before and not settings.flag("_remove_final_layer_norm", False) else None,
        tied=settings.flag("tie_word_embeddings", True),
    )


def _names(model: Architecture) -> Names:
    first, second = Part(name=_LAYER + "self_attn_layer_norm"), Part(name=_LAYER + "final_layer_norm")
    return {
        "embed": Part(name="model.decoder.embed_tokens"),
        "embed_in": Part(name="model.decoder.project_in"),
        "positions": Part(name="model.decoder.embed_positions"),
        "attention_norm": first,
        "attention_sum_norm": first,
        "attention.q": Part(name=_LAYER + "self_attn.q_proj"),
        "attention.k": Part(name=_LAYER + "self_attn.k_proj"),
        "attention.v": Part(name=_LAYER + "self_attn.v_proj"),
        "attention.o": Part(name=_LAYER + "self_attn.out_proj"),
        "mlp_norm": second,
        "mlp_sum_norm": second,
        "mlp.up": Part(name=_LAYER + "fc1"),
        "mlp.down": Part(name=_LAYER + "fc2"),
        "norm": Part(name="model.decoder.final_layer_norm"),
        "embed_out": Part(name="model.decoder.project_out"),
        "head": Part(name="lm_head"),
    }


OPT = Family(name="opt", architectures=("OPTForCausalLM",), read=_read, names=_names, dropped=())
