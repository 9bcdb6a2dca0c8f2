"""Paged attention of one token per sequence in torch, all sequences at once, with shapes that no number decides.

DeepSpeed Inference section 3.1, region 2. S sequences, N blocks read of each, L = N · block size positions, K key
heads, G query heads per key head, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trivium.kernels.program import Attend, Cache
from trivium.kernels.torch_attention import write_entries

_MOST_READ_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What each sequence's newest token may look at: blocks [S, N], positions [S, L], distance [S, L] (0: itself), and
    which of these it must not see."""

    blocks: torch.Tensor
    positions: torch.Tensor
    distance: torch.Tensor
    hidden: torch.Tensor


class DecodeAttention:
    """Attention of a step in which sequence s has the one token at ``positions[s]``: what its layers share.

    ``positions`` int64 [S], ``tables`` int64 [S, B] on the caches' device; entries that no position needs may name any
    block, −1 the last one. Sequences are read in slices: keys and values in fp32 take 256 MiB, or one sequence's own.
    """

    def __init__(self, positions: torch.Tensor, tables: torch.Tensor) -> None:
        self._positions = positions
        self._tables = tables
        self._written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._seen: dict[tuple[int, int | None], _Seen] = {}

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, operation: Attend, cache: Cache
    ) -> torch.Tensor:
        """Write k, v [S, …] into ``cache``, then out [S, heads · value_dim] of q [S, heads · head_dim]."""
        sequences, block_size = q.shape[0], cache.keys.shape[2]
        write_entries(k, v, operation, cache, *self._slots(block_size))
        seen = self._sight(block_size, operation.window)
        queries = q.view(sequences, operation.kv_heads, -1, operation.head_dim)
        entries = seen.positions.shape[1] * operation.kv_heads * (operation.head_dim + operation.value_dim)
        rows = max(1, _MOST_READ_BYTES // (4 * entries))
        parts = [
            _attend_rows(queries[start : start + rows], operation, cache, seen, slice(start, start + rows))
            for start in range(0, sequences, rows)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slots(self, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and slot [S] that each token is written to."""
        if block_size not in self._written:
            column = (self._positions // block_size)[:, None]
            self._written[block_size] = self._tables.gather(1, column)[:, 0], self._positions % block_size
        return self._written[block_size]

    def _sight(self, block_size: int, window: int | None) -> _Seen:
        if (block_size, window) not in self._seen:
            self._seen[block_size, window] = self._look(block_size, window)
        return self._seen[block_size, window]

    def _look(self, block_size: int, window: int | None) -> _Seen:
        width, device = self._tables.shape[1], self._tables.device
        count, first = width, torch.zeros_like(self._positions)
        if window is not None:
            # So many blocks may `window` neighbouring positions touch.
            count = min(width, (window + block_size - 2) // block_size + 1)
            first = (self._positions - (window - 1)).clamp(min=0) // block_size
        columns = first[:, None] + torch.arange(count, device=device)
        # Columns beyond the table hold only positions to come, which are hidden.
        blocks = self._tables.gather(1, columns.clamp(max=width - 1))
        positions = (columns[:, :, None] * block_size + torch.arange(block_size, device=device)).flatten(1)
        distance = positions - self._positions[:, None]
        hidden = distance > 0
        if window is not None:
            hidden = hidden | (distance <= -window)
        return _Seen(blocks=blocks, positions=positions, distance=distance, hidden=hidden)


def _attend_rows(queries: torch.Tensor, operation: Attend, cache: Cache, seen: _Seen, rows: slice) -> torch.Tensor:
    """out [s, heads · value_dim] of queries [s, K, G, D], sequences ``rows`` of the step."""
    blocks, hidden = seen.blocks[rows], seen.hidden[rows]
    keys = _read(cache.keys, cache.key_scales, blocks)
    values = (
        keys[..., : operation.value_dim] if cache.values is None else _read(cache.values, cache.value_scales, blocks)
    )
    # Slots that nobody wrote, and blocks that padding names, may hold anything, NaN too.
    values = values.masked_fill(hidden[:, None, :, None], 0.0)
    scores = (queries @ keys.transpose(2, 3)) * operation.scale
    if operation.softcap is not None:
        scores = operation.softcap * torch.tanh(scores / operation.softcap)
    per_head = (operation.kv_heads, -1)
    if operation.slopes is not None:
        slopes = operation.slopes.view(*per_head, 1)
        scores = scores + slopes * seen.distance[rows][:, None, None, :]
    if operation.biases is not None:
        known = seen.positions[rows].clamp(max=operation.biases.shape[1] - 1)
        scores = scores + operation.biases[:, known].view(*per_head, *known.shape).movedim(2, 0)
    scores = scores.masked_fill(hidden[:, None, None, :], float("-inf"))
    if operation.sinks is not None:
        sinks = operation.sinks.float().view(1, *per_head, 1).expand(len(scores), -1, -1, -1)
        weights = torch.softmax(torch.cat((scores, sinks), dim=3), dim=3)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=3)
    return (weights @ values).flatten(1)


def _read(pages: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor) -> torch.Tensor:
    """fp32 [s, K, L, width] of these blocks [s, N], in order."""
    kept = pages[blocks].transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    if scales is not None:
        kept = kept * scales[blocks].transpose(1, 2)[..., None]
    return kept.flatten(2, 3)
