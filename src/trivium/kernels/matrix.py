"""A weight matrix in the format and layout a kernel reads: fp32, bf16, fp16, int8 or int4, packed once at load."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Format = Literal["float32", "bfloat16", "float16", "int8", "int4"]
Layout = Literal["plain", "panels"]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """``rows`` outputs by ``columns`` inputs. Make one with `pack`; read it back with `unpack`.

    ``layout`` "plain" is row by row (what the torch reference and other devices read), "panels" the native kernels'.
    ``group``: inputs that share a scale (int8: 0 means the whole row). ``data`` holds the numbers, ``scales`` fp32 or
    fp16, ``zeros`` the zero points of asymmetric int4.
    """

    format: Format
    layout: Layout
    rows: int
    columns: int
    data: torch.Tensor
    group: int = 0
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
