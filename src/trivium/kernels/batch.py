"""Checks a step's batch and caches against its program, once, before any kernel trusts a number in them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from trivium.base.errors import ConfigError
from trivium.kernels.program import Attend, Batch, Cache, CacheSpec, Embed, Experts, Program, Rope


def check(program: Program, batch: Batch, caches: Sequence[Cache]) -> None:
    """Every index in range, every shape and dtype as the program says.

    Raises:
        ConfigError: naming the field, what it holds and what it may hold.
    """
    tokens = len(batch.token_ids)
    _check_vectors(batch, tokens)
    vocabulary, positions = _limits(program)
    _check_range("token_ids", batch.token_ids, vocabulary)
    _check_range("positions", batch.positions, positions)
    _check_range("output_rows", batch.output_rows, tokens)
    _check_range("sequences", batch.sequences, batch.block_tables.shape[0])
    check_caches(program, caches)
    _check_order(batch)
    _check_blocks(program, batch, caches)
    _check_routing(program, batch, tokens)


def check_caches(program: Program, caches: Sequence[Cache]) -> None:
    """As many as the program has layers that keep something, each as its layer says. Raises ConfigError."""
    if len(caches) != len(program.caches):
        raise ConfigError(f"caches: the program has {len(program.caches)}, got {len(caches)}")
    for number, (cache, spec) in enumerate(zip(caches, program.caches, strict=True)):
        check_cache(f"cache {number}", cache, spec)


def _check_vectors(batch: Batch, tokens: int) -> None:
    if not tokens:
        raise ConfigError("the batch has no tokens")
    for name in ("token_ids", "positions", "sequences", "output_rows", "block_tables"):
        tensor = getattr(batch, name)
        dims = 2 if name == "block_tables" else 1
        if tensor.dtype != torch.int32 or tensor.device.type != "cpu" or tensor.dim() != dims:
            raise ConfigError(
                f"batch.{name}: expected int32 on the CPU with {dims} dimension(s), "
                f"got {tensor.dtype} on {tensor.device}, shape {list(tensor.shape)}"
            )
    for name in ("positions", "sequences"):
        if len(getattr(batch, name)) != tokens:
            raise ConfigError(f"batch.{name}: {len(getattr(batch, name))} entries for {tokens} tokens")


def _limits(program: Program) -> tuple[int, int]:
    """Tokens of the vocabulary, and positions that every table has."""
    vocabulary = positions = 2**31 - 1
    for operation in program.operations:
        if isinstance(operation, Embed):
            vocabulary = min(vocabulary, operation.table.shape[0])
            if operation.positions is not None:
                positions = min(positions, operation.positions.shape[0] - operation.position_offset)
        elif isinstance(operation, Rope):
            positions = min(positions, operation.table.shape[0])
        elif isinstance(operation, Attend) and operation.biases is not None:
            positions = min(positions, operation.biases.shape[1])
    return vocabulary, positions


def _check_range(name: str, tensor: torch.Tensor, limit: int) -> None:
    if tensor.numel():
        low, high = (int(value) for value in torch.aminmax(tensor))
        if low < 0 or high >= limit:
            raise ConfigError(f"batch.{name}: {low if low < 0 else high}, expected 0 to {limit - 1}")


def check_cache(name: str, cache: Cache, spec: CacheSpec) -> None:
    """One layer's pages fit what the program keeps there.

    Raises:
        ConfigError: naming ``name``, the shape or dtype given and the one wanted.
    """
    pages = [("keys", cache.keys, spec.head_dim, cache.key_scales)]
    if spec.value_dim:
        if cache.values is None:
            raise ConfigError(f"{name}: no values, the program keeps {spec.value_dim} per head")
        pages.append(("values", cache.values, spec.value_dim, cache.value_scales))
    for part, tensor, width, scales in pages:
        wanted = (cache.keys.shape[0], spec.kv_heads, cache.keys.shape[2] if cache.keys.dim() == 4 else 0, width)
        if tuple(tensor.shape) != wanted or not tensor.is_contiguous() or not wanted[2]:
            raise ConfigError(
                f"{name}: {part} {list(tensor.shape)}: expected contiguous "
                f"[blocks, {spec.kv_heads}, block size, {width}]"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.int8) or tensor.dtype != cache.keys.dtype:
            raise ConfigError(
                f"{name}: {part} in {tensor.dtype}: expected float32, bfloat16 or int8, keys and values alike"
            )
        if (scales is not None) != (tensor.dtype == torch.int8) or (
            scales is not None
            and (tuple(scales.shape) != wanted[:3] or scales.dtype != torch.float32 or not scales.is_contiguous())
        ):
            raise ConfigError(f"{name}: int8 {part} and only they have scales, fp32 {list(wanted[:3])}")


def _check_order(batch: Batch) -> None:
    """Tokens of one sequence adjacent, in rising position."""
    same = batch.sequences[1:] == batch.sequences[:-1]
    runs = int((~same).sum()) + 1
    if runs != len(torch.unique(batch.sequences)):
        raise ConfigError("batch.sequences: tokens of one sequence must be adjacent")
    if bool((same & (batch.positions[1:] <= batch.positions[:-1])).any()):
        raise ConfigError("batch.positions: must rise within a sequence")


def _check_blocks(program: Program, batch: Batch, caches: Sequence[Cache]) -> None:
    """Every block that a token writes, or that a query may read, exists."""
    tables = batch.block_tables
    ends = torch.zeros(tables.shape[0], dtype=torch.int64).scatter_reduce_(
        0, batch.sequences.long(), batch.positions.long() + 1, "amax"
    )
    starts = torch.full((tables.shape[0],), 2**31, dtype=torch.int64).scatter_reduce_(
        0, batch.sequences.long(), batch.positions.long(), "amin"
    )
    reaches = {(op.cache, op.window) for op in program.operations if isinstance(op, Attend)}
    seen: set[tuple[int, int, int | None]] = set()
    for number, window in reaches:
        blocks, _, block_size, _ = caches[number].keys.shape
        if (blocks, block_size, window) in seen:
            continue
        seen.add((blocks, block_size, window))
        column = torch.arange(tables.shape[1])
        if int(ends.max()) > tables.shape[1] * block_size:
            raise ConfigError(
                f"batch.block_tables: {tables.shape[1]} entries of {block_size} tokens "
                f"for position {int(ends.max()) - 1}"
            )
        first = torch.zeros_like(starts) if window is None else (starts - window + 1).clamp(min=0)
        needed = (column >= (first // block_size)[:, None]) & (column * block_size < ends[:, None])
        bad = needed & ((tables < 0) | (tables >= blocks))
        if bool(bad.any()):
            row, at = (int(value) for value in torch.nonzero(bad)[0])
            raise ConfigError(f"batch.block_tables[{row}, {at}]: {int(tables[row, at])}, expected 0 to {blocks - 1}")


def _check_routing(program: Program, batch: Batch, tokens: int) -> None:
    if batch.routing is None:
        return
    layers = [op for op in program.operations if isinstance(op, Experts)]
    if len(batch.routing) != program.num_moe_layers:
        raise ConfigError(f"batch.routing: {len(batch.routing)} layers, the program has {program.num_moe_layers}")
    for op in layers:
        chosen = batch.routing[op.layer]
        wanted = (tokens, op.gate.top_k)
        if tuple(chosen.shape) != wanted or chosen.dtype != torch.int32:
            raise ConfigError(
                f"batch.routing[{op.layer}]: {list(chosen.shape)} {chosen.dtype}, expected int32 {wanted}"
            )
        _check_range(f"routing[{op.layer}]", chosen, len(op.experts))


class DecodeCheck:
    """Tells steps in which every sequence has one token, whose row is wanted, in order, and every number is right.

    In some ten microseconds where `check` takes hundreds; what it does not pass may be right too: ask `check`.
    """

    def __init__(self, program: Program, caches: Sequence[Cache]) -> None:
        """Raises ConfigError when ``caches`` do not fit the program."""
        check_caches(program, caches)
        attends = [op for op in program.operations if isinstance(op, Attend)]
        sizes = {(caches[op.cache].keys.shape[0], caches[op.cache].keys.shape[2]) for op in attends}
        self._blocks, self._block_size = sizes.pop() if len(sizes) == 1 else (0, 1)  # several: nothing passes
        windows = [op.window for op in attends if op.window is not None]
        self._window = max(windows) if windows and len(windows) == len(attends) else None
        # So many blocks may `window` neighbouring positions touch.
        self._reach = (
            2**31 - 1 if self._window is None else (self._window + self._block_size - 2) // self._block_size + 1
        )
        self._vocabulary, positions = _limits(program)
        self._positions = min(positions, 2**31 - 1 - self._block_size)

    def passes(self, batch: Batch) -> bool:
        """Whether ``batch`` is such a step."""
        count = len(batch.token_ids)
        vectors = (batch.token_ids, batch.positions, batch.sequences, batch.output_rows)
        if batch.routing is not None or any(tensor.shape != (count,) for tensor in vectors):
            return False
        if batch.block_tables.dim() != 2 or batch.block_tables.shape[0] != count or not count:
            return False
        if any(tensor.dtype != torch.int32 or tensor.device.type != "cpu" for tensor in (*vectors, batch.block_tables)):
            return False
        tokens, positions, sequences, rows = (tensor.numpy() for tensor in vectors)
        tables, order = batch.block_tables.numpy(), np.arange(count)
        if not (sequences == order).all() or not (rows == order).all():
            return False
        if tokens.min() < 0 or tokens.max() >= self._vocabulary or positions.min() < 0:
            return False
        if positions.max() >= min(self._positions, tables.shape[1] * self._block_size):
            return False
        column = np.arange(tables.shape[1])
        needed = column <= (positions // self._block_size)[:, None]
        if self._window is not None:
            needed &= column >= (np.maximum(positions - (self._window - 1), 0) // self._block_size)[:, None]
        # All of a table is read on the device, also what is then hidden: -1 is the last block there.
        return bool(tables.min() >= -1 and tables.max() < self._blocks and not (needed & (tables < 0)).any())

    def share(self, batch: Batch, sequences: int, blocks: int, *, least: int) -> float:
        """Of the blocks that attention reads in a step of so many ``sequences`` with so many ``blocks`` each, what
        ``batch``, which passes, needs; a sequence counts for ``least`` blocks at least."""
        read = min(blocks, self._reach)
        needed = np.clip(batch.positions.numpy() // self._block_size + 1, least, read)
        return float(needed.sum()) / (sequences * read)
