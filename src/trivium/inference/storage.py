"""Checkpoints whose weights are stored quantised: what ``quantization_config`` says, and which of it can be read.

No paper.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.base.errors import ConfigError
from trivium.inference.source import FolderSource, Source
from trivium.models.architecture import Architecture


def unquantised(where: Path, source: FolderSource, config: dict[str, Any], model: Architecture) -> Source:
    """``source``, or what its stored numbers stand for. Raises ConfigError for a method that is not known."""
    found = config.get("quantization_config")
    if found is None:
        return source
    raise ConfigError(f"{where}: quantization_config={str(found)[:200]}")
