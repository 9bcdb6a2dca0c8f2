"""Foreign checkpoints of the decoder's shape, as data: how another library names its config keys and its tensors.

`checkpoint` takes a family's name map as an argument; nothing here opens a file.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.base.errors import ConfigError
from trivium.models.config import DecoderConfig

_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Key:
    """One config value: our key, theirs, what a missing key means to them (``required``: it must be there)."""

    ours: str
    theirs: str
    default: Any = None
    required: bool = False


@dataclass(frozen=True, kw_only=True)
class FamilyMap:
    """A family of Hugging Face checkpoints that the decoder computes exactly.

    ``tensors`` pairs our parameter names with theirs, ``{layer}`` standing for the layer's number. ``fixed`` are the
    config keys that allow only some values, the first of which is what absence means and what is written; ``dropped``
    are patterns of their tensors that carry nothing (old rotary tables).
    """

    model_type: str
    architecture: str
    keys: tuple[Key, ...]
    fixed: tuple[tuple[str, tuple[Any, ...]], ...]
    tensors: tuple[tuple[str, str], ...]
    tied: tuple[str, str]
    dropped: tuple[str, ...] = ()

    def names(self, config: DecoderConfig) -> dict[str, str]:
        """Ours → theirs for every parameter, in the model's order; a tied head is its embedding and not listed."""
        found: dict[str, str] = {}
        for repeated, pairs in itertools.groupby(self.tensors, key=lambda pair: "{layer}" in pair[0]):
            group = list(pairs)
            for layer in range(config.layers if repeated else 1):
                found.update({ours.format(layer=layer): theirs.format(layer=layer) for ours, theirs in group})
        if config.tied:
            found.pop(self.tied[0])
        return found

    def to_theirs(self, name: str) -> str:
        """Their name for one of our parameters, tied or not. Raises ConfigError for a name we do not have."""
        found = _translate(name, self.tensors)
        if found is None:
            raise ConfigError(f"parameter {name!r}: not a name of the decoder, which {self.model_type} could translate")
        return found

    def to_ours(self, name: str) -> str | None:
        """Our name for one of their tensors; None for one that carries nothing. Raises ConfigError for others."""
        found = _translate(name, tuple((theirs, ours) for ours, theirs in self.tensors))
        if found is None and not any(re.fullmatch(pattern, name) for pattern in self.dropped):
            raise ConfigError(f"tensor {name!r}: not a name of the {self.model_type} family ({self.architecture})")
        return found

    def from_hugging_face(self, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a ``config.json``. Raises ConfigError naming key and value for whatever the decoder cannot compute."""
        if config.get("model_type", _ABSENT) != self.model_type:
            raise ConfigError(f"model_type={config.get('model_type')!r}: expected {self.model_type!r}")
        for name, allowed in self.fixed:
            value = config.get(name)
            if value is not None and value not in allowed:
                expected = " or ".join(repr(item) for item in allowed)
                raise ConfigError(f"{name}={value!r}: the decoder cannot compute this; expected {expected} or no key")
        values: dict[str, Any] = {"rope_theta": _plain_rope_theta(config)}
        for key in self.keys:
            value = config.get(key.theirs)
            if value is None and key.required:
                raise ConfigError(f"{key.theirs} is missing from the {self.model_type} config; it must be there")
            values[key.ours] = key.default if value is None else value
        return DecoderConfig(**values)

    def to_hugging_face(
        self,
        config: DecoderConfig,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        dtype: str | None = None,
    ) -> dict[str, Any]:
        """The ``config.json`` under which transformers computes what this decoder does; plain JSON values.

        Token ids are the tokenizer's; None is written as null, so that no foreign default slips in. ``dtype`` is the
        stored tensors' ("float32", "bfloat16", …).
        """
        if config.dim % config.heads:
            raise ConfigError(
                f"dim={config.dim} is not divisible by heads={config.heads}: {self.architecture} refuses such a config"
            )
        written: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type}
        for key in self.keys:
            written[key.theirs] = getattr(config, key.ours)
        written["num_key_value_heads"] = config.kv_head_count
        written["head_dim"] = config.head_size
        written["rope_theta"] = config.rope_theta
        written["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
        written.update({key: allowed[0] for key, allowed in self.fixed if allowed[0] is not None})
        written.update(bos_token_id=bos_token_id, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        if dtype is not None:
            written["dtype"] = dtype
        return written


LLAMA = FamilyMap(
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys=(
        Key(ours="vocabulary", theirs="vocab_size", required=True),
        Key(ours="dim", theirs="hidden_size", required=True),
        Key(ours="layers", theirs="num_hidden_layers", required=True),
        Key(ours="heads", theirs="num_attention_heads", required=True),
        Key(ours="kv_heads", theirs="num_key_value_heads"),
        Key(ours="head_dim", theirs="head_dim"),
        Key(ours="ffn_dim", theirs="intermediate_size", required=True),
        Key(ours="max_positions", theirs="max_position_embeddings", default=2048),
        Key(ours="norm_eps", theirs="rms_norm_eps", default=1e-6),
        Key(ours="tied", theirs="tie_word_embeddings", default=False),
        Key(ours="init_std", theirs="initializer_range", default=0.02),
    ),
    fixed=(
        ("hidden_act", ("silu", "swish")),
        ("attention_bias", (False,)),
        ("mlp_bias", (False,)),
        ("attention_dropout", (0.0,)),
        ("pretraining_tp", (1,)),
        ("sliding_window", (None,)),
        ("quantization_config", (None,)),
    ),
    tensors=(
        ("embed.weight", "model.embed_tokens.weight"),
        ("blocks.{layer}.attention_norm.weight", "model.layers.{layer}.input_layernorm.weight"),
        ("blocks.{layer}.attention.q.weight", "model.layers.{layer}.self_attn.q_proj.weight"),
        ("blocks.{layer}.attention.k.weight", "model.layers.{layer}.self_attn.k_proj.weight"),
        ("blocks.{layer}.attention.v.weight", "model.layers.{layer}.self_attn.v_proj.weight"),
        ("blocks.{layer}.attention.o.weight", "model.layers.{layer}.self_attn.o_proj.weight"),
        ("blocks.{layer}.mlp_norm.weight", "model.layers.{layer}.post_attention_layernorm.weight"),
        ("blocks.{layer}.mlp.gate.weight", "model.layers.{layer}.mlp.gate_proj.weight"),
        ("blocks.{layer}.mlp.up.weight", "model.layers.{layer}.mlp.up_proj.weight"),
        ("blocks.{layer}.mlp.down.weight", "model.layers.{layer}.mlp.down_proj.weight"),
        ("norm.weight", "model.norm.weight"),
        ("head.weight", "lm_head.weight"),
    ),
    tied=("head.weight", "embed.weight"),
    dropped=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)

FAMILIES: tuple[FamilyMap, ...] = (LLAMA,)


def family_of(config: Mapping[str, Any]) -> FamilyMap:
    """The family a ``config.json`` belongs to, by its ``model_type``. Raises ConfigError when we know none."""
    model_type = config.get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ConfigError(f"model_type={model_type!r}: the decoder reads {known}")


def _plain_rope_theta(config: Mapping[str, Any]) -> float:
    theta: Any = config.get("rope_theta")
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise ConfigError(f"{key}={rope!r}: expected an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        others = set(rope) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kind != "default" or others:
            raise ConfigError(f"{key}={dict(rope)!r}: the decoder's rotary positions are unscaled; expected none")
        _whole_rotation(f"{key}.partial_rotary_factor", rope.get("partial_rotary_factor"))
        if rope.get("rope_theta") is not None:
            theta = rope["rope_theta"]
    _whole_rotation("partial_rotary_factor", config.get("partial_rotary_factor"))
    if theta is None:
        return 10000.0
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise ConfigError(f"rope_theta={theta!r}: expected a positive number")
    return float(theta)


def _whole_rotation(key: str, value: Any) -> None:
    if value is not None and value != 1:
        raise ConfigError(f"{key}={value!r}: the decoder rotates whole heads; expected 1.0 or no such key")


def _translate(name: str, pairs: tuple[tuple[str, str], ...]) -> str | None:
    for source, target in pairs:
        pattern = re.escape(source).replace(re.escape("{layer}"), r"(0|[1-9]\d{0,8})")
        match = re.fullmatch(pattern, name)
        if match is not None:
            return target.format(layer=match.group(1)) if match.groups() else target
    return None
