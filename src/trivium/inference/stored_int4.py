"""Weights stored by GPTQ and AWQ: eight 4-bit whole numbers to an int32, a scale and a zero per group of inputs.

No paper. N outputs, K inputs, G groups. w[n, k] = (q[n, k] − zero[n, group]) · scale[n, group].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from trivium.base.errors import CheckpointError
from trivium.inference.source import FolderSource
from trivium.inference.stored_blocks import check_scales
from trivium.kernels.matrix import GROUPS, Matrix

_PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
# AWQ's gemm layout: which of eight neighbouring outputs the i-th half byte belongs to.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class GptqSource:
    """GPTQ: ``X.qweight`` [K / 8, N], ``X.qzeros`` [G, N / 8], ``X.scales`` [G, N], ``X.g_idx`` [K].

    ``g_idx`` is each input's group. ``group``: how many inputs share a scale by the config (0: the whole row; None: it
    does not say), and what is stored must agree. ``second``: the second format; the first stores every zero less one.
    """

    def __init__(self, where: Path, source: FolderSource, *, group: int | None = None, second: bool = False) -> None:
        self._source, self._group, self._second = source, group, second
        stored = source.shapes
        self._names = {name.removesuffix(_PARTS[0]) for name in stored if name.endswith(_PARTS[0])}
        kept = {
            name: shape
            for name, shape in stored.items()
            if not (name.endswith(_PARTS) and name.rpartition(".")[0] in self._names)
        }
        for name in self._names:
            kept[f"{name}.weight"] = self._shape(where, name, stored)
        self.shapes: Mapping[str, tuple[int, ...]] = kept
        self._last: tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What the rest of the model has."""
        return self._source.dtype

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The weight [N, K] in fp32, exactly what the whole numbers stand for; other tensors as they are."""
        base = name.removesuffix(".weight")
        if base not in self._names or not name.endswith(".weight"):
            return self._source.read(name, expert)
        codes, zeros, scales, groups = self._parts(base)
        return (codes.float() - zeros.float()[:, groups]) * scales.float()[:, groups]

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """int4 where groups are neighbouring inputs, 32, 64 or 128 of them."""
        base = name.removesuffix(".weight")
        if base not in self._names or not name.endswith(".weight"):
            return None
        rows, columns = self.shapes[name]
        if outline:
            zeros, groups = self._zeros(base), self._index(base)
            stored = self._source.found[base + ".scales"].stored
            scales = torch.empty(rows, zeros.shape[1], dtype=stored.dtype, device="meta")
            codes = torch.empty(rows, columns, dtype=torch.uint8, device="meta")
        else:
            codes, zeros, scales, groups = self._parts(base)
        size = columns // zeros.shape[1]
        if size not in GROUPS["int4"] or not torch.equal(groups, torch.arange(columns) // size):
            return None
        symmetric = bool((zeros == 8).all())
        return Matrix(
            format="int4",
            layout="plain",
            rows=rows,
            columns=columns,
            data=codes[:, 0::2] | (codes[:, 1::2] << 4),
            group=size,
            scales=scales if scales.dtype is torch.float16 else scales.float(),
            zeros=None if symmetric else zeros.to(codes.device),
        )

    def _shape(self, where: Path, name: str, stored: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
        inputs, outputs = self._extents(stored[name + ".qweight"])
        zeros, scales = stored.get(name + ".qzeros", ()), stored.get(name + ".scales", ())
        good = len(scales) == 2 and scales[1] == outputs and zeros == (scales[0], outputs // 8)
        if not good or not scales[0] or inputs % scales[0]:
            raise CheckpointError(
                f"{where}: {name}: qweight {list(stored[name + '.qweight'])}, qzeros {list(zeros)}, scales "
                f"{list(scales)} do not belong together: {outputs} outputs of {inputs} inputs in equal groups"
            )
        index = stored.get(name + ".g_idx")
        told = inputs if self._group == 0 else self._group
        # the last group may be a shorter one only where it is stored which inputs are in it
        if told is not None and (scales[0] != -(-inputs // told) or (index is None and inputs % told)):
            raise CheckpointError(
                f"{where}: {name}.scales has a row for every {inputs // scales[0]} inputs, and group_size in "
                f"config.json says {told}: the weights would not be what they were"
            )
        if index not in (None, (inputs,)):
            raise CheckpointError(f"{where}: {name}.g_idx is {list(index or ())}: expected [{inputs}]")
        for part in (".qweight", ".qzeros"):
            dtype = self._source.found[name + part].stored.dtype
            if dtype is not torch.int32:
                raise CheckpointError(f"{where}: {name}{part} has {dtype}: expected torch.int32")
        return outputs, inputs

    def _extents(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Inputs and outputs."""
        return (shape[0] * 8, shape[1]) if len(shape) == 2 else (0, 0)

    def _parts(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """q uint8 [N, K], zeros uint8 [N, G], scales [N, G], each input's group int64 [K]."""
        if self._last is None or self._last[0] != name:
            scales = self._source.read(name + ".scales").t().contiguous()
            check_scales(name + ".scales", scales.float())
            self._last = (name, self._codes(name), self._zeros(name), scales, self._index(name))
        return self._last[1:]

    def _index(self, name: str) -> torch.Tensor:
        """Each input's group, int64 [K]."""
        columns, groups = self.shapes[f"{name}.weight"][1], self._source.shapes[name + ".scales"][0]
        if name + ".g_idx" not in self._source.shapes:
            return torch.arange(columns) // (columns // groups)
        index = self._source.read(name + ".g_idx").long()
        if int(index.min()) < 0 or int(index.max()) >= groups:
            raise CheckpointError(f"{name}.g_idx names group {int(index.max())}: there are {groups}")
        return index

    def _codes(self, name: str) -> torch.Tensor:
        """q, uint8 [N, K]."""
        return halves(self._source.read(name + ".qweight").t().contiguous()).contiguous()

    def _zeros(self, name: str) -> torch.Tensor:
        """uint8 [N, G]."""
        zeros = halves(self._source.read(name + ".qzeros")).t().contiguous()
        return zeros if self._second else zeros + 1


class AwqSource(GptqSource):
    """AWQ's gemm layout: ``X.qweight`` [K, N / 8] and ``X.qzeros`` [G, N / 8], outputs in an order of their own."""

    def _extents(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return (shape[0], shape[1] * 8) if len(shape) == 2 else (0, 0)

    def _codes(self, name: str) -> torch.Tensor:
        return self._ordered(name + ".qweight")

    def _zeros(self, name: str) -> torch.Tensor:
        return self._ordered(name + ".qzeros")

    def _ordered(self, name: str) -> torch.Tensor:
        flat = halves(self._source.read(name))
        eights = flat.view(flat.shape[0], -1, 8)
        places = torch.tensor([_AWQ_ORDER.index(output) for output in range(8)])
        return eights[:, :, places].flatten(1).t().contiguous()


def halves(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, C] → their eight half bytes, lowest first: uint8 [R, 8 · C]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return ((words[:, :, None] >> shifts) & 15).to(torch.uint8).flatten(1)
