"""cohere: one layer norm without bias before both branches side by side, interleaved rotation, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from trivium.models.architecture import Architecture, Layer, Norm
from trivium.models.families import llama
from trivium.models.families.family import Family
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings


def _read(settings: Settings) -> Architecture:
    positions = llama.max_positions(settings, 8192)
    norm = Norm(kind="layer", eps=settings.number("layer_norm_eps", default=1e-5))
    rope = read_rope(settings, llama.heads(settings)[2], positions, interleaved=True)
    attend = llama.attention(settings, rope=rope, bias=settings.flag("attention_bias", False))
    if settings.flag("use_qk_norm", False):
        attend = replace(attend, q_norm=norm, k_norm=norm, qk_separate=True)
    layer = Layer(attention=attend, feed_forward=llama.mlp(settings), attention_norm=norm, parallel=True)
    layers = (layer,) * settings.layers("num_hidden_layers")
    whole = llama.model("cohere", settings, layers, norm, positions=positions, tied=True)
    return replace(whole, head_scale=settings.number("logit_scale", default=0.0625))


COHERE = Family(name="cohere", architectures=("CohereForCausalLM",), read=_read, names=llama.names)
