"""Named shapes from 1M to 1T parameters, each within one percent of its name; and the models of the MoE paper.

ZeRO, tables 1 and 2: "7.5b", "128b" and "1t" are close enough that the paper's figures come out to the digit it prints.

[Note: the paper's MoE models]
DeepSpeed-MoE, sections 3 to 5, counts GPT-2 blocks: feed-forward 8·dim² + 5·dim, attention 4·dim² + 4·dim, learned
positions, a tied table of 50257 words. Here an expert is exactly that feed-forward (``gelu``, with biases); the dense
layers are this decoder's own, SwiGLU with an inner width of 8/3 · dim (8·dim² to within rounding), no biases, rotary
positions. The whole differs from the paper's count by less than 0.2 %. Every other layer has experts, from the second
to the last; in the students of 21 layers from the third to the last, so that they can begin as their teachers' layers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from trivium.base.errors import ConfigError
from trivium.models.config import DecoderConfig
from trivium.models.moe_config import MoEConfig
from trivium.moe import CapacityConfig


def _paper(dim: int, layers: int, heads: int, experts: int | tuple[int, ...], residual: bool = False) -> DecoderConfig:
    """See [Note: the paper's MoE models]."""
    return DecoderConfig(
        vocabulary=50257,
        dim=dim,
        layers=layers,
        heads=heads,
        ffn_dim=round(8 * dim / 3),
        tied=True,
        init_std=0.014,
        moe=MoEConfig(
            experts=experts,
            layers=tuple(range(2 - (layers % 2 == 0), layers, 2)),
            ffn_dim=4 * dim,
            expert="gelu",
            residual="add" if residual else "none",
            capacity=CapacityConfig(factor=1.0),
        ),
    )


PRESETS: Mapping[str, DecoderConfig] = MappingProxyType(
    {
        "1m": DecoderConfig(vocabulary=2048, dim=128, layers=4, heads=4, kv_heads=2, ffn_dim=352, tied=True),
        "4m": DecoderConfig(vocabulary=4096, dim=256, layers=4, heads=4, kv_heads=2, ffn_dim=704, tied=True),
        "7.4m": DecoderConfig(vocabulary=8192, dim=256, layers=4, heads=4, ffn_dim=704),
        "10m": DecoderConfig(vocabulary=8192, dim=320, layers=6, heads=5, ffn_dim=856, tied=True),
        "34m": DecoderConfig(vocabulary=8192, dim=512, layers=8, heads=8, ffn_dim=1376),
        "125m": DecoderConfig(vocabulary=32768, dim=768, layers=12, heads=12, ffn_dim=2592, tied=True),
        "350m": DecoderConfig(vocabulary=32768, dim=1024, layers=24, heads=16, ffn_dim=2928, tied=True),
        "1.3b": DecoderConfig(vocabulary=32768, dim=2048, layers=24, heads=16, ffn_dim=5632, tied=True),
        "6.7b": DecoderConfig(vocabulary=32768, dim=4096, layers=32, heads=32, ffn_dim=10880),
        "7.5b": DecoderConfig(vocabulary=32768, dim=4096, layers=36, heads=32, ffn_dim=10888),
        "13b": DecoderConfig(vocabulary=32768, dim=5120, layers=40, heads=40, ffn_dim=13760),
        "128b": DecoderConfig(vocabulary=32768, dim=12288, layers=70, heads=96, ffn_dim=32912),
        "1t": DecoderConfig(vocabulary=50304, dim=25600, layers=128, heads=160, ffn_dim=67328),
        "moe-350m-128": _paper(1024, 24, 16, 128),
        "moe-1.3b-128": _paper(2048, 24, 16, 128),
        "pr-moe-350m-32/64": _paper(1024, 24, 16, (32,) * 10 + (64,) * 2, residual=True),
        "pr-moe-1.3b-64/128": _paper(2048, 24, 16, (64,) * 10 + (128,) * 2, residual=True),
        "mos-350m-32/64": _paper(1024, 21, 16, (32,) * 8 + (64,) * 2, residual=True),
        "mos-1.3b-64/128": _paper(2048, 21, 16, (64,) * 8 + (128,) * 2, residual=True),
        "moe-2.4b-128": _paper(3584, 16, 28, 128),
        "moe-8b-128": _paper(4096, 40, 32, 128),
        "moe-24b-128": _paper(8192, 30, 64, 128),
        "moe-47b-128": _paper(8192, 58, 64, 128),
    }
)


def preset(name: str) -> DecoderConfig:
    """The shape called ``name``, in any case.

    Raises:
        ConfigError: no preset has this name; the message lists them, the likely one first.
    """
    found = PRESETS.get(name.lower())
    if found is not None:
        return found
    close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"preset {name!r}: {hint}known presets are {', '.join(PRESETS)}")
