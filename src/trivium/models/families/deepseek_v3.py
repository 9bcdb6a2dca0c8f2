"""deepseek_v3: latent attention, experts chosen in groups by sigmoid scores, a shared expert, a temperature by yarn."""

from __future__ import annotations

from trivium.models.architecture import Architecture, Attention, Latent, Layer, Mlp, Moe, Norm
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part, fused
from trivium.models.families.mixtral import top_k
from trivium.models.families.qwen import experts_of
from trivium.models.families.rotary import read_rope, yarn_scale
from trivium.models.families.settings import Settings

_ATTENTION, _MLP = "model.layers.{layer}.self_attn.", "model.layers.{layer}.mlp"


def _attention(settings: Settings, positions: int) -> Attention:
    heads = settings.whole("num_attention_heads")
    nope = settings.whole("qk_nope_head_dim", default=128)
    turned = settings.whole("qk_rope_head_dim", default=64)
    settings.fixed("head_dim", turned)
    settings.fixed("num_key_value_heads", heads)
    rope = read_rope(settings, turned, positions, first=nope, interleaved=settings.flag("rope_interleave", True))
    # The published code leaves these two norms at its own eps, whatever rms_norm_eps says.
    inner = Norm(kind="rms", eps=1e-6)
    direct = "q_lora_rank" in settings.values and settings.get("q_lora_rank") is None
    latent = Latent(
        kv_rank=settings.whole("kv_lora_rank", default=512),
        nope=nope,
        rope=turned,
        q_rank=None if direct else settings.whole("q_lora_rank", default=1536),
        q_norm=inner,
        kv_norm=inner,
    )
    bias = settings.flag("attention_bias", False)
    width = nope + turned
    return Attention(
        heads=heads,
        kv_heads=heads,
        head_dim=width,
        value_dim=settings.whole("v_head_dim", default=128),
        scale=width**-0.5 * _temperature(settings, rope.kind, rope.factor),
        q_bias=bias and latent.q_rank is not None,
        kv_bias=bias,
        out_bias=bias,
        rope=rope,
        latent=latent,
    )


def _temperature(settings: Settings, kind: str, factor: float) -> float:
    inner = settings.part("rope_parameters") or settings.part("rope_scaling")
    if inner is None or kind == "default" or not inner.get("mscale_all_dim"):
        return 1.0
    return yarn_scale(factor, inner.number("mscale_all_dim")) ** 2


def _moe(settings: Settings) -> Moe:
    experts = settings.whole("n_routed_experts", "num_local_experts", default=256)
    groups = settings.whole("n_group", default=8)
    top_groups = settings.whole("topk_group", default=4)
    if experts % groups or experts // groups < 2 or top_groups > groups:
        raise settings.wrong("n_group", groups, f"a divisor of {experts} experts into groups of 2 or more")
    width = settings.whole("moe_intermediate_size", default=2048)
    activation = settings.activation("hidden_act", default="silu")
    settings.fixed("scoring_func", "sigmoid")
    settings.fixed("topk_method", "noaux_tc")
    found = top_k(settings, experts, 8)
    if found > top_groups * (experts // groups):
        raise settings.wrong("num_experts_per_tok", found, f"at most {top_groups * (experts // groups)}")
    return Moe(
        experts=experts,
        top_k=found,
        ffn_dim=width,
        activation=activation,
        scores="sigmoid",
        renormalise=settings.flag("norm_topk_prob", True),
        renormalise_eps=1e-20,
        scale=settings.number("routed_scaling_factor", default=2.5),
        correction=True,
        groups=groups,
        top_groups=top_groups,
        shared=Mlp(ffn_dim=width * settings.whole("n_shared_experts", default=1), activation=activation),
    )


def _read(settings: Settings) -> Architecture:
    settings.fixed("moe_layer_freq", 1)
    positions, norm = llama.max_positions(settings, 4096), llama.rms(settings)
    attention, dense, moe = _attention(settings, positions), llama.mlp(settings), _moe(settings)
    first = settings.whole("first_k_dense_replace", default=3, least=0)
    layers = tuple(
        Layer(attention=attention, feed_forward=dense if i < first else moe, attention_norm=norm, mlp_norm=norm)
        for i in range(settings.layers("num_hidden_layers"))
    )
    return llama.model("deepseek_v3", settings, layers, norm, positions=positions)


def _names(model: Architecture) -> Names:
    attention = model.layers[0].attention
    latent = attention.latent
    nope = 0 if latent is None else latent.nope
    keys, values = fused(_ATTENTION + "kv_b_proj", nope, attention.value_dim, groups=attention.heads)
    ranked = latent is not None and latent.q_rank is not None
    found: dict[str, Part | tuple[Part, ...]] = {
        **llama.NAMES,
        "attention.q": Part(name=_ATTENTION + ("q_b_proj" if ranked else "q_proj")),
        "attention.q_a": Part(name=_ATTENTION + "q_a_proj"),
        "attention.q_a_norm": Part(name=_ATTENTION + "q_a_layernorm"),
        "attention.kv_a": Part(name=_ATTENTION + "kv_a_proj_with_mqa"),
        "attention.kv_a_norm": Part(name=_ATTENTION + "kv_a_layernorm"),
        "attention.k": keys,
        "attention.v": values,
        "router": Part(name=_MLP + ".gate"),
        "router.correction": Part(name=_MLP + ".gate.e_score_correction_bias"),
        "shared.gate": Part(name=_MLP + ".shared_experts.gate_proj"),
        "shared.up": Part(name=_MLP + ".shared_experts.up_proj"),
        "shared.down": Part(name=_MLP + ".shared_experts.down_proj"),
    }
    for layer in model.layers:
        if isinstance(layer.feed_forward, Moe):
            found.update(experts_of(_MLP, layer.feed_forward.ffn_dim))
    return found


DEEPSEEK_V3 = Family(name="deepseek_v3", architectures=("DeepseekV3ForCausalLM",), read=_read, names=_names)
