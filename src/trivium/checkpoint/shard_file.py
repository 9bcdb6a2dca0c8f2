"""Safetensors files written and read in a stream: nothing is held beyond one block, every block is hashed once.

ZeRO section 5: a rank's file holds its partition, straight from memory.

[Note: hash tree]
A tensor is hashed in blocks of 4 MiB (xxh3-128), so that a rank reading part of a stored range verifies what it reads
without reading the rest. The hash of a tensor is its block's when there is one, otherwise that of its blocks' digests
in order; the hash of a file is that of the header's digest and the tensors' digests in order. One pass over the data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from xxhash import xxh3_128, xxh3_128_digest, xxh3_128_hexdigest

from trivium.base.errors import CheckpointError
from trivium.checkpoint import strict_json
from trivium.checkpoint.dtypes import dtype_name, dtype_of, raw_bytes

BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A tensor to be written: its key, type and shape."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return count(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file: ``offset`` is absolute; ``blocks`` are the digests of its blocks (empty: not hashed)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    blocks: tuple[bytes, ...] = ()

    @property
    def digest(self) -> bytes:
        """The tensor's hash; see [Note: hash tree]."""
        return root(self.blocks)


def count(shape: Iterable[int]) -> int:
    """The number of elements."""
    total = 1
    for extent in shape:
        total *= extent
    return total


def root(digests: Sequence[bytes]) -> bytes:
    """The digest over ``digests``; of a single one, itself."""
    return digests[0] if len(digests) == 1 else xxh3_128_digest(b"".join(digests))


class ShardWriter:
    """Writes one safetensors file: the header, then each slot in order; calls ``on_block`` before each write."""

    def __init__(
        self,
        path: Path,
        slots: Sequence[Slot],
        metadata: Mapping[str, str],
        on_block: Callable[[], object] = lambda: None,
    ) -> None:
        header = _header(slots, metadata)
        self.path = path
        self.stored: dict[str, Stored] = {}
        self.header_bytes, self.header_hash = len(header), xxh3_128_hexdigest(header)
        self._digests = [xxh3_128_digest(header)]
        self._slots = list(slots)
        self._on_block = on_block
        self._offset = 0
        self._file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            self._write(memoryview(header))
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if len(self.stored) != len(self._slots):
                    raise CheckpointError(f"{self.path}: {len(self.stored)} of {len(self._slots)} tensors were written")
                os.fsync(self._file)
        finally:
            os.close(self._file)

    @property
    def num_bytes(self) -> int:
        """Bytes written so far."""
        return self._offset

    @property
    def hash(self) -> str:
        """The file's hash; see [Note: hash tree]."""
        return root(self._digests).hex()

    def append(self, parts: Iterable[torch.Tensor]) -> None:
        """Write the next slot from ``parts``, consecutive ranges of its elements on any device."""
        slot = self._slots[len(self.stored)]
        start, hasher, filled, blocks = self._offset, xxh3_128(), 0, []
        for part in parts:
            for chunk in _host_chunks(part, slot.dtype):
                while chunk:
                    piece = chunk[: BLOCK_BYTES - filled]
                    hasher.update(piece)
                    self._write(_spoilt(piece, self._on_block()))
                    filled, chunk = filled + len(piece), chunk[len(piece) :]
                    if filled == BLOCK_BYTES:
                        blocks.append(hasher.digest())
                        hasher, filled = xxh3_128(), 0
        if filled or not blocks:
            blocks.append(hasher.digest())
        if self._offset - start != slot.num_bytes:
            raise CheckpointError(
                f"{self.path}: {slot.key} has {self._offset - start} bytes, expected {slot.num_bytes}"
            )
        done = Stored(dtype=slot.dtype, shape=slot.shape, offset=start, num_bytes=slot.num_bytes, blocks=tuple(blocks))
        self._digests.append(done.digest)
        self.stored[slot.key] = done

    def _write(self, data: memoryview) -> None:
        while data:
            written = os.write(self._file, data)
            self._offset += written
            data = data[written:]


def file_bytes(slots: Sequence[Slot], metadata: Mapping[str, str]) -> int:
    """How many bytes the file of ``slots`` will have."""
    return len(_header(slots, metadata)) + sum(slot.num_bytes for slot in slots)


def _spoilt(data: memoryview, action: object) -> memoryview:
    """``data``, or what an armed fault makes of it."""
    if action == "flip":
        wrong = bytearray(data)
        wrong[len(wrong) // 2] ^= 1
        return memoryview(wrong)
    return data[: len(data) // 2] if action == "short" else data


def _header(slots: Sequence[Slot], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for slot in slots:
        if slot.key in entries:
            raise CheckpointError(f"two tensors would be stored under the key {slot.key!r}")
        entries[slot.key] = {
            "dtype": dtype_name(slot.dtype),
            "shape": list(slot.shape),
            "data_offsets": [offset, offset + slot.num_bytes],
        }
        offset += slot.num_bytes
    text = strict_json.dump(entries)
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _host_chunks(part: torch.Tensor, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of ``part`` as ``dtype``; converted and brought to the host a block at a time where needed."""
    flat = part.detach().reshape(-1)
    if flat.dtype == dtype and flat.device.type == "cpu":
        yield raw_bytes(flat)
        return
    step = BLOCK_BYTES // dtype.itemsize
    for start in range(0, flat.numel(), step):
        yield raw_bytes(flat[start : start + step].to(dtype=dtype).cpu())


class ShardReader:
    """Reads ranges of one file's tensors, verifying the blocks it touches. Never follows a link unless told to."""

    def __init__(self, path: Path, *, follow: bool = False, before_read: Callable[[], object] = lambda: None) -> None:
        self.path = path
        self._before_read = before_read
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
        try:
            self._file = os.open(path, flags)
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing") from error
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        self.num_bytes = os.fstat(self._file).st_size

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def read(self, offset: int, num_bytes: int) -> bytearray:
        """Exactly ``num_bytes`` at ``offset``; an I/O error is tried once more, then raised with the place."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        done, failures = 0, 0
        while done < num_bytes:
            try:
                self._before_read()
                got = os.preadv(self._file, [view[done:]], offset + done)
            except OSError as error:
                failures += 1
                if failures > 1:
                    raise CheckpointError(
                        f"{self.path}: reading {num_bytes - done} bytes at offset {offset + done} failed "
                        f"twice: {error.strerror or error}. Check the disk"
                    ) from error
                continue
            if got == 0:
                raise CheckpointError(
                    f"{self.path} is truncated: expected {num_bytes} bytes at offset {offset}, "
                    f"found {done} (the file has {self.num_bytes})"
                )
            done += got
        return data

    def header(self) -> dict[str, Stored]:
        """The tensors that the file's own header lists, every offset checked against the file."""
        if self.num_bytes < 8:
            raise CheckpointError(f"{self.path} has {self.num_bytes} bytes: not a safetensors file")
        length = int.from_bytes(self.read(0, 8), "little")
        limit = min(self.num_bytes - 8, strict_json.json_limit(self.num_bytes))
        if not 2 <= length <= limit:
            raise CheckpointError(
                f"{self.path}: a header of {length} bytes in a file of {self.num_bytes}: expected 2 to {limit}"
            )
        listed = strict_json.parse(bytes(self.read(8, length)), self.path)
        listed.pop("__metadata__", None)
        tensors = {key: _stored(entry, 8 + length, f"{self.path}: {key[:200]!r}") for key, entry in listed.items()}
        end = 8 + length
        for key, stored in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
            if stored.offset != end:
                raise CheckpointError(
                    f"{self.path}: {key[:200]!r} starts at offset {stored.offset}, expected {end}: "
                    "tensors overlap or leave a hole"
                )
            end += stored.num_bytes
        if end != self.num_bytes:
            raise CheckpointError(
                f"{self.path} has {self.num_bytes} bytes, its header tells of {end}: truncated or altered"
            )
        return tensors

    def elements(self, stored: Stored, start: int, length: int, name: str) -> Iterator[tuple[int, bytearray]]:
        """Elements [start, start + length) as (first element, bytes), a block at a time, each verified where hashed."""
        size = stored.dtype.itemsize
        position, end = start * size, (start + length) * size
        while position < end:
            block = position // BLOCK_BYTES
            first, last = block * BLOCK_BYTES, min((block + 1) * BLOCK_BYTES, stored.num_bytes)
            upto = min(end, last)
            if stored.blocks:
                data = self.read(stored.offset + first, last - first)
                if xxh3_128_digest(data) != stored.blocks[block]:
                    raise CheckpointError(
                        f"{self.path}: {name} is damaged: the hash of bytes {stored.offset + first} to "
                        f"{stored.offset + last} is not the one that was saved. Load another checkpoint"
                    )
                if (position, upto) != (first, last):
                    data = data[position - first : upto - first]
            else:
                data = self.read(stored.offset + position, upto - position)
            yield position // size, data
            position = upto


def _stored(entry: object, base: int, where: str) -> Stored:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: expected dtype, shape and data_offsets")
    shape = extents(entry["shape"], where)
    dtype = dtype_of(entry["dtype"], where)
    offsets = sizes(entry["data_offsets"], where)
    num_bytes = count(shape) * dtype.itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != num_bytes:
        raise CheckpointError(
            f"{where}: data_offsets {list(offsets)[:4]} do not hold {num_bytes} bytes of {list(shape)}"
        )
    return Stored(dtype=dtype, shape=shape, offset=base + offsets[0], num_bytes=num_bytes)


def extents(value: object, where: str) -> tuple[int, ...]:
    """``value`` as a shape: at most 64 integers from 0, their product below 2^60. Raises CheckpointError otherwise."""
    shape = sizes(value, where)
    if count(shape) >= 1 << 60:
        raise CheckpointError(f"{where}: {list(shape[:8])} has more than 2^60 elements")
    return shape


def sizes(value: object, where: str) -> tuple[int, ...]:
    """``value`` as a list of at most 64 integers from 0 to 2^60 - 1. Raises CheckpointError otherwise."""
    if not isinstance(value, list) or len(value) > 64:
        raise CheckpointError(f"{where}: expected a list of at most 64 sizes")
    for size in value:
        if type(size) is not int or not 0 <= size < 1 << 60:
            raise CheckpointError(f"{where}: {str(size)[:40]} is not a size: expected 0 to 2^60 - 1")
    return tuple(value)
