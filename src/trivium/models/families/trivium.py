"""Our own decoder, dense or with experts, as an `Architecture`; its checkpoints keep the module's own names."""

from __future__ import annotations

from trivium.base import config as configs
from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Moe, Norm, Rope
from trivium.models.config import DecoderConfig
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.settings import Settings
from trivium.models.moe_config import MoEConfig

_BLOCK = "blocks.{layer}."


def decoder_architecture(config: DecoderConfig) -> Architecture:
    """What `models.Decoder` computes in evaluation, with nothing dropped."""
    norm = Norm(kind="rms", eps=config.norm_eps)
    width = config.head_size
    attention = Attention(
        heads=config.heads,
        kv_heads=config.kv_head_count,
        head_dim=width,
        value_dim=width,
        scale=width**-0.5,
        rope=Rope(dim=width, theta=config.rope_theta, positions=config.max_positions),
    )
    dense = Mlp(ffn_dim=config.ffn_dim, activation="silu")
    layers = tuple(
        Layer(
            attention=attention,
            feed_forward=_moe(config.moe, config.expert_dim, experts) if config.moe and experts else dense,
            attention_norm=norm,
            mlp_norm=norm,
        )
        for experts in config.num_experts
    )
    return Architecture(
        family="trivium",
        vocabulary=config.vocabulary,
        dim=config.dim,
        embed_dim=config.dim,
        layers=layers,
        max_positions=config.max_positions,
        final_norm=norm,
        tied=config.tied,
    )


def _moe(moe: MoEConfig, ffn_dim: int, experts: int) -> Moe:
    gated = moe.expert == "swiglu"
    gate = moe.gate
    shared = None
    if moe.shared or moe.residual != "none":
        width = ffn_dim * (moe.shared or 1)
        shared = Mlp(ffn_dim=width, activation="silu" if gated else "gelu", gated=gated, bias=not gated)
    groups = gate.num_groups
    return Moe(
        experts=experts,
        top_k=moe.top_k,
        ffn_dim=ffn_dim,
        activation="silu" if gated else "gelu",
        gated=gated,
        bias=not gated,
        scores=gate.score,
        renormalise=gate.renormalizes(moe.top_k),
        scale=gate.scale,
        correction=gate.bias_rate > 0,
        groups=groups,
        top_groups=gate.top_groups if gate.top_groups is not None else groups,
        shared=shared,
        mix=moe.residual == "mix",
    )


def _names(model: Architecture) -> Names:
    return {
        "embed": Part(name="embed"),
        "attention_norm": Part(name=_BLOCK + "attention_norm"),
        "attention.q": Part(name=_BLOCK + "attention.q"),
        "attention.k": Part(name=_BLOCK + "attention.k"),
        "attention.v": Part(name=_BLOCK + "attention.v"),
        "attention.o": Part(name=_BLOCK + "attention.o"),
        "mlp_norm": Part(name=_BLOCK + "mlp_norm"),
        "mlp.gate": Part(name=_BLOCK + "mlp.gate"),
        "mlp.up": Part(name=_BLOCK + "mlp.up"),
        "mlp.down": Part(name=_BLOCK + "mlp.down"),
        "router": Part(name=_BLOCK + "moe.gate"),
        "router.correction": Part(name=_BLOCK + "moe.gate.bias"),
        "experts.gate": Part(name=_BLOCK + "moe.experts.{expert}.gate"),
        "experts.up": Part(name=_BLOCK + "moe.experts.{expert}.up"),
        "experts.down": Part(name=_BLOCK + "moe.experts.{expert}.down"),
        "shared.gate": Part(name=_BLOCK + "moe.dense.gate"),
        "shared.up": Part(name=_BLOCK + "moe.dense.up"),
        "shared.down": Part(name=_BLOCK + "moe.dense.down"),
        "mix": Part(name=_BLOCK + "moe.mix"),
        "norm": Part(name="norm"),
        "head": Part(name="head"),
    }


def _read(settings: Settings) -> Architecture:
    told = settings.part("model")
    if told is None:
        raise settings.wrong("model", None, "the decoder's config")
    return decoder_architecture(configs.build(DecoderConfig, dict(told.values), f"{settings.what}, model"))


TRIVIUM = Family(
    name="trivium",
    architectures=("TriviumDecoder",),
    read=_read,
    names=_names,
    base="",
    head="head.weight",
    dropped=(),
)
