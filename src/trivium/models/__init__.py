"""One decoder from one config: what is computed. Presets, families of foreign checkpoints, meta-device build."""

from __future__ import annotations

from trivium.models.build import build
from trivium.models.config import DecoderConfig
from trivium.models.decoder import Block, Decoder

__all__ = ["Block", "Decoder", "DecoderConfig", "build"]
