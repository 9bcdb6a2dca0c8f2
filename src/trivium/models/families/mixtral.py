"""mixtral: mistral's layers with two of eight experts in place of the MLP."""

from __future__ import annotations

from trivium.models.architecture import Architecture, Moe
from trivium.models.families import llama
from trivium.models.families.family import Family, Names, Part
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings

_OLD, _NEW = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.mlp"
_MOST_EXPERTS = 1 << 12


def _read(settings: Settings) -> Architecture:
    positions, norm = llama.max_positions(settings, 131072), llama.rms(settings, 1e-5)
    rope = read_rope(settings, llama.heads(settings)[2], positions, theta=1e6)
    experts = settings.whole("num_local_experts", "num_experts", default=8)
    moe = Moe(
        experts=experts,
        top_k=top_k(settings, experts, 2),
        ffn_dim=settings.whole("intermediate_size"),
        activation=settings.activation("hidden_act", default="silu"),
        renormalise=True,
    )
    windows = [settings.whole_or_none("sliding_window")] * settings.layers("num_hidden_layers")
    layers = llama.stack(settings, llama.attention(settings, rope=rope), moe, norm, windows)
    return llama.model("mixtral", settings, layers, norm, positions=positions)


def top_k(settings: Settings, experts: int, default: int) -> int:
    """How many experts a token takes."""
    if experts > _MOST_EXPERTS:
        raise settings.wrong("num_experts", experts, f"at most {_MOST_EXPERTS}")
    found = settings.whole("num_experts_per_tok", default=default)
    if found > experts:
        raise settings.wrong("num_experts_per_tok", found, f"at most the number of experts, {experts}")
    return found


def fused_experts(at: str, ffn_dim: int) -> dict[str, Part]:
    """The layout with one tensor of all experts for gate and up, and one for down."""
    return {
        "experts.gate": Part(name=at + ".experts.gate_up_proj", expert=0, start=0, length=ffn_dim),
        "experts.up": Part(name=at + ".experts.gate_up_proj", expert=0, start=ffn_dim, length=ffn_dim),
        "experts.down": Part(name=at + ".experts.down_proj", expert=0),
    }


def _names(model: Architecture) -> Names:
    moe = model.layers[0].feed_forward
    both = fused_experts(_NEW, moe.ffn_dim)
    own = {"gate": "w1", "up": "w3", "down": "w2"}
    experts = {
        f"experts.{ours}.weight": (
            Part(name=f"{_OLD}.experts.{{expert}}.{theirs}.weight"),
            both[f"experts.{ours}"],
        )
        for ours, theirs in own.items()
    }
    return {**llama.NAMES, "router": (Part(name=f"{_OLD}.gate"), Part(name=f"{_NEW}.gate")), **experts}


MIXTRAL = Family(name="mixtral", architectures=("MixtralForCausalLM",), read=_read, names=_names)
