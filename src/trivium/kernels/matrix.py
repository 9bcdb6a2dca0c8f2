"""A weight matrix in the format and layout a kernel reads: fp32, bf16, fp16, int8 or int4, packed once at load.

DeepSpeed Inference section 3.1: weights laid out at load time so that every read is a full cache line.

[Note: quantised products] Weights: int8 w = q · scale, q in ±127, one scale per row or per ``group`` inputs; int4
w = (q − zero) · scale, q in 0 … 15, zero 8 where ``zeros`` is None. Every kernel multiplies them with activations
quantised per token and per group of inputs (of the weights' group; of `ACTIVATION_GROUP` inputs where a scale covers
the row): s = largest magnitude / 127, a = round(x · (127 / largest)). The integer products of a group are summed
exactly, then the groups' sums are combined in fp32 in rising order of inputs.

[Note: panels] 64 rows to a panel, padded with zeros. float32, float16 [panels, columns, 64]; bfloat16 pairs of inputs
[panels, columns / 2, 64, 2], columns padded to 32; int8 stores q + 128 as [panels, columns / 4, 64, 4] and int4
[panels, columns / 8, 64, 4] (low halves inputs 0 … 3 of the eight, high halves 4 … 7), columns padded to 64. Scales and
zeros [panels, groups, 64].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from trivium.base.errors import ConfigError

Format = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Layout = Literal["plain", "panels"]

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "float16", "int8", "int4")
ACTIVATION_GROUP = 128
PANEL = 64
GROUPS = {"int8": (0, 32, 64, 128), "int4": (32, 64, 128)}
_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEARCHED = 1 << 16  # weights that are quantised at once
_PADDING = {"float32": 1, "float16": 1, "bfloat16": 32, "int8": 64, "int4": 64}


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """``rows`` outputs by ``columns`` inputs. Make one with `pack`; read it back with `unpack`.

    ``layout`` "plain" is row by row (what the torch reference and other devices read), "panels" the native kernels'.
    ``group``: inputs that share a scale (int8: 0 means the whole row). ``data`` holds the numbers, ``scales`` fp32 or
    fp16, ``zeros`` the zero points of asymmetric int4. Plain: data [rows, columns] (int4: uint8 [rows, ⌈columns / 2⌉],
    the even column in the low half), scales [rows] or [rows, groups], zeros uint8 [rows, groups].
    """

    format: Format
    layout: Layout
    rows: int
    columns: int
    data: torch.Tensor
    group: int = 0
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def dot_group(self) -> int:
        """Inputs whose integer products are summed exactly, which share one activation scale."""
        return self.group or ACTIVATION_GROUP


def pack(weight: torch.Tensor, format: Format, *, group: int = 0, layout: Layout = "plain") -> Matrix:
    """A float ``weight`` [rows, columns] in ``format``, quantised where that is int8 or int4 (group 0: 32 for int4).

    Raises:
        ConfigError: not a matrix of floats, an unknown format, a group it does not have, numbers that are not finite.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ConfigError(f"pack: expected a float matrix [rows, columns], got {list(weight.shape)} {weight.dtype}")
    rows, columns = weight.shape
    if format in _FLOATS:
        if group:
            raise ConfigError(f"pack: group {group} with {format}: only int8 and int4 have groups")
        plain = Matrix(
            format=format, layout="plain", rows=rows, columns=columns, data=weight.to(_FLOATS[format]).contiguous()
        )
    elif format in GROUPS:
        group = group or min(GROUPS[format])
        if group not in GROUPS[format]:
            raise ConfigError(f"pack: group {group}: {format} has {', '.join(map(str, GROUPS[format]))}")
        if not bool(torch.isfinite(weight).all()):
            raise ConfigError(f"pack: the matrix has values that are not finite; {format} cannot hold them")
        plain = _int8(weight.float(), group) if format == "int8" else _int4(weight.float(), group)
    else:
        raise ConfigError(f"pack: format {format!r}: expected one of {', '.join(FORMATS)}")
    return arrange(plain, layout)


def unpack(matrix: Matrix) -> torch.Tensor:
    """The matrix as its kernels see it: fp32 [rows, columns]."""
    plain = arrange(matrix, "plain")
    if plain.format in _FLOATS:
        return plain.data.float()
    scales = scales_per_group(plain)
    quants = integers(plain).float()
    groups = scales.shape[1]
    width = plain.columns if groups == 1 and not plain.group else plain.group
    spread = scales.repeat_interleave(width, dim=1)[:, : plain.columns]
    return quants.mul_(spread)


def matrix_bytes(matrix: Matrix) -> int:
    """Bytes of all its tensors, padding included: what a kernel reads per use."""
    return sum(t.nbytes for t in (matrix.data, matrix.scales, matrix.zeros) if t is not None)


def integers(plain: Matrix) -> torch.Tensor:
    """q − zero of a plain quantised matrix: int16 [rows, columns]."""
    if plain.format == "int8":
        return plain.data.to(torch.int16)
    halves = torch.stack((plain.data & 15, plain.data >> 4), dim=2).flatten(1)[:, : plain.columns].to(torch.int16)
    if plain.zeros is None:
        return halves - 8
    return halves - plain.zeros.to(torch.int16).repeat_interleave(plain.group, dim=1)[:, : plain.columns]


def scales_per_group(plain: Matrix) -> torch.Tensor:
    """fp32 [rows, groups]; one group where a scale covers the row."""
    if plain.scales is None:
        raise ConfigError(f"a {plain.format} matrix needs scales")
    return plain.scales.float().reshape(plain.rows, -1)


def arrange(matrix: Matrix, layout: Layout) -> Matrix:
    """The same numbers in another layout; ``matrix`` itself where it has that one. Exact both ways."""
    if matrix.layout == layout:
        return matrix
    return _to_panels(matrix) if layout == "panels" else _to_plain(matrix)


def _ceil(count: int, to: int) -> int:
    return -(-count // to)


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups, group], the last group padded with zeros."""
    rows, columns = weight.shape
    groups = _ceil(columns, group)
    missing = groups * group - columns
    return (torch.nn.functional.pad(weight, (0, missing)) if missing else weight).reshape(rows, groups, group)


def _pieces(grouped: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A few rows at a time: what is made of them on the way then stays in the caches."""
    return torch.split(grouped, max(1, _SEARCHED // (grouped.shape[1] * grouped.shape[2])))


def _largest(grouped: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each group: [rows, groups]."""
    return torch.cat([piece.abs().amax(dim=2) for piece in _pieces(grouped)])


def _storable(scales: torch.Tensor) -> torch.Tensor:
    """fp16 where every scale keeps its precision there, else fp32."""
    used = scales[scales != 0].abs()
    fits = not used.numel() or (float(used.min()) > 2.0**-14 and float(used.max()) < 60000.0)
    return scales.half() if fits else scales


def _int8(weight: torch.Tensor, group: int) -> Matrix:
    rows, columns = weight.shape
    grouped = _grouped(weight, group or columns)
    scales = _largest(grouped) / 127.0
    scales = _storable(scales) if group else scales
    inverse = torch.where(scales > 0, 1.0 / scales.float(), 0.0)
    data, row = torch.empty(rows, columns, dtype=torch.int8), 0
    for piece in _pieces(grouped):
        end = row + len(piece)
        quants = (piece * inverse[row:end, :, None]).round_().clamp_(-127, 127)
        data[row:end] = quants.flatten(1)[:, :columns]
        row = end
    kept = scales if group else scales[:, 0].contiguous()
    return Matrix(format="int8", layout="plain", rows=rows, columns=columns, data=data, group=group, scales=kept)


def _int4(weight: torch.Tensor, group: int) -> Matrix:
    """Symmetric: the scale per group, out of a few around largest / −8, with the least squared error."""
    rows, columns = weight.shape
    grouped = _grouped(weight, group)
    dtype = _storable(_largest(grouped) / 8.0).dtype
    pieces = [_int4_rows(piece, dtype) for piece in _pieces(grouped)]
    quants = torch.cat([quants for quants, _ in pieces])
    data = quants.flatten(1)[:, : columns + columns % 2]
    if data.shape[1] % 2:
        data = torch.nn.functional.pad(data, (0, 1), value=8)
    data = (data[:, 0::2] | (data[:, 1::2] << 4)).contiguous()
    scales = torch.cat([scales for _, scales in pieces])
    return Matrix(format="int4", layout="plain", rows=rows, columns=columns, data=data, group=group, scales=scales)


def _int4_rows(grouped: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 quants + 8 of [rows, groups, group], and their scales [rows, groups]."""
    at = grouped.abs().argmax(dim=2, keepdim=True)
    extreme = grouped.gather(2, at)[:, :, 0]
    best_scale = (extreme / -8.0).to(dtype)
    best_error = torch.full_like(extreme, float("inf"))
    for steps in (8.0, 7.6, 7.2, 6.9, 8.4, -7.0, -7.5, -8.0):
        quants = _nearest(grouped, (extreme / -steps).to(dtype))
        # The scale that fits these integers best, by least squares; of the error only what candidates differ in.
        norm, met = (quants * quants).sum(dim=2), quants.mul_(grouped).sum(dim=2)
        fitted = torch.where(norm > 0, met / norm.clamp(min=1.0), 0.0).to(dtype)
        error = (fitted.float() * norm - 2.0 * met) * fitted
        better = error < best_error
        best_scale = torch.where(better, fitted, best_scale)
        best_error = torch.where(better, error, best_error)
    return _nearest(grouped, best_scale).add_(8).to(torch.uint8), best_scale


def _nearest(grouped: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    wide = scale.float()[:, :, None]
    inverse = torch.where(wide != 0, 1.0 / wide, 0.0)
    return (grouped * inverse).round_().clamp_(-8, 7)


def _padded(tensor: torch.Tensor, rows: int, columns: int, value: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]), value=value)


def _to_panels(matrix: Matrix) -> Matrix:
    panels = _ceil(matrix.rows, PANEL)
    rows = panels * PANEL
    columns = _ceil(matrix.columns, _PADDING[matrix.format]) * _PADDING[matrix.format]
    if matrix.format in ("float32", "float16"):
        data = _padded(matrix.data, rows, columns).view(panels, PANEL, columns).transpose(1, 2)
    elif matrix.format == "bfloat16":
        data = _padded(matrix.data, rows, columns).view(panels, PANEL, columns // 2, 2).transpose(1, 2)
    elif matrix.format == "int8":
        biased = matrix.data.view(torch.uint8) ^ 128
        data = _padded(biased, rows, columns, 128).view(panels, PANEL, columns // 4, 4).transpose(1, 2)
    else:
        halves = torch.stack((matrix.data & 15, matrix.data >> 4), dim=2).flatten(1)[:, : matrix.columns]
        eights = _padded(halves, rows, columns, 8).view(panels, PANEL, columns // 8, 2, 4)
        data = (eights[:, :, :, 0] | (eights[:, :, :, 1] << 4)).transpose(1, 2)
    return replace(
        matrix,
        layout="panels",
        data=data.contiguous(),
        scales=_group_panels(matrix.scales, panels),
        zeros=_group_panels(matrix.zeros, panels),
    )


def _group_panels(tensor: torch.Tensor | None, panels: int) -> torch.Tensor | None:
    if tensor is None:
        return None
    wide = tensor.reshape(tensor.shape[0], -1)
    return _padded(wide, panels * PANEL, wide.shape[1]).view(panels, PANEL, -1).transpose(1, 2).contiguous()


def _to_plain(matrix: Matrix) -> Matrix:
    data = matrix.data
    rows = data.shape[0] * PANEL
    if matrix.format in ("float32", "float16"):
        flat = data.transpose(1, 2).reshape(rows, -1)
    elif matrix.format in ("bfloat16", "int8"):
        flat = data.transpose(1, 2).reshape(rows, -1)
        flat = flat if matrix.format == "bfloat16" else (flat ^ 128).view(torch.int8)
    else:
        eights = torch.stack((data & 15, data >> 4), dim=3).transpose(1, 2).reshape(rows, -1)
        even = matrix.columns + matrix.columns % 2
        flat = eights[:, 0:even:2] | (eights[:, 1:even:2] << 4)
    width = flat.shape[1] if matrix.format == "int4" else matrix.columns
    scales = _plain_groups(matrix.scales, matrix.rows)
    return replace(
        matrix,
        layout="plain",
        data=flat[: matrix.rows, :width].contiguous(),
        scales=scales if matrix.group or scales is None else scales[:, 0].contiguous(),
        zeros=_plain_groups(matrix.zeros, matrix.rows),
    )


def _plain_groups(tensor: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    return None if tensor is None else tensor.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
