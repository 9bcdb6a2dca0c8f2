"""Cosines and sines of rotary positions as one table, for every published way to scale them.

No paper of ours. Frequencies are computed in fp32 in the order that the published models' code uses, so that the
angles of far positions agree to the last bit. Shapes: P positions, D turned pairs of columns.
"""

from __future__ import annotations

import math

import torch

from trivium.models.architecture import Rope


def rope_table(rope: Rope, positions: int, *, longest: int | None = None) -> torch.Tensor:
    """fp32 [P, 2·D]: D cosines, then D sines, of positions 0 … P - 1, the attention factor folded in.

    ``longest`` (None: P) is the longest sequence to be computed with this table: "longrope" takes its long factors when
    that exceeds the original length, "dynamic" stretches its base for it. For every position alike, as the published
    models do for a sequence of that length.
    """
    frequencies_D = inverse_frequencies(rope, positions if longest is None else longest)
    angles_PD = torch.arange(positions, dtype=torch.float32)[:, None] * frequencies_D
    return torch.cat((angles_PD.cos(), angles_PD.sin()), 1) * rope.attention_factor


def inverse_frequencies(rope: Rope, longest: int) -> torch.Tensor:
    """fp32 [D]: radians per position of each pair of columns."""
    if rope.kind == "yarn":
        return _yarn(rope)
    if rope.kind == "longrope":
        factors = rope.long_factors if longest > rope.original_positions else rope.short_factors
        return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(rope.dim))
    theta = rope.theta
    if rope.kind == "dynamic":
        length = max(longest, rope.positions)
        stretch = (rope.factor * length / rope.positions) - (rope.factor - 1)
        theta = theta * stretch ** (rope.dim / (rope.dim - 2))
    plain_D = 1.0 / (theta ** _exponents(rope.dim))
    if rope.kind == "linear":
        return plain_D / rope.factor
    return _llama3(rope, plain_D) if rope.kind == "llama3" else plain_D


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64).float() / dim


def _llama3(rope: Rope, plain_D: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by the factor, short ones kept, those between blended."""
    waves_D = 2 * math.pi / plain_D
    longest_kept = rope.original_positions / rope.high_freq_factor
    shortest_slowed = rope.original_positions / rope.low_freq_factor
    slowed_D = torch.where(waves_D > shortest_slowed, plain_D / rope.factor, plain_D)
    blend_D = (rope.original_positions / waves_D - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended_D = (1 - blend_D) * slowed_D / rope.factor + blend_D * slowed_D
    between_D = ~(waves_D < longest_kept) & ~(waves_D > shortest_slowed)
    return torch.where(between_D, blended_D, slowed_D)


def _yarn(rope: Rope) -> torch.Tensor:
    """Pairs that turn often in the original length are kept, those that hardly turn are slowed, a ramp between."""
    powers_D = rope.theta ** _exponents(rope.dim)
    kept_D, slowed_D = 1.0 / powers_D, 1.0 / (rope.factor * powers_D)
    low, high = _turning(rope, rope.beta_fast), _turning(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    if low == high:
        high += 0.001
    ramp_D = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    keep_D = 1 - ramp_D
    return slowed_D * (1 - keep_D) + kept_D * keep_D


def _turning(rope: Rope, turns: float) -> float:
    """The (fractional) pair that turns ``turns`` times over the original length."""
    return (rope.dim * math.log(rope.original_positions / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))
