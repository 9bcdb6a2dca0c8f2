"""Paged causal attention in torch, one sequence at a time: the reference of the native kernels.

DeepSpeed Inference section 3.1, region 2. Shapes: T tokens, H heads, L positions kept, D head_dim.
"""

from __future__ import annotations

import torch

from trivium.kernels.program import Attend, Batch, Cache


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, operation: Attend, cache: Cache, *, batch: Batch
) -> torch.Tensor:
    """Write k, v [T, …] into ``cache``, then out [T, heads · value_dim] of q [T, heads · head_dim]."""
    tokens = q.shape[0]
    block_size = cache.keys.shape[2]
    blocks = batch.block_tables[batch.sequences.long(), (batch.positions // block_size).long()].long().to(q.device)
    slots = (batch.positions % block_size).long().to(q.device)
    write_entries(k, v, operation, cache, blocks, slots)
    queries = q.view(tokens, operation.heads, operation.head_dim)
    out = q.new_empty(tokens, operation.heads, operation.value_dim)
    start = 0
    ends = [*torch.nonzero(batch.sequences[1:] != batch.sequences[:-1]).flatten().add(1).tolist(), tokens]
    for end in ends:
        _attend_one(queries[start:end], out[start:end], operation, batch, cache, start, end)
        start = end
    return out.view(tokens, -1)


def write_entries(
    k: torch.Tensor, v: torch.Tensor | None, operation: Attend, cache: Cache, blocks: torch.Tensor, slots: torch.Tensor
) -> None:
    """Token t's keys and values into slot ``slots[t]`` of block ``blocks[t]`` (int64 [T], on the cache's device)."""
    tokens = k.shape[0]
    _write(cache.keys, cache.key_scales, k.view(tokens, operation.kv_heads, operation.head_dim), blocks, slots)
    if cache.values is not None and v is not None:
        values = v.view(tokens, operation.kv_heads, operation.value_dim)
        _write(cache.values, cache.value_scales, values, blocks, slots)


def _write(
    pages: torch.Tensor, scales: torch.Tensor | None, new: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor
) -> None:
    if scales is None:
        pages[blocks, :, slots] = new.to(pages.dtype)
        return
    largest = new.abs().amax(dim=2)
    finite = torch.isfinite(largest)
    safe = torch.where(finite & (largest > 0), largest, 1.0)
    inverse = torch.where(largest > 0, 127.0 / safe, 0.0)
    whole = (new * inverse[:, :, None]).round().clamp(-127, 127)
    pages[blocks, :, slots] = torch.where(finite[:, :, None], whole, 0.0).to(torch.int8)
    scales[blocks, :, slots] = torch.where(finite, largest * (1.0 / 127.0), float("nan"))


def _read(pages: torch.Tensor, scales: torch.Tensor | None, blocks: torch.Tensor) -> torch.Tensor:
    """fp32 [kv_heads, positions, width] of these blocks, in order."""
    kept = pages[blocks].float()
    if scales is not None:
        kept = kept * scales[blocks][..., None]
    return kept.transpose(0, 1).flatten(1, 2)


def _attend_one(
    queries: torch.Tensor, out: torch.Tensor, operation: Attend, batch: Batch, cache: Cache, start: int, end: int
) -> None:
    device = queries.device
    positions = batch.positions[start:end].long()
    block_size = cache.keys.shape[2]
    first = 0 if operation.window is None else max(0, int(positions.min()) - operation.window + 1)
    last = int(positions.max())
    table = batch.block_tables[int(batch.sequences[start])]
    blocks = table[first // block_size : last // block_size + 1].long().to(device)
    seen = torch.arange(first // block_size * block_size, first // block_size * block_size + len(blocks) * block_size)
    distance = (seen[None, :] - positions[:, None]).to(device)
    hidden = distance > 0
    if operation.window is not None:
        hidden |= distance <= -operation.window
    keys = _read(cache.keys, cache.key_scales, blocks)
    if cache.values is None:
        values = keys[:, :, : operation.value_dim]
    else:
        values = _read(cache.values, cache.value_scales, blocks)
    # Slots that nobody wrote may hold anything, NaN too.
    unseen = hidden.all(dim=0)
    keys = keys.masked_fill(unseen[None, :, None], 0.0)
    values = values.masked_fill(unseen[None, :, None], 0.0)
    share = operation.heads // operation.kv_heads
    keys = keys.repeat_interleave(share, dim=0)
    values = values.repeat_interleave(share, dim=0)
    scores = queries.transpose(0, 1) @ keys.transpose(1, 2) * operation.scale
    if operation.softcap is not None:
        scores = operation.softcap * torch.tanh(scores / operation.softcap)
    if operation.slopes is not None:
        scores = scores + operation.slopes.to(device)[:, None, None] * distance
    if operation.biases is not None:
        known = seen.clamp(max=operation.biases.shape[1] - 1)
        scores = scores + operation.biases[:, known].to(device)[:, None, :]
    scores = scores.masked_fill(hidden, float("-inf"))
    if operation.sinks is not None:
        sinks = operation.sinks.to(device).float()[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.softmax(torch.cat((scores, sinks), dim=2), dim=2)[:, :, :-1]
    else:
        scores = torch.softmax(scores, dim=2)
    out[:] = (scores @ values).transpose(0, 1)
