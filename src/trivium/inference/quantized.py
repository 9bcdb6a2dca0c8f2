"""Write a model folder with its weights packed in 8 or 4 bits, so that loading it packs nothing again.

No paper. Streams: one tensor in memory at a time. Names are canonical; config.json says besides how it is packed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.base.errors import ConfigError
from trivium.checkpoint.convert import describe
from trivium.checkpoint.folders import FolderWriter, group_files
from trivium.checkpoint.shard_file import Slot as Stored
from trivium.checkpoint.shard_file import count
from trivium.inference.compile import compile_program
from trivium.inference.packing import format_of
from trivium.inference.program_builder import Slot, join
from trivium.inference.storage import OURS
from trivium.inference.stored_packed import SCALES, ZEROS
from trivium.inference.weights import Opened, open_model
from trivium.kernels.matrix import Format, Matrix, pack
from trivium.models.architecture import Architecture
from trivium.models.tensors import tensors


def write_quantized(
    path: str | Path,
    target: str | Path,
    *,
    quantize: str,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> tuple[Path, int]:
    """Pack the model at ``path`` (anything that `weights.load` takes) into folder ``target``.

    Projections become ``quantize``; what `weights.load` never quantises stays as it is. Returns where it was written
    and the number of its parameters. Errors as of `weights.load`, and CheckpointError for a target that holds a model.
    """
    kind: Literal["int8", "int4"]
    if quantize == "int8":
        kind = "int8"
    elif quantize == "int4":
        kind = "int4"
    else:
        raise ConfigError(f"quantize={quantize!r}: expected int8 or int4")
    with open_model(path) as opened:
        formats = packed_formats(opened.architecture, kind)
        config = {
            **_described(opened),
            "quantization_config": {"quant_method": OURS, "version": 1, "weights": kind},
        }
        shapes = tensors(opened.architecture)
        stored = opened.source.dtype
        slots = {name: _slots(opened, name, shape, formats.get(name), stored) for name, shape in shapes.items()}
        plan = group_files([slot for group in slots.values() for slot in group], max_shard_bytes)
        with FolderWriter(target, plan, config, overwrite=overwrite) as writer:
            for name in shapes:
                for tensor in _written(opened.get(name), formats.get(name), stored):
                    writer.append([tensor])
        return writer.target, sum(count(shape) for shape in shapes.values())


def packed_formats(model: Architecture, quantize: Literal["int8", "int4"]) -> dict[str, tuple[Format, int]]:
    """Canonical name → format and group, of the tensors whose rows a program uses as they are."""
    shapes = tensors(model)
    slots: list[Slot] = []

    def shaped(name: str, weight: torch.Tensor) -> Matrix:
        return Matrix(format="float32", layout="plain", rows=weight.shape[0], columns=weight.shape[1], data=weight)

    compile_program(
        model, lambda name: torch.empty(shapes[name], device="meta"), pack=shaped, max_positions=1, slots=slots
    )
    uses: dict[str, list[Slot]] = {}
    for slot in slots:
        for piece in slot.pieces:
            uses.setdefault(piece, []).append(slot)
    found: dict[str, tuple[Format, int]] = {}
    for name, users in uses.items():
        if all(isinstance(slot.holds, Matrix) and slot.make is join for slot in users):
            format, group = format_of(users[0].name, torch.float32, quantize)
            if format != "float32":
                found[name] = (format, group)
    return found


def _described(opened: Opened) -> dict[str, Any]:
    if opened.config:
        return opened.config
    told = describe(opened.path).extra["model"]
    return {"model_type": OURS, "architectures": ["TriviumDecoder"], "model": dict(told)}


def _slots(
    opened: Opened, name: str, shape: tuple[int, ...], packed: tuple[Format, int] | None, dtype: torch.dtype
) -> list[Stored]:
    if packed is None:
        return [Stored(key=name, dtype=dtype if len(shape) > 1 else torch.float32, shape=shape)]
    # What the numbers take, and whether scales keep to 16 bits, only packing tells: it is cheap enough to do twice.
    matrix = pack(opened.get(name), packed[0], group=packed[1])
    parts = {name: matrix.data, name + SCALES: matrix.scales, name + ZEROS: matrix.zeros}
    return [Stored(key=key, dtype=one.dtype, shape=tuple(one.shape)) for key, one in parts.items() if one is not None]


def _written(tensor: torch.Tensor, packed: tuple[Format, int] | None, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    if packed is None:
        yield tensor.to(dtype if tensor.dim() > 1 else torch.float32)
        return
    matrix = pack(tensor, packed[0], group=packed[1])
    yield from (one for one in (matrix.data, matrix.scales, matrix.zeros) if one is not None)
