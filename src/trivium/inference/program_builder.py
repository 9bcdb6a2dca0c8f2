"""The list of operations as it grows: registers by name, matrices and vectors from named tensors, tables made once.

DeepSpeed Inference section 3.1. H heads, P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trivium.kernels.matrix import Matrix
from trivium.kernels.program import Norm, Operation, Span
from trivium.models import architecture as arch
from trivium.models.rope_table import rope_table

Pack = Callable[[str, torch.Tensor], Matrix]
Make = Callable[[list[torch.Tensor]], torch.Tensor]
Keep = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Slot:
    """What a program holds under ``name``: a matrix or a tensor that ``make`` makes of the tensors ``pieces``."""

    name: str
    pieces: tuple[str, ...]
    make: Make
    holds: Matrix | torch.Tensor


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """The parts below one another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].flatten()


class Builder:
    """Collects one program. Registers grow to the widest use; tables of equal positions are shared."""

    def __init__(
        self, *, get: Callable[[str], torch.Tensor], pack: Pack, keep: Keep, positions: int, slots: list[Slot] | None
    ) -> None:
        self.operations: list[Operation] = []
        self.num_moe_layers = 0
        self._get, self._pack, self._keep, self._positions = get, pack, keep, positions
        self._slots = slots
        self._registers: dict[str, int] = {}
        self._widths: list[int] = []
        self._ropes: dict[arch.Rope, torch.Tensor] = {}
        self._alibis: dict[arch.Alibi, torch.Tensor] = {}
        self._shared: dict[str, Matrix] = {}

    @property
    def widths(self) -> tuple[int, ...]:
        """Of the registers, by number."""
        return tuple(self._widths)

    def span(self, name: str, width: int) -> Span:
        """The first ``width`` columns of register ``name``."""
        number = self._registers.setdefault(name, len(self._registers))
        if number == len(self._widths):
            self._widths.append(width)
        self._widths[number] = max(self._widths[number], width)
        return Span(number, 0, width)

    def add(self, operation: Operation) -> None:
        """One more operation."""
        self.operations.append(operation)

    def next_moe_layer(self) -> int:
        """The number of the next layer that routes."""
        self.num_moe_layers += 1
        return self.num_moe_layers - 1

    def matrix(self, name: str, pieces: tuple[str, ...] = (), make: Make = join) -> Matrix:
        """A packed weight, of the tensor ``name`` itself or made of ``pieces``."""
        pieces = pieces or (name,)
        matrix = self._pack(name, make([self._get(piece) for piece in pieces]))
        self._note(name, pieces, make, matrix)
        return matrix

    def identity(self, width: int) -> Matrix:
        """The unit matrix, in fp32: copies columns from head to head; one for all layers."""
        name = f"identity.{width}"
        if name not in self._shared:
            self._shared[name] = self._pack(name, torch.eye(width))
        return self._shared[name]

    def tensor(self, name: str, pieces: tuple[str, ...], make: Make = join) -> torch.Tensor:
        """A table as it is stored."""
        made = self._keep(make([self._get(piece) for piece in pieces]).contiguous())
        self._note(name, pieces, make, made)
        return made

    def vector(self, name: str, pieces: tuple[str, ...] = (), make: Make = join) -> torch.Tensor:
        """An fp32 vector."""

        def floats(parts: list[torch.Tensor]) -> torch.Tensor:
            return make([part.float() for part in parts])

        pieces = pieces or (name,)
        made = self._keep(floats([self._get(piece) for piece in pieces]).clone())
        self._note(name, pieces, floats, made)
        return made

    def joined_vector(self, name: str, pieces: tuple[str | None, ...], widths: tuple[int, ...]) -> torch.Tensor:
        """Vectors behind one another, zeros for those that are None."""
        present = tuple(piece for piece in pieces if piece is not None)

        def fill(parts: list[torch.Tensor]) -> torch.Tensor:
            left = iter(parts)
            return torch.cat(
                [
                    torch.zeros(width) if piece is None else next(left)
                    for piece, width in zip(pieces, widths, strict=True)
                ]
            )

        return self.vector(name, present, fill)

    def difference(self, at: str, row: int) -> tuple[Matrix, torch.Tensor]:
        """Row ``row`` minus the other one of a two-row map: the sigmoid of it is the softmax of the two."""

        def minus(parts: list[torch.Tensor]) -> torch.Tensor:
            return parts[0][row : row + 1] - parts[0][1 - row : 2 - row]

        weight = self.matrix(f"{at}.{row}.weight", (f"{at}.weight",), minus)
        return weight, self.vector(f"{at}.{row}.bias", (f"{at}.bias",), minus)

    def norm(self, name: str, norm: arch.Norm | None, x: Span, out: Span, *, group: int | None = None) -> None:
        """Norm x into ``out``; nothing without a norm."""
        if norm is None:
            return
        self.add(
            Norm(
                x=x,
                out=out,
                group=x.width if group is None else group,
                kind=norm.kind,
                eps=norm.eps,
                weight=self.vector(name + ".weight", make=_flat) if norm.weight else None,
                bias=self.vector(name + ".bias", make=_flat) if norm.bias else None,
                offset=norm.offset,
            )
        )

    def rope(self, rope: arch.Rope) -> torch.Tensor:
        """The table of these positions."""
        if rope not in self._ropes:
            self._ropes[rope] = rope_table(rope, self._positions)
        return self._ropes[rope]

    def alibi(self, alibi: arch.Alibi | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Slopes [H], or biases [H, P] where they are rounded."""
        if alibi is None:
            return None, None
        if alibi not in self._alibis:
            slopes_H = torch.tensor(alibi.slopes, dtype=torch.float32)
            if alibi.rounded:
                at_P = torch.arange(self._positions)
                self._alibis[alibi] = (slopes_H[:, None].bfloat16() * at_P).float() * alibi.scale
            else:
                self._alibis[alibi] = slopes_H * alibi.scale
        found = self._alibis[alibi]
        return (None, found) if alibi.rounded else (found, None)

    def _note(self, name: str, pieces: tuple[str, ...], make: Make, holds: Matrix | torch.Tensor) -> None:
        if self._slots is not None:
            self._slots.append(Slot(name, pieces, make, holds))
