"""One decoder from one config: what is computed. Presets, families of foreign checkpoints, meta-device build."""

from __future__ import annotations

from trivium.models.block import Block
from trivium.models.build import build
from trivium.models.config import DecoderConfig
from trivium.models.decoder import Decoder, Record
from trivium.models.families import FAMILIES, LLAMA, FamilyMap, family_of
from trivium.models.moe_block import MoEBlock
from trivium.models.moe_config import MoEConfig
from trivium.models.presets import PRESETS, preset

__all__ = [
    "FAMILIES",
    "LLAMA",
    "PRESETS",
    "Block",
    "Decoder",
    "DecoderConfig",
    "FamilyMap",
    "MoEBlock",
    "MoEConfig",
    "Record",
    "build",
    "family_of",
    "preset",
]
