"""A checkpoint to Hugging Face's layout and back, without a model: block after block, in one process.

No paper. Optimizer states are left behind on the way out, and there are none on the way in.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import CheckpointError
from trivium.checkpoint import commit, manifest, manifest_reading, strict_json
from trivium.checkpoint.damage import damage
from trivium.checkpoint.dtypes import dtype_name, from_bytes
from trivium.checkpoint.folders import FolderWriter, Found, open_folder, plan_files, readers
from trivium.checkpoint.peers import Alone
from trivium.checkpoint.reading import check_files, check_header, refuse_pickle
from trivium.checkpoint.shard_file import ShardReader, Slot, count
from trivium.checkpoint.writing import aligned, write

Parts = Iterator[torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What is in a checkpoint: its ``extra``, and the type most of its elements have, such as ``"bfloat16"``."""

    extra: Any
    dtype: str
    num_parameters: int


def describe(folder: str | Path) -> Contents:
    """Look into a checkpoint without reading a tensor."""
    path = Path(folder)
    refuse_pickle(path)
    whole = check_files(path)
    sizes: Counter[torch.dtype] = Counter()
    for record in whole.parameters.values():
        sizes[record.dtype] += count(record.shape)
    dtype = sizes.most_common(1)[0][0] if sizes else torch.float32
    return Contents(
        extra=strict_json.decode(whole.extra, f"{path}: extra"),
        dtype=str(dtype).removeprefix("torch."),
        num_parameters=sum(sizes.values()),
    )


def to_hugging_face(
    source: str | Path,
    folder: str | Path,
    *,
    names: Callable[[str], str] = str,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Write the parameters and buffers of checkpoint ``source``, in the types the model computes with, into ``folder``.

    Every block is verified as it is read. ``names`` leads from our names to theirs. Returns where it was written.
    """
    path = Path(source)
    refuse_pickle(path)
    whole = check_files(path)
    tensors: dict[str, tuple[str, list[tuple[int, int]]]] = {}
    slots: list[Slot] = []
    for name, record in whole.parameters.items():
        slots.append(Slot(key=names(name), dtype=record.dtype, shape=record.shape))
        tensors[names(name)] = (manifest.parameter_key(name), [(rank, length) for rank, _, length in record.pieces])
    for name, buffer in whole.buffers.items():
        slots.append(Slot(key=names(name), dtype=buffer.dtype, shape=buffer.shape))
        tensors[names(name)] = (manifest.buffer_key(name), [(buffer.rank, count(buffer.shape))])
    if len(tensors) != len(slots):
        raise CheckpointError(
            f"{len(slots)} tensors would be written under {len(tensors)} names: names must not collide"
        )
    plan = plan_files(slots, max_shard_bytes)
    try:
        with (
            contextlib.ExitStack() as stack,
            FolderWriter(folder, plan, config, overwrite=overwrite) as writer,
            damage(),
        ):
            shards = Shards(path, whole, stack)
            for group in plan.values():
                for slot in group:
                    writer.append(shards.parts(*tensors[slot.key]))
    except OSError as error:
        raise commit.disk_error(error, commit.destination(folder), "writing") from error
    return commit.destination(folder)


class Shards:
    """The shards of a checkpoint, opened when first needed."""

    def __init__(self, path: Path, whole: manifest.Manifest, stack: contextlib.ExitStack) -> None:
        self._path, self._whole, self._stack = path, whole, stack
        self._open: dict[int, tuple[ShardReader, manifest.RankManifest]] = {}

    def parts(self, key: str, pieces: list[tuple[int, int]]) -> Parts:
        """The elements of ``key``, from one rank after another."""
        for rank, length in pieces:
            reader, told = self._shard(rank)
            stored = told.tensors.get(key)
            if stored is None or stored.num_bytes != length * stored.dtype.itemsize:
                raise CheckpointError(f"{reader.path} does not hold the {length} elements of {key!r} that it should")
            for _, data in reader.elements(stored, 0, length, key):
                yield from_bytes(data, stored.dtype)

    def _shard(self, rank: int) -> tuple[ShardReader, manifest.RankManifest]:
        if rank not in self._open:
            told = manifest_reading.read_rank_manifest(self._path, self._whole, rank)
            reader = self._stack.enter_context(ShardReader(self._path / manifest.shard_name(rank)))
            check_header(reader, told)
            self._open[rank] = (reader, told)
        return self._open[rank]


def from_hugging_face(
    source: str | Path,
    folder: str | Path,
    *,
    names: Callable[[str], str | None] = str,
    extra: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the tensors of ``source`` as a checkpoint of one rank into ``folder``, bit by bit.

    ``names`` leads from their names to ours; None leaves a tensor out. Returns where it was written.
    """
    found = open_folder(source)
    slots: list[Slot] = []
    parts: list[Any] = []
    parameters: dict[str, Any] = {}
    with readers(one.path for one in found.values()) as files:
        for key, one in found.items():
            name = names(key)
            if name is None:
                continue
            if name in parameters:
                raise CheckpointError(f"{key} and another tensor would both be called {name}")
            shape, dtype, length = one.stored.shape, one.stored.dtype, count(one.stored.shape)
            slots.append(Slot(key=manifest.parameter_key(name), dtype=dtype, shape=shape))
            parts.append(_elements(files[one.path], one, length, key))
            parameters[name] = {
                "names": [name],
                "shape": list(shape),
                "dtype": dtype_name(dtype),
                "start": 0,
                "length": length,
                "stored": dtype_name(dtype),
                "group": None,
                "states": {},
            }
        report = {"parameters": parameters, "buffers": {}, "module_states": {}, "groups": []}
        return write(folder, aligned(slots, parts, report), extra=extra, peers=Alone(), overwrite=overwrite)


def _elements(reader: ShardReader, one: Found, length: int, name: str) -> Parts:
    for _, data in reader.elements(one.stored, 0, length, name):
        yield from_bytes(data, one.stored.dtype)
