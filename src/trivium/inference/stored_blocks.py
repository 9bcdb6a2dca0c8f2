"""Weights stored as 8- or 4-bit floats with a scale per block: FP8 (deepseek) and MXFP4 (gpt-oss).

No paper. N outputs, K inputs, E experts, B blocks of 32 inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trivium.base.errors import CheckpointError
from trivium.inference.source import FolderSource
from trivium.kernels.matrix import Matrix

_SCALE = "_scale_inv"
_BLOCK = 32
# What the sixteen 4-bit floats are, doubled.
_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


class Fp8Source:
    """``X.weight`` in e4m3 [N, K], times ``X.weight_scale_inv``, one number per block of rows and columns."""

    def __init__(self, where: Path, source: FolderSource, *, block: tuple[int, int]) -> None:
        self._source, self._block = source, block
        stored = source.shapes
        scaled = {name.removesuffix(_SCALE) for name in stored if name.endswith(_SCALE)}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: shape for name, shape in stored.items() if not name.endswith(_SCALE)
        }
        for name in scaled:
            shape = stored.get(name)
            if shape is None or len(shape) != 2:
                raise CheckpointError(f"{where}: {name}{_SCALE} belongs to a matrix {name}, which is not there")
            expected = tuple(-(-extent // size) for extent, size in zip(shape, block, strict=True))
            if stored[name + _SCALE] != expected:
                raise CheckpointError(
                    f"{where}: {name}{_SCALE} is {list(stored[name + _SCALE])}: blocks of {list(block)} of "
                    f"{list(shape)} need {list(expected)}"
                )
        eight = {name for name, one in source.found.items() if one.stored.dtype.itemsize == 1}
        if eight - scaled:
            raise CheckpointError(f"{where}: {min(eight - scaled)} has 8 bits per element and no {_SCALE} beside it")
        self._scaled = scaled
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16, which the published models compute in."""
        return torch.bfloat16

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Exactly the stored number times its scale, in fp32; other tensors as they are."""
        if name not in self._scaled:
            return self._source.read(name, expert)
        if self._last is None or self._last[0] != name:
            scale = self._source.read(name + _SCALE).float()
            check_scales(name + _SCALE, scale)
            weight = self._source.read(name).float()
            rows, columns = weight.shape
            spread = scale.repeat_interleave(self._block[0], 0)[:rows]
            self._last = (name, weight * spread.repeat_interleave(self._block[1], 1)[:, :columns])
        return self._last[1]

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """Floats: no whole numbers."""
        return None


class Mxfp4Source:
    """Experts as ``X_blocks`` [E, N, B, 16], two 4-bit floats to a byte, and ``X_scales`` [E, N, B], powers of two.

    They stand for a tensor X [E, K, N], as the unquantised checkpoint has it.
    """

    def __init__(self, where: Path, source: FolderSource) -> None:
        self._source = source
        stored = source.shapes
        self._experts = {name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")}
        shapes = {name: shape for name, shape in stored.items() if not name.endswith(("_blocks", "_scales"))}
        for name in self._experts:
            blocks, scales = stored[name + "_blocks"], stored.get(name + "_scales", ())
            if len(blocks) != 4 or blocks[3] * 2 != _BLOCK or scales != blocks[:3]:
                raise CheckpointError(
                    f"{where}: {name}_blocks {list(blocks)} and {name}_scales {list(scales)}: expected [E, N, B, 16] "
                    "and [E, N, B]"
                )
            for part in ("_blocks", "_scales"):
                dtype = source.found[name + part].stored.dtype
                if dtype is not torch.uint8:
                    raise CheckpointError(f"{where}: {name}{part} has {dtype}: expected torch.uint8")
            shapes[name] = (blocks[0], blocks[2] * _BLOCK, blocks[1])
        self.shapes: Mapping[str, tuple[int, ...]] = shapes

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16: it holds every product of a 4-bit float and a power of two."""
        return torch.bfloat16

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """One expert [K, N] (all: [E, K, N]) in fp32, exact."""
        if name not in self._experts:
            return self._source.read(name, expert)
        if expert is None:
            return torch.stack([self.read(name, number) for number in range(self.shapes[name][0])])
        doubled, scales = self._doubled(name, expert)
        return (doubled.float() * scales[:, :, None]).flatten(1).t()

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """int8 in groups of 32: twice the 4-bit floats are whole numbers up to 12."""
        if name not in self._experts or expert is None:
            return None
        if outline:
            _, columns, rows = self.shapes[name]
            doubled = torch.empty(rows, columns // _BLOCK, _BLOCK, dtype=torch.int8, device="meta")
            scales = torch.empty(rows, columns // _BLOCK, dtype=torch.float32, device="meta")
        else:
            doubled, scales = self._doubled(name, expert)
        data = doubled.flatten(1).contiguous()
        return Matrix(
            format="int8",
            layout="plain",
            rows=data.shape[0],
            columns=data.shape[1],
            data=data,
            group=_BLOCK,
            scales=scales,
        )

    def _doubled(self, name: str, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 [N, B, 32] and half their scales, fp32 [N, B]."""
        blocks = self._source.read(name + "_blocks", expert)
        exponents = self._source.read(name + "_scales", expert)
        if bool((exponents == 255).any()):
            raise CheckpointError(f"{name}_scales, expert {expert}: a scale is not a number")
        values = torch.tensor(_DOUBLED, dtype=torch.int8)
        pairs = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), dim=-1)
        scales = torch.ldexp(torch.ones(exponents.shape), exponents.int() - 128)
        return pairs.flatten(2), scales


def check_scales(name: str, scales: torch.Tensor) -> None:
    """Raise CheckpointError, naming the tensor, when a scale is zero, infinite or not a number."""
    wrong = ~torch.isfinite(scales) | (scales == 0)
    if bool(wrong.any()):
        place = [int(index) for index in torch.nonzero(wrong)[0]]
        raise CheckpointError(
            f"{name}: the scale at {place} is {float(scales[tuple(place)])} ({int(wrong.sum())} such of "
            f"{scales.numel()}): expected numbers other than zero"
        )
