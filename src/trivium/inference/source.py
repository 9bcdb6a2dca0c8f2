"""Where a model's stored tensors come from: a folder of safetensors or a checkpoint of our own, read one at a time.

No paper. Every offset was checked when the files were opened; no tensor is read before all shapes are known to fit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from trivium.base.errors import CheckpointError
from trivium.checkpoint.convert import Shards
from trivium.checkpoint.dtypes import from_bytes
from trivium.checkpoint.folders import Found, open_folder, readers
from trivium.checkpoint.manifest import Manifest, parameter_key
from trivium.checkpoint.reading import check_files, refuse_pickle
from trivium.checkpoint.shard_file import ShardReader, count
from trivium.kernels.matrix import Matrix


class Source(Protocol):
    """Stored tensors by the names they have there, as floats whatever the files hold."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor, as it would be without quantisation."""

    @property
    def dtype(self) -> torch.dtype:
        """What most stored floating-point elements are, as a type that products can be computed in."""

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The tensor, or entry ``expert`` of its first dimension. A fresh tensor on the CPU."""

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """The same [outputs, inputs] as the whole numbers and scales that are stored; None where it is not exact.

        ``outline``: sizes and types alone, on the meta device, with nothing read but what decides them.
        """


class FolderSource:
    """A Hugging Face folder's tensors, as they are stored."""

    def __init__(self, found: Mapping[str, Found], files: Mapping[Path, ShardReader]) -> None:
        self.found, self._files = found, files
        self._last: tuple[str, torch.Tensor] | None = None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As in the files' headers."""
        return {name: one.stored.shape for name, one in self.found.items()}

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where most elements have no type of their own to compute in."""
        return common_dtype([(one.stored.dtype, count(one.stored.shape)) for one in self.found.values()])

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """Keeps the last whole tensor, for a fused one is asked for part by part."""
        if self._last is not None and self._last[0] == name and expert is None:
            return self._last[1]
        self._last = None
        one = self.found[name]
        stored = one.stored
        if expert is not None:
            shape = stored.shape[1:]
            size = count(shape) * stored.dtype.itemsize
            data = self._files[one.path].read(stored.offset + expert * size, size)
            return from_bytes(data, stored.dtype).reshape(shape)
        data = self._files[one.path].read(stored.offset, stored.num_bytes)
        tensor = from_bytes(data, stored.dtype).reshape(stored.shape)
        self._last = (name, tensor)
        return tensor

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """Nothing is quantised here."""
        return None


class CheckpointSource:
    """A Trivium checkpoint's parameters, put together from the ranks' shards; every block is verified."""

    def __init__(self, whole: Manifest, shards: Shards) -> None:
        self._whole, self._shards = whole, shards
        self._names = {name: record for record in whole.parameters.values() for name in record.names}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of parameters, under each of a tied one's names, and of buffers."""
        buffers = {name: buffer.shape for name, buffer in self._whole.buffers.items()}
        return {**buffers, **{name: record.shape for name, record in self._names.items()}}

    @property
    def dtype(self) -> torch.dtype:
        """The type that most of the model computes with."""
        return common_dtype([(record.dtype, count(record.shape)) for record in self._whole.parameters.values()])

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """The parameter in the type it was saved in."""
        if name in self._names:
            record = self._names[name]
            pieces = [(rank, length) for rank, _, length in record.pieces]
            parts = list(self._shards.parts(parameter_key(record.names[0]), pieces))
            tensor = torch.cat(parts).reshape(record.shape)
        else:
            buffer = self._whole.buffers[name]
            parts = list(self._shards.parts(f"buffers/{name}", [(buffer.rank, count(buffer.shape))]))
            tensor = torch.cat(parts).reshape(buffer.shape)
        return tensor if expert is None else tensor[expert].clone()

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """Nothing is quantised here."""
        return None


def common_dtype(stored: list[tuple[torch.dtype, int]]) -> torch.dtype:
    """float32, float16 or bfloat16, whichever holds most elements; bfloat16 for narrower ones."""
    totals: dict[torch.dtype, int] = {}
    for dtype, size in stored:
        totals[dtype] = totals.get(dtype, 0) + size
    floats = {dtype: size for dtype, size in totals.items() if dtype.is_floating_point}
    if not floats:
        return torch.float32
    most = max(floats, key=lambda dtype: floats[dtype])
    if most is torch.float64:
        return torch.float32
    return most if most in (torch.float32, torch.float16, torch.bfloat16) else torch.bfloat16


@contextlib.contextmanager
def open_safetensors(folder: Path) -> Iterator[FolderSource]:
    """The tensors of a Hugging Face folder; files stay open meanwhile."""
    found = open_folder(folder)
    with readers(one.path for one in found.values()) as files:
        yield FolderSource(found, files)


@contextlib.contextmanager
def open_checkpoint(folder: Path) -> Iterator[CheckpointSource]:
    """The parameters of a Trivium checkpoint."""
    refuse_pickle(folder)
    whole = check_files(folder)
    with contextlib.ExitStack() as stack:
        yield CheckpointSource(whole, Shards(folder, whole, stack))


def table(where: Path, title: str, lines: list[str]) -> CheckpointError:
    """An error with the first lines of a longer list."""
    shown = lines[:12] + ([f"… and {len(lines) - 12} more"] if len(lines) > 12 else [])
    return CheckpointError(f"{where}: {title}:\n  " + "\n  ".join(shown))
