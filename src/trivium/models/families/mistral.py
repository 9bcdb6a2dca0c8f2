"""mistral: llama with a sliding window in every layer."""

from __future__ import annotations

from trivium.models.architecture import Architecture
from trivium.models.families import llama
from trivium.models.families.family import Family
from trivium.models.families.rotary import read_rope
from trivium.models.families.settings import Settings


def _read(settings: Settings) -> Architecture:
    settings.fixed("attention_bias", False)
    positions, norm = llama.max_positions(settings, 131072), llama.rms(settings)
    rope = read_rope(settings, llama.heads(settings)[2], positions)
    windows = [settings.whole_or_none("sliding_window")] * settings.layers("num_hidden_layers")
    layers = llama.stack(settings, llama.attention(settings, rope=rope), llama.mlp(settings), norm, windows)
    return llama.model("mistral", settings, layers, norm, positions=positions)


MISTRAL = Family(name="mistral", architectures=("MistralForCausalLM",), read=_read, names=llama.names)
