"""A config refuses what cannot be built, and its arithmetic is what torch counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trivium.base.errors import ConfigError
from trivium.models import PRESETS, DecoderConfig, build, preset

GOOD = DecoderConfig(vocabulary=50, dim=24, layers=2, heads=4, ffn_dim=40)
NOMINAL = {"m": 10**6, "b": 10**9, "t": 10**12}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocabulary": 0}, "vocabulary=0: expected a whole number of at least 1"),
        ({"layers": True}, "layers=True: expected a whole number"),
        ({"dim": 24.0}, "dim=24.0: expected a whole number"),
        ({"dim": 26}, "dim=26 is not divisible by heads=4"),
        ({"dim": 20}, "head_dim=5: rotary positions need an even number"),
        ({"head_dim": 7}, "head_dim=7: rotary"),
        ({"kv_heads": 3}, "kv_heads=3: expected a divisor of heads=4"),
        ({"kv_heads": 0}, "kv_heads=0"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0: expected a positive number"),
        ({"norm_eps": float("nan")}, "norm_eps=nan"),
        ({"init_std": float("inf")}, "init_std=inf"),
        ({"tied": 1}, "tied=1: expected true or false"),
    ],
)
def test_bad_configs_are_refused_by_key_and_value(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize("name", [name for name, config in PRESETS.items() if config.moe is None])
def test_preset_counts_equal_their_meta_build_and_their_name(name):
    config = PRESETS[name]
    model = build(config, "meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert config.num_block_parameters() == sum(parameter.numel() for parameter in model.blocks[0].parameters())
    assert abs(config.num_parameters() / (float(name[:-1]) * NOMINAL[name[-1]]) - 1) <= 0.01


def test_the_papers_figures_come_out_of_the_presets():
    psi = preset("7.5b").num_parameters()
    per_rank_gb = [(4 + 12 / 64) * psi / 1e9, (2 + 14 / 64) * psi / 1e9, 16 / 64 * psi / 1e9]
    assert [round(per_rank_gb[0], 1), round(per_rank_gb[1], 1), round(per_rank_gb[2], 2)] == [31.4, 16.6, 1.88]
    assert round(16 * preset("1t").num_parameters() / 1024 / 1e9, 1) == 15.6
    assert round(16 * preset("128b").num_parameters() / 1e9) == 2048


def test_benchmark_shapes():
    assert PRESETS["34m"].vocabulary == PRESETS["7.4m"].vocabulary == 8192
    assert abs(PRESETS["34m"].num_parameters() / 33.7e6 - 1) < 0.005
    assert abs(PRESETS["7.4m"].num_parameters() / 7.4e6 - 1) < 0.005


def test_unknown_preset_suggests():
    with pytest.raises(ConfigError, match=r"preset '7.5bb': did you mean '7.5b'\? known presets are 1m, "):
        preset("7.5bb")
    assert preset("1T") == PRESETS["1t"]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_parameters_and_flops_are_what_torch_counts(tied, kv_heads):
    config = dataclasses.replace(GOOD, tied=tied, kv_heads=kv_heads, head_dim=10)
    model = build(config, seed=0)
    assert config.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    assert config.num_embedding_parameters() == 50 * 24 * (1 if tied else 2)

    def attend(q, k, v, *, layer):  # written out, so that the counter sees plain products, forward and backward
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        return (q @ k.mT).softmax(-1) @ v

    batch, sequence = 3, 7
    ids = torch.randint(0, 50, (batch, sequence))
    with FlopCounterMode(display=False) as forward:
        loss = model(ids, ids, attend=attend)
    assert forward.get_total_flops() == batch * sequence * config.forward_flops_per_token(sequence)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    total = forward.get_total_flops() + backward.get_total_flops()
    assert total == batch * sequence * config.flops_per_token(sequence)
