"""Which format each weight is packed in, and packing it: once, straight from the file, or taken over as it is stored.

DeepSpeed Inference section 3.1: weights are laid out for the kernel at load time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Protocol

import torch

from trivium.base.errors import CheckpointError, ConfigError
from trivium.inference.source import Source
from trivium.kernels.matrix import Format, Layout, Matrix, arrange, matrix_bytes, pack, unpack
from trivium.memory.arena import Arena
from trivium.models.families import Part

Quantize = Literal["int8", "int4"] | None
GROUPS = {"int8": 128, "int4": 32}
_NAMES: dict[torch.dtype, Format] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
# Small, and every choice of experts hangs on them: never quantised, never in 16 bits.
_PRECISE = (".router.weight", ".shared_gate.weight", ".mix.0.weight", ".mix.1.weight")


class Readable(Protocol):
    """A folder's tensors under canonical names: `trivium.inference.weights.Opened`."""

    @property
    def source(self) -> Source:
        """Where they come from."""

    @property
    def parts(self) -> dict[str, Part]:
        """Where each lies."""

    def get(self, name: str) -> torch.Tensor:
        """One as floats."""


def precise(name: str) -> bool:
    """Whether a matrix is always fp32, however the rest is stored."""
    return name.endswith(_PRECISE) or name.startswith("identity.")


def format_of(name: str, dtype: torch.dtype, quantize: Quantize) -> tuple[Format, int]:
    """Format and group of the matrix called ``name``; the head stays at 8 bits where the rest has 4."""
    if precise(name):
        return "float32", 0
    if quantize is None:
        return _NAMES[dtype], 0
    if quantize not in GROUPS:
        raise ConfigError(f"quantize={quantize!r}: expected None, {', '.join(GROUPS)}")
    if quantize == "int4" and name == "head.weight":
        return "int8", GROUPS["int8"]
    return quantize, GROUPS[quantize]


class Packer:
    """``get`` and ``pack`` for `compile_program`: reads tensors, packs matrices, counts their bytes.

    ``keep_packed``: weights that are stored as whole numbers stay so unless ``quantize`` says otherwise.
    """

    def __init__(
        self, opened: Readable, *, dtype: torch.dtype, quantize: Quantize, keep_packed: bool, layout: Layout
    ) -> None:
        self._opened, self._dtype, self._quantize = opened, dtype, quantize
        self._keep_packed, self._layout = keep_packed, layout
        self._read: list[str] = []
        self._arena = Arena()
        self.num_bytes = 0

    def get(self, name: str) -> torch.Tensor:
        """The canonical tensor; tables come in the dtype of unquantised weights."""
        tensor = self._opened.get(name)
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{name}: stored as {str(tensor.dtype).removeprefix('torch.')}, expected floats")
        self._read.append(name)
        if name in ("embed.weight", "embed_in.weight", "positions.weight"):
            tensor = tensor.to(self._dtype)
        return tensor

    def pack(self, name: str, weight: torch.Tensor) -> Matrix:
        """``weight`` as the kernel reads it."""
        pieces, self._read = self._read, []
        format, group = format_of(name, self._dtype, self._quantize)
        matrix = None if precise(name) else self._stored(pieces, weight, format)
        if matrix is None:
            try:
                matrix = pack(weight, format, group=group)
            except ConfigError as error:
                raise CheckpointError(f"{name}: {error}") from error
        matrix = self._settled(arrange(matrix, self._layout))
        self.num_bytes += matrix_bytes(matrix)
        return matrix

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that stays, beside the packed weights."""
        return self._arena.keep(tensor)

    def _settled(self, matrix: Matrix) -> Matrix:
        """``matrix`` in memory of the arena: see [Note: holes] in trivium.memory.arena."""
        scales, zeros = matrix.scales, matrix.zeros
        return replace(
            matrix,
            data=self.keep(matrix.data),
            scales=None if scales is None else self.keep(scales),
            zeros=None if zeros is None else self.keep(zeros),
        )

    def _stored(self, pieces: list[str], weight: torch.Tensor, format: Format) -> Matrix | None:
        """The stored whole numbers and scales of ``pieces``, where they are exactly ``weight`` in the right format."""
        kept = self._quantize is None and self._keep_packed
        joined = stored(self._opened, pieces, weight, None if kept else format)
        # A weight that was turned or cut since is not these rows any more.
        return joined if joined is not None and torch.equal(unpack(joined), weight.float()) else None


def stored(
    opened: Readable, pieces: list[str], weight: torch.Tensor, format: Format | None, *, outline: bool = False
) -> Matrix | None:
    """What is stored packed of the last ``pieces`` that were read, as one matrix of ``weight``'s shape.

    None where they are not stored so, or not in ``format`` (None: in any), or in different ways. ``outline``: without
    numbers, on the meta device, for who only counts bytes.
    """
    found: list[Matrix] = []
    for piece in reversed(pieces):  # a weight's parts are what was read last
        part = opened.parts.get(piece)
        matrix = None if part is None else opened.source.packed(part.name, part.expert, outline=outline)
        if part is None or matrix is None:
            return None
        found.insert(0, _rows(matrix, part))
        if sum(one.rows for one in found) >= weight.shape[0]:
            break
    if not found or (format is not None and found[0].format != format):
        return None
    if len({(one.format, one.group, one.zeros is None) for one in found}) > 1:
        return None
    joined = below(found)
    return joined if tuple(weight.shape) == (joined.rows, joined.columns) else None


def _rows(matrix: Matrix, part: Part) -> Matrix:
    """The rows of ``matrix`` that ``part`` means."""
    taken = replace(part, expert=None, transposed=False)
    data = taken.take(matrix.data)
    return replace(
        matrix,
        rows=data.shape[0],
        data=data,
        scales=None if matrix.scales is None else taken.take(matrix.scales),
        zeros=None if matrix.zeros is None else taken.take(matrix.zeros),
    )


def below(matrices: list[Matrix]) -> Matrix:
    """Plain matrices of one format, below one another."""
    first = matrices[0]
    if len(matrices) == 1:
        return first
    return replace(
        first,
        rows=sum(one.rows for one in matrices),
        data=torch.cat([one.data for one in matrices]),
        scales=_joined([one.scales for one in matrices]),
        zeros=_joined([one.zeros for one in matrices]),
    )


def _joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    found = [one for one in tensors if one is not None]
    return torch.cat(found) if len(found) == len(tensors) else None
