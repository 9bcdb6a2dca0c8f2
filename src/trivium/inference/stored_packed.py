"""Folders that `trivium convert --quantize` wrote: weights packed once, under canonical names, read back bit by bit.

No paper. ``X`` holds int8 [N, K], or int4 as uint8 [N, K / 2]; ``X.scales`` and ``X.zeros`` lie beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trivium.base.errors import CheckpointError
from trivium.inference.source import FolderSource
from trivium.inference.stored_blocks import check_scales
from trivium.kernels.matrix import GROUPS, Matrix, integers, scales_per_group, unpack
from trivium.models.architecture import Architecture
from trivium.models.tensors import tensors

SCALES, ZEROS = ".scales", ".zeros"


class PackedSource:
    """Packed weights as floats, and as they are."""

    def __init__(self, where: Path, source: FolderSource, model: Architecture) -> None:
        self._source = source
        stored, expected = source.shapes, tensors(model)
        shapes: dict[str, tuple[int, ...]] = {}
        self._groups: dict[str, int] = {}
        for name, shape in stored.items():
            if name.endswith((SCALES, ZEROS)) and name.rpartition(".")[0] in stored:
                continue
            shapes[name] = shape
            if name + SCALES in stored:
                shapes[name] = self._checked(where, name, expected.get(name, ()))
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    @property
    def dtype(self) -> torch.dtype:
        """Of the tables and norms."""
        return self._source.dtype

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """What the packed numbers stand for, in fp32; other tensors as they are."""
        matrix = self.packed(name, expert)
        return self._source.read(name, expert) if matrix is None else unpack(matrix)

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """The matrix as it was written."""
        if name not in self._groups:
            return None
        take = self._outlined if outline else self._source.read
        data, scales = take(name), take(name + SCALES)
        if not outline:
            check_scales(name + SCALES, torch.where(scales == 0, 1.0, scales.float()))
        rows, columns = self.shapes[name]
        matrix = Matrix(
            format="int8" if data.dtype is torch.int8 else "int4",
            layout="plain",
            rows=rows,
            columns=columns,
            data=data,
            group=self._groups[name],
            scales=scales,
            zeros=take(name + ZEROS) if name + ZEROS in self._source.shapes else None,
        )
        if not outline and bool((scales == 0).any()):
            _check_empty(name, matrix)
        return matrix

    def _outlined(self, name: str) -> torch.Tensor:
        stored = self._source.found[name].stored
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")

    def _checked(self, where: Path, name: str, expected: tuple[int, ...]) -> tuple[int, ...]:
        one, scales = self._source.found[name].stored, self._source.shapes[name + SCALES]
        format = {torch.int8: "int8", torch.uint8: "int4"}.get(one.dtype)
        if format is None or len(expected) != 2:
            raise CheckpointError(f"{where}: {name} has {name}{SCALES}, but is no packed matrix ({one.dtype})")
        rows, columns = expected
        width = columns if format == "int8" else -(-columns // 2)
        groups = {group: -(-columns // group) if group else 1 for group in GROUPS[format]}
        fitting = [g for g, n in groups.items() if scales == ((rows, n) if g else (rows,))]
        if one.shape != (rows, width) or not fitting:
            raise CheckpointError(
                f"{where}: {name} {list(one.shape)} with scales {list(scales)}: expected {format} of {list(expected)}"
            )
        beside: dict[str, tuple[tuple[torch.dtype, ...], tuple[int, ...]]] = {
            SCALES: ((torch.float32, torch.float16), scales)
        }
        if name + ZEROS in self._source.shapes:
            beside[ZEROS] = ((torch.uint8,), (rows, groups[fitting[0]]))
        for part, (dtypes, shape) in beside.items():
            stored = self._source.found[name + part].stored
            if stored.dtype not in dtypes or stored.shape != shape or (part == ZEROS and format != "int4"):
                raise CheckpointError(
                    f"{where}: {name}{part} is {stored.dtype} {list(stored.shape)}: expected "
                    f"{' or '.join(map(str, dtypes))} {list(shape)}"
                    + (", and that for int4 only" if part == ZEROS else "")
                )
        # Groups larger than the row all mean the same: one group.
        self._groups[name] = fitting[0]
        return expected


def _check_empty(name: str, matrix: Matrix) -> None:
    """A scale of zero is what a group of zeros has; over other numbers it would wipe them out."""
    spread = scales_per_group(matrix).repeat_interleave(matrix.group or matrix.columns, dim=1)[:, : matrix.columns]
    lost = (spread == 0) & (integers(matrix) != 0)
    if bool(lost.any()):
        row, column = (int(index) for index in torch.nonzero(lost)[0])
        raise CheckpointError(
            f"{name}{SCALES}: the scale of row {row}, column {column} is 0, and what it scales is not: expected zero "
            f"only over groups of zeros ({int(lost.sum())} such numbers)"
        )
