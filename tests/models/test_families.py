"""Our decoder and transformers' Llama compute the same, and their configs and names translate both ways."""

from __future__ import annotations

import json

import pytest
import torch

from trivium.base.errors import ConfigError
from trivium.models import LLAMA, DecoderConfig, build, family_of

SHAPES = {
    "plain": DecoderConfig(vocabulary=97, dim=32, layers=2, heads=4, ffn_dim=48),
    "tied grouped": DecoderConfig(vocabulary=61, dim=48, layers=3, heads=6, kv_heads=2, ffn_dim=75, tied=True),
    "odd": DecoderConfig(
        vocabulary=53, dim=35, layers=1, heads=5, kv_heads=1, head_dim=6, ffn_dim=11, rope_theta=500.0, norm_eps=1e-3
    ),
}
MINIMAL = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape):
    transformers = pytest.importorskip("transformers")
    config = SHAPES[shape]
    theirs_config = transformers.LlamaConfig.from_dict(json.loads(json.dumps(LLAMA.to_hugging_face(config))))
    theirs = transformers.LlamaForCausalLM(theirs_config).eval()
    state = {key: torch.randn_like(value) * 0.3 for key, value in theirs.state_dict().items()}
    if config.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    theirs.load_state_dict(state)
    ours = build(config, seed=0)
    names = LLAMA.names(config)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(state[names[name]])
    tokens = torch.randint(0, config.vocabulary, (2, 19))
    with torch.no_grad():
        expected, got = theirs(tokens, use_cache=False).logits, ours(tokens)
    assert float((got - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_config_and_names_round_trip(shape):
    config = SHAPES[shape]
    written = json.loads(json.dumps(LLAMA.to_hugging_face(config, eos_token_id=7, dtype="float32")))
    assert written["architectures"] == ["LlamaForCausalLM"]
    assert (written["eos_token_id"], written["bos_token_id"], written["dtype"]) == (7, None, "float32")
    back = family_of(written).from_hugging_face(written)
    assert LLAMA.to_hugging_face(back) == LLAMA.to_hugging_face(config)
    assert back.num_parameters() == config.num_parameters()
    assert (back.rope_theta, back.tied) == (config.rope_theta, config.tied)
    names = LLAMA.names(config)
    assert list(names) == [name for name, _ in build(config, "meta").named_parameters()]
    for ours, theirs in names.items():
        assert LLAMA.to_theirs(ours) == theirs and LLAMA.to_ours(theirs) == ours
    assert LLAMA.to_ours("lm_head.weight") == "head.weight"


def test_names_equal_transformers():
    transformers = pytest.importorskip("transformers")
    for config in SHAPES.values():
        with torch.device("meta"):
            theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA.to_hugging_face(config)))
        assert set(LLAMA.names(config).values()) == {name for name, _ in theirs.named_parameters()}


def test_missing_keys_mean_what_they_mean_to_transformers():
    config = LLAMA.from_hugging_face({**MINIMAL, "torch_dtype": "float16", "use_cache": True, "auto_map": {"x": "y.z"}})
    assert config == DecoderConfig(
        vocabulary=97, dim=32, layers=2, heads=4, ffn_dim=48, norm_eps=1e-6, max_positions=2048, rope_theta=10000.0
    )
    assert LLAMA.from_hugging_face({**MINIMAL, "rope_theta": 500000}).rope_theta == 500000.0
    nested = {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 3.0}
    assert LLAMA.from_hugging_face({**MINIMAL, **nested}).rope_theta == 7.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling=.*llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters=.*yarn"),
        ({"rope_parameters": {"rope_type": "default", "factor": 2.0}}, "rope_parameters=.*factor"),
        ({"rope_scaling": 3}, "rope_scaling=3: expected an object or null"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_theta": "big"}, "rope_theta='big'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"sliding_window": 4096}, "sliding_window=4096"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'.*'silu' or 'swish'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config="),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "dim='32': expected a whole number"),
        ({"num_key_value_heads": 3}, "kv_heads=3: expected a divisor of heads=4"),
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
    ],
)
def test_what_the_decoder_cannot_compute_is_refused_by_key_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        LLAMA.from_hugging_face({**MINIMAL, **change})


def test_unknown_families_and_names():
    with pytest.raises(ConfigError, match="model_type='mamba': the decoder reads llama"):
        family_of({"model_type": "mamba"})
    with pytest.raises(ConfigError, match="model_type=None"):
        family_of({})
    with pytest.raises(ConfigError, match=r"model\.layers\.01\.mlp"):
        LLAMA.to_ours("model.layers.01.mlp.up_proj.weight")
    with pytest.raises(ConfigError, match=r"blocks\.x\.mlp"):
        LLAMA.to_theirs("blocks.x.mlp.up.weight")
    assert LLAMA.to_ours("model.layers.3.self_attn.rotary_emb.inv_freq") is None
    with pytest.raises(ConfigError, match="dim=34 is not divisible by heads=4"):
        LLAMA.to_hugging_face(DecoderConfig(vocabulary=9, dim=34, layers=1, heads=4, head_dim=8, ffn_dim=8))
