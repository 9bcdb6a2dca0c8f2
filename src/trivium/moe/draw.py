"""Random numbers that are a function of what they are for, not of what was drawn before: the same at any placement.

DeepSpeed-MoE section 3.1: gate noise and the random choice of who is dropped.

[Note: counters]
Number (t, c) is the splitmix64 sequence of a key, at place t·columns + c, so a token draws the same wherever it runs,
alone or in a batch, in forward or in recompute. The arithmetic is on int64 that wraps: equal on every device.
"""

from __future__ import annotations

import hashlib

import torch

_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 24


def key(*numbers: int) -> int:
    """One 63-bit seed from several integers; neighbouring ones give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def uniform(seed: int, first: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """fp32 [rows, columns] strictly between 0 and 1: those of tokens ``first`` to ``first + rows`` under ``seed``."""
    places = torch.arange(first * columns, (first + rows) * columns, device=device)
    mixed = places.mul_(_signed(_STEP)).add_(_signed(seed + _STEP))
    mixed = _fold(mixed, 30).mul_(_signed(_FIRST))
    mixed = _fold(mixed, 27).mul_(_signed(_SECOND))
    mixed = _fold(mixed, 31)
    top = (mixed >> (64 - _BITS)) & (2**_BITS - 1)
    drawn: torch.Tensor = ((top.double() + 0.5) * 2.0**-_BITS).float().clamp_(max=1 - 2.0**-_BITS)
    return drawn.view(rows, columns)


def gumbel(seed: int, first: int, rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """fp32 [rows, columns] of the standard Gumbel law: added to log-weights, the greatest is drawn by weight."""
    return -torch.log(-torch.log(uniform(seed, first, rows, columns, device)))


def _fold(values: torch.Tensor, bits: int) -> torch.Tensor:
    return values.bitwise_xor_((values >> bits) & (2 ** (64 - bits) - 1))


def _signed(number: int) -> int:
    """The int64 of the same bits as ``number`` modulo 2^64."""
    return (number + 2**63) % 2**64 - 2**63
