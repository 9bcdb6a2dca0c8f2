"""Checkpoints whose weights are stored quantised: what ``quantization_config`` says, and which of it can be read.

No paper. Each kind is a `Source` that shows the weights as floats, and where that is exact also as whole numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trivium.base.errors import ConfigError
from trivium.inference.source import FolderSource, Source
from trivium.inference.stored_blocks import Fp8Source, Mxfp4Source
from trivium.inference.stored_int4 import AwqSource, GptqSource
from trivium.inference.stored_packed import PackedSource
from trivium.models.architecture import Architecture
from trivium.models.families import Settings

OURS = "trivium"
METHODS = ("awq (4 bits, gemm)", "fp8 (blocks of e4m3)", "gptq (4 bits)", "mxfp4", OURS)


def unquantised(where: Path, source: FolderSource, config: dict[str, Any], model: Architecture) -> Source:
    """``source``, or what its stored numbers stand for.

    Raises:
        ConfigError: a method, a number of bits or a layout that is not known; the message says which are.
        CheckpointError: stored tensors that do not belong together.
    """
    told = config.get("quantization_config")
    if told is None:
        return source
    if not isinstance(told, dict):
        raise ConfigError(f"{where}: quantization_config={str(told)[:100]}: expected an object or no such key")
    settings = Settings(told, f"{where}, quantization_config")
    method = told.get("quant_method")
    if method == "fp8":
        settings.fixed("fmt", "e4m3")
        return Fp8Source(where, source, block=_block(settings))
    if method == "mxfp4":
        return Mxfp4Source(where, source)
    if method in ("gptq", "awq"):
        bits = settings.whole("bits", "w_bit")
        if bits != 4:
            raise settings.wrong("bits", bits, "4")
        if method == "gptq":
            settings.fixed("checkpoint_format", "gptq", "gptq_v2")
            second = told.get("checkpoint_format") == "gptq_v2"
            return GptqSource(where, source, group=_group(settings), second=second)
        settings.fixed("version", "gemm", "GEMM")
        return AwqSource(where, source, group=_group(settings))
    if method == OURS:
        settings.fixed("version", 1)
        return PackedSource(where, source, model)
    raise ConfigError(
        f"{where}: quantization_config.quant_method={str(method)[:100]!r}: Trivium reads {', '.join(METHODS)}"
    )


def _group(settings: Settings) -> int | None:
    """Inputs that share a scale; 0 for the whole row; None where the config does not say."""
    found = settings.get("group_size", "q_group_size")
    if found is None or (type(found) is int and found > 0):
        return found
    if type(found) is not int or found != -1:
        raise settings.wrong("group_size", found, "a whole number of at least 1, or -1 for the whole row")
    return 0


def _block(settings: Settings) -> tuple[int, int]:
    found = settings.get("weight_block_size")
    if not isinstance(found, list) or len(found) != 2 or any(type(one) is not int or one < 1 for one in found):
        raise settings.wrong("weight_block_size", found, "two whole numbers, rows and columns of a block")
    return found[0], found[1]
