"""Draw one token from one row of logits: temperature, top-k, top-p, min-p, and a number between 0 and 1.

V vocabulary, C candidates, likeliest first and equal ones in the order of their ids. In numpy: the
reference of the native kernel (`kernels/native/row_draw.h`), and what runs where there is none. The result depends on
nothing but the row, its settings and that number.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from trivium.inference.request import SamplingParams

Floats = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.intp]

LARGEST = 1e30
_BLOCK = 128
_FIRST_CUT = 64


def draw(logits_V: npt.NDArray[np.float32], params: SamplingParams, uniform: float) -> int:
    """The token at which the running sum of probabilities passes ``uniform``, of those that the settings leave.

    Logits of minus infinity are never drawn; at least one must be finite. Defined at any temperature above 0: the best
    token's weight is 1 whatever it is divided by.
    """
    divisor = np.float32(heat(params.temperature))
    if params.top_k <= 0 and params.top_p >= 1.0:
        return _draw_whole(_weights(logits_V, logits_V.max(), divisor), params.min_p, uniform)
    ids_C, weights_C, whole = _candidates(logits_V, divisor, params)
    running_C = np.cumsum(weights_C, dtype=np.float64)
    keep = len(ids_C)
    if params.top_p < 1.0:
        keep = min(keep, 1 + int(np.searchsorted(running_C, params.top_p * whole, side="left")))
    if params.min_p > 0.0:
        keep = min(keep, max(1, int(np.count_nonzero(weights_C >= params.min_p))))
    return int(ids_C[_place(running_C[:keep], uniform)])


def heat(temperature: float) -> float:
    """What logits are divided by: in the range of fp32."""
    return min(max(temperature, 1 / LARGEST), LARGEST)


def best_of(logits_V: npt.NDArray[np.float32], count: int) -> Ids:
    """The ``count`` likeliest tokens, best first, equal ones in the order of their ids."""
    width = len(logits_V)
    count = min(count, width)
    found: Ids = np.arange(width)
    tops = _per_block(logits_V, np.maximum)
    if count < len(tops):
        # So many blocks have an element at least this large, so at least as many elements do.
        least = np.partition(tops, len(tops) - count)[len(tops) - count]
        found = np.flatnonzero(logits_V >= least)
    order = np.argsort(-logits_V[found], kind="stable")
    return found[order[:count]]


def _candidates(
    logits_V: npt.NDArray[np.float32], heat: np.float32, params: SamplingParams
) -> tuple[Ids, Floats, float]:
    """Tokens that may be drawn, their weights, and the sum that top-p is a share of: what top-k leaves, or all."""
    width = len(logits_V)
    highest = logits_V.max()
    if params.top_k > 0:
        ids_C = best_of(logits_V, params.top_k)
        weights_C = _weights(logits_V[ids_C], highest, heat)
        return ids_C, weights_C, float(np.cumsum(weights_C, dtype=np.float64)[-1])
    weights_V = _weights(logits_V, highest, heat)
    whole = float(np.sum(_per_block(weights_V, np.add), dtype=np.float64))
    ids_C = best_of(logits_V, _FIRST_CUT)
    if float(np.sum(weights_V[ids_C], dtype=np.float64)) <= params.top_p * whole:
        # All that weigh less than this weigh less than 1 − top_p together (half of it: rounding cannot matter).
        least = (1.0 - params.top_p) * whole / (2 * width)
        ids_C = np.flatnonzero(weights_V >= least)
        ids_C = ids_C[np.argsort(-logits_V[ids_C], kind="stable")]
    return ids_C, weights_V[ids_C], whole


def _weights(logits: npt.NDArray[np.float32], highest: np.float32, heat: np.float32) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore", under="ignore"):
        weights: npt.NDArray[np.float32] = np.exp((logits - highest) / heat)
    return weights


def _draw_whole(weights_V: npt.NDArray[np.float32], min_p: float, uniform: float) -> int:
    """Over the whole vocabulary in its own order: first the block, then the token in it."""
    if min_p > 0.0:
        weights_V = np.where(weights_V >= min_p, weights_V, np.float32(0))
    running = np.cumsum(_per_block(weights_V, np.add), dtype=np.float64)
    block = _place(running, uniform)
    before = float(running[block - 1]) if block else 0.0
    inside = np.cumsum(weights_V[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    left = uniform * float(running[-1]) - before
    return block * _BLOCK + _place(inside, min(max(left / float(inside[-1]), 0.0), 1.0))


def _place(running: Floats, uniform: float) -> int:
    """Where a running sum passes ``uniform`` of its end; never at an element that adds nothing."""
    place = int(np.searchsorted(running, uniform * float(running[-1]), side="right"))
    return place if place < len(running) else int(np.searchsorted(running, running[-1], side="left"))


def _per_block(values_V: npt.NDArray[np.float32], reduce: np.ufunc) -> npt.NDArray[np.float32]:
    whole = len(values_V) // _BLOCK * _BLOCK
    found: npt.NDArray[np.float32] = reduce.reduce(values_V[:whole].reshape(-1, _BLOCK), axis=1)
    if whole < len(values_V):
        found = np.append(found, reduce.reduce(values_V[whole:]))
    return found
