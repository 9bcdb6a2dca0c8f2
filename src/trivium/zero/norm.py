"""The norm of a sharded gradient, free of order: the same bits for the same gradient, however it is cut.

ZeRO clips by the global norm (section 10 trains with it); the paper leaves the summation open.

[Note: order-free norm]
Floating-point sums depend on their order, so on the number of ranks. Chunks of 16 elements are never split between
ranks: each is
summed in one fixed way. The chunks' squares are then rounded to a grid that the largest gradient element fixes
(agreed by
all ranks) and added as integers, which is exact in any order. Two grids, the second for what the first cut off, keep
60 bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

from trivium.dist.comm import Comm
from trivium.zero.placement import CHUNK

_BLOCK = 2**20
_SAFE = (1e-12, 1e15)


def order_free_norm(parts: Sequence[torch.Tensor], comm: Comm) -> float:
    """The 2-norm of all ranks' ``parts`` together (1-D, each a multiple of 16 elements). Collective; two small
    agreements.

    Within 1e-6 of the norm in fp64. NaN where anything is NaN or infinite.
    """
    largest = _agree_largest(parts, comm)
    if not math.isfinite(largest):
        return math.nan
    if largest == 0.0:
        return 0.0
    exponent = max(min(math.frexp(largest)[1], 1000), -1000)
    chunks = comm.all_reduce_ints([sum(part.numel() for part in parts) // CHUNK])[0]
    fine = 62 - 4 - max(chunks, 1).bit_length()
    wide = not _SAFE[0] <= largest <= _SAFE[1]
    high = low = 0
    for part in parts:
        for start in range(0, part.numel(), _BLOCK):
            more = _sum_block(part[start : start + _BLOCK], exponent, fine, wide)
            high, low = high + more[0], low + more[1]
    high, low = comm.all_reduce_ints([high, low])
    total = (high << fine) + low
    return math.ldexp(_sqrt_of_integer(total), exponent - fine)


def _sqrt_of_integer(total: int) -> float:
    return math.isqrt(total << 64) / 2.0**32 if total else 0.0


def _agree_largest(parts: Sequence[torch.Tensor], comm: Comm) -> float:
    largest = 0.0
    for part in parts:
        if part.numel():
            low, high = (float(bound) for bound in torch.aminmax(part))
            largest = math.inf if not (math.isfinite(low) and math.isfinite(high)) else max(largest, -low, high)
    bits = struct.unpack("<q", struct.pack("<d", largest))[0]
    return float(struct.unpack("<d", struct.pack("<q", comm.all_reduce_ints([bits], "max")[0]))[0])


def _sum_block(block: torch.Tensor, exponent: int, fine: int, wide: bool) -> tuple[int, int]:
    """Sum of the block's squares in units of 2^(2·exponent - fine) and 2^(2·exponent - 2·fine)."""
    dtype = torch.float64 if wide or block.dtype == torch.float64 else torch.float32
    norms = torch.linalg.vector_norm(block.view(-1, CHUNK), dim=1, dtype=dtype).double()
    squares = norms.mul_(math.ldexp(1.0, -exponent)).square_().mul_(2.0**fine)
    whole = squares.round()
    rest = squares.sub_(whole).mul_(2.0**fine).round_()
    return int(whole.to(torch.int64).sum()), int(rest.to(torch.int64).sum())
