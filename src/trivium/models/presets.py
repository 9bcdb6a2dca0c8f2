"""Named shapes from 1M to 1T parameters; each lies within one percent of its name.

ZeRO, tables 1 and 2: "7.5b", "128b" and "1t" are close enough that the paper's figures come out to the digit it prints.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from trivium.base.errors import ConfigError
from trivium.models.config import DecoderConfig

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
