"""A live tensor being filled range by range, wherever it lies and however it is strided."""

from __future__ import annotations

import torch

from trivium.base.errors import CheckpointError


class Target:
    """``tensor``'s elements in row-major order, to be written in pieces; `finish` when all are."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        contiguous = self._tensor.is_contiguous()
        self._flat = self._tensor.view(-1) if contiguous else torch.empty(tensor.numel(), dtype=tensor.dtype)
        self._through_copy = not contiguous

    def write(self, at: int, values: torch.Tensor, name: str) -> None:
        """Elements from ``at`` on become ``values``; floating-point types may change their width, no other type may."""
        widths = (values.dtype.itemsize, self._flat.dtype.itemsize)
        floats = values.is_floating_point() and self._flat.is_floating_point() and min(widths) > 1
        if values.dtype != self._flat.dtype and not floats:
            raise CheckpointError(f"{name} is stored as {values.dtype} and cannot become {self._flat.dtype}")
        self._flat[at : at + values.numel()].copy_(values)

    def finish(self) -> None:
        """Bring a strided tensor up to what was written."""
        if self._through_copy:
            self._tensor.copy_(self._flat.view(self._tensor.shape))
