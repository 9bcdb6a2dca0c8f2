"""Any module, sharded or not, to and from Hugging Face's layout: tensor by tensor, each rank its slices only.

ZeRO section 5: the whole model never exists on one rank; rank 0 writes, the others send their ranges of one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivium.base import log
from trivium.base.errors import CheckpointError, MismatchError
from trivium.checkpoint import commit
from trivium.checkpoint.differences import Difference, common, report
from trivium.checkpoint.dtypes import dtype_name, dtype_of, from_bytes
from trivium.checkpoint.folders import FolderWriter, Found, open_folder, plan_files, readers
from trivium.checkpoint.layout import Layout, layout_of
from trivium.checkpoint.manifest_reading import check_cover
from trivium.checkpoint.peers import Peers, peers_of, together
from trivium.checkpoint.shard_file import ShardReader, Slot, count
from trivium.checkpoint.targets import Target
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Entry, require_together

Names = Mapping[str, str] | Callable[[str], str] | None


def _translator(names: Names) -> Callable[[str], str]:
    if names is None:
        return lambda name: name
    if isinstance(names, Mapping):
        return lambda name: names.get(name, name)
    return names


def load_hugging_face(
    model: nn.Module,
    folder: str | Path,
    names: Names = None,
    *,
    ignore: Sequence[str] = (r".*rotary_emb\.inv_freq",),
    mesh: Mesh | Peers | None = None,
    strict: bool = True,
) -> None:
    """Fill ``model`` from ``folder``'s safetensors. Collective; each rank reads the byte ranges of its own pieces.

    ``names`` leads from our parameter names to theirs: a mapping (a name it lacks is the same) or a function; None:
    the same names. Of a tied parameter one name suffices; several must hold equal values. Floating-point types are
    converted to the model's. Their tensors matching a pattern in ``ignore`` may be left over. Buffers are read where
    the folder has them.

    Raises:
        CheckpointError: a file is missing, altered or leads out of the folder; names or shapes differ (a table; with
            ``strict=False`` these are skipped and told).
    """
    peers = peers_of(mesh)
    path = Path(folder)
    found = together(peers, f"opening {path}", lambda: open_folder(path))
    layout = together(peers, "looking at the model", lambda: layout_of(model, None, rank=peers.rank))
    theirs = _translator(names)
    mine = together(peers, "comparing the folder with the model", lambda: _compare(layout, found, theirs, ignore))
    skipped = common(peers.all_gather_json([row.as_list() for row in mine]))
    if skipped:
        table = report(path, skipped)
        if strict:
            raise CheckpointError(table)
        if peers.rank == 0:
            log.get().warning("%s", table)
    skip = {row.name for row in skipped}
    together(peers, f"reading {path}", lambda: _fill(layout, found, theirs, skip))
    layout.publish()


def _compare(
    layout: Layout, found: Mapping[str, Found], theirs: Callable[[str], str], ignore: Sequence[str]
) -> list[Difference]:
    rows: list[Difference] = []
    used: set[str] = set()
    shapes = {name: (entry.names, tuple(entry.shape)) for name, entry in layout.entries.items()}
    for name, (names, shape) in shapes.items():
        keys = [key for key in dict.fromkeys(theirs(other) for other in names) if key in found]
        used.update(keys)
        if not keys:
            rows.append(Difference(name=name, kind="missing", here=f"{list(shape)} as {theirs(name)}", there="-"))
        rows += [
            Difference(
                name=name, kind="shape", here=f"{list(shape)}", there=f"{list(found[key].stored.shape)} as {key}"
            )
            for key in keys
            if found[key].stored.shape != shape
        ]
    for name, buffer in layout.buffers.items():
        key = theirs(name)
        if key not in found:
            rows.append(Difference(name=name, kind="missing", here=f"buffer {list(buffer.shape)} as {key}", there="-"))
        elif found[key].stored.shape != tuple(buffer.shape):
            rows.append(
                Difference(
                    name=name,
                    kind="shape",
                    here=f"buffer {list(buffer.shape)}",
                    there=f"{list(found[key].stored.shape)} as {key}",
                )
            )
        used.add(key)
    rows += [
        Difference(name=key, kind="superfluous", here="-", there=f"{list(one.stored.shape)}")
        for key, one in found.items()
        if key not in used and not any(re.fullmatch(text, key) for text in ignore)
    ]
    return rows


def _fill(layout: Layout, found: Mapping[str, Found], theirs: Callable[[str], str], skip: set[str]) -> None:
    jobs: list[tuple[str, list[str], torch.Tensor, int]] = []
    for name, entry in layout.entries.items():
        if entry.piece is not None and name not in skip:
            keys = [key for key in dict.fromkeys(theirs(other) for other in entry.names) if key in found]
            jobs.append((name, keys, entry.piece.tensor, entry.piece.start))
    jobs += [
        (name, [theirs(name)], buffer, 0)
        for name, buffer in layout.buffers.items()
        if name not in skip and theirs(name) in found
    ]
    jobs.sort(key=lambda job: (found[job[1][0]].path, found[job[1][0]].stored.offset))
    with readers(found[key].path for job in jobs for key in job[1]) as files:
        for name, keys, tensor, start in jobs:
            _fill_one(name, [(files[found[key].path], found[key], key) for key in keys], tensor, start)


def _fill_one(name: str, sources: list[tuple[ShardReader, Found, str]], tensor: torch.Tensor, start: int) -> None:
    """Read one piece from the first source; further ones (tied names) must hold the same bytes."""
    reader, one, key = sources[0]
    target = Target(tensor)
    for first, data in reader.elements(one.stored, start, tensor.numel(), name):
        target.write(first - start, from_bytes(data, one.stored.dtype), name)
        for other_reader, other, other_key in sources[1:]:
            size = one.stored.dtype.itemsize
            same = other.stored.dtype == one.stored.dtype
            if not same or other_reader.read(other.stored.offset + first * size, len(data)) != data:
                raise CheckpointError(
                    f"{name} is one parameter here, but {key} and {other_key} differ in {reader.path.parent}: build "
                    "the model without tied weights"
                )
    target.finish()


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One tensor to be written: its name here, its slot there, and which rank has what of it."""

    name: str
    slot: Slot
    pieces: tuple[tuple[int, int, int], ...]


def save_hugging_face(
    model: nn.Module,
    folder: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    names: Names = None,
    max_shard_bytes: int = 5 * 10**9,
    mesh: Mesh | Peers | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``model`` into ``folder`` as ``model.safetensors`` (or index and shards) and ``config.json``. Collective.

    Values are in the types that the module computes with. Rank 0 writes one tensor at a time, the others send it their
    ranges; a tied parameter is written once, under its first name. ``names`` as for `load_hugging_face`. ``config``
    becomes config.json; without it a transformers model's own config is taken. Files appear complete or not at all; a
    folder that has a model already is refused without ``overwrite``.

    Returns:
        Where it was written.
    """
    peers = peers_of(mesh)
    together(peers, "collecting what to export", lambda: require_together(model, "export"))
    layout = together(peers, "collecting what to export", lambda: layout_of(model, None, rank=peers.rank))
    mine = together(peers, "collecting what to export", lambda: _describe(layout, _translator(names), peers.rank))
    everyone = peers.all_gather_json(mine)
    plan = together(peers, "planning the export", lambda: _plan(everyone, max_shard_bytes))
    settings = config if config is not None else _own_config(model, layout)
    writer = together(peers, f"preparing {folder}", lambda: _open(peers, folder, plan, settings, overwrite))
    try:
        failure = _send_all(peers, layout, plan, writer)
    except BaseException as error:  # Ctrl-C too leaves nothing half written
        if writer is not None:
            writer.__exit__(type(error), error, error.__traceback__)
        raise

    def finish() -> None:
        if writer is None:
            return
        try:
            writer.__exit__(None if failure is None else type(failure), failure, None)
        except OSError as error:
            raise commit.disk_error(error, writer.target, "writing") from error
        if isinstance(failure, OSError):
            raise commit.disk_error(failure, writer.target, "writing") from failure
        if failure is not None:
            raise failure

    together(peers, f"writing {folder}", finish)
    return commit.destination(folder)


def _describe(layout: Layout, theirs: Callable[[str], str], rank: int) -> list[list[Any]]:
    """Of each tensor: name, their name, dtype, shape, and this rank's [start, length] or None."""
    rows: list[list[Any]] = []
    for name, entry in layout.entries.items():
        owned = entry.piece if entry.piece is not None and entry.writes else None
        rows.append(
            [
                name,
                theirs(name),
                dtype_name(entry.dtype),
                list(entry.shape),
                None if owned is None else [owned.start, owned.tensor.numel()],
            ]
        )
    if rank == 0:
        rows += [
            [name, theirs(name), dtype_name(buffer.dtype), list(buffer.shape), [0, buffer.numel()]]
            for name, buffer in layout.buffers.items()
        ]
    return rows


def _plan(everyone: list[list[list[Any]]], max_shard_bytes: int) -> dict[str, list[_Part]]:
    """The files and their tensors, the same on every rank."""
    slots: dict[str, tuple[str, Slot]] = {}
    pieces: dict[str, list[tuple[int, int, int]]] = {}
    for rank, rows in enumerate(everyone):
        for name, key, dtype, shape, owned in rows:
            slot = Slot(key=key, dtype=dtype_of(dtype, name), shape=tuple(shape))
            if slots.setdefault(name, (key, slot)) != (key, slot):
                raise MismatchError(
                    f"parameter {name}: rank {rank} has {dtype} {shape} as {key}, another rank {slots[name][1]}"
                )
            if owned is not None:
                pieces.setdefault(name, []).append((rank, *owned))
    parts: dict[str, _Part] = {}
    for name, (key, slot) in slots.items():
        held = sorted(pieces.get(name, []), key=lambda piece: piece[1:])
        check_cover(tuple(held), count(slot.shape), f"parameter {name}")
        if key in parts:
            raise CheckpointError(f"{parts[key].name} and {name} would both be written as {key}")
        parts[key] = _Part(name=name, slot=slot, pieces=tuple(held))
    files = plan_files([part.slot for part in parts.values()], max_shard_bytes)
    return {file: [parts[slot.key] for slot in group] for file, group in files.items()}


def _own_config(model: nn.Module, layout: Layout) -> Mapping[str, Any] | None:
    """The config that a transformers model carries, with the type its weights have."""
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if not callable(to_dict):
        return None
    found = dict(to_dict())
    dtypes = [entry.dtype for entry in layout.entries.values() if entry.dtype.is_floating_point]
    if dtypes:
        found["dtype"] = str(max(set(dtypes), key=dtypes.count)).removeprefix("torch.")
    found["architectures"] = found.get("architectures") or [type(model).__name__]
    return found


def _open(
    peers: Peers, folder: str | Path, plan: Mapping[str, list[_Part]], config: Mapping[str, Any] | None, overwrite: bool
) -> FolderWriter | None:
    if peers.rank != 0:
        return None
    try:
        return FolderWriter(
            folder, {file: [part.slot for part in parts] for file, parts in plan.items()}, config, overwrite=overwrite
        )
    except OSError as error:
        raise commit.disk_error(error, Path(folder), "writing") from error


def _send_all(
    peers: Peers, layout: Layout, plan: Mapping[str, list[_Part]], writer: FolderWriter | None
) -> Exception | None:
    """Gather and write tensor after tensor; what goes wrong on rank 0 is returned, for the others are still sending."""
    failure: Exception | None = None
    for parts in plan.values():
        for part in parts:
            gathered = peers.gather_tensor(_mine(layout, part, peers.rank))
            if writer is None or gathered is None or failure is not None:
                continue
            try:
                writer.append([gathered[rank] for rank, _, _ in part.pieces])
            except (OSError, CheckpointError, RuntimeError) as error:
                failure = error
    return failure


def _mine(layout: Layout, part: _Part, rank: int) -> torch.Tensor:
    """This rank's elements of ``part``, in the type that is written."""
    owns = any(piece[0] == rank for piece in part.pieces)
    entry: Entry | None = layout.entries.get(part.name)
    tensor = layout.buffers.get(part.name) if entry is None else None if entry.piece is None else entry.piece.tensor
    if tensor is None:
        return torch.empty(0, dtype=part.slot.dtype)
    if not owns:
        return torch.empty(0, dtype=part.slot.dtype, device=tensor.device)
    return tensor.detach().reshape(-1).to(part.slot.dtype)
