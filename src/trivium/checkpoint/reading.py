"""Read a checkpoint of any number of ranks into a model sharded in any way: each rank only the ranges its pieces need.

ZeRO section 5: a rank's partition is found in the partitions that were saved, by name and range.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivium.base import log
from trivium.base.errors import CheckpointError
from trivium.base.fault import reach
from trivium.checkpoint import commit, manifest, manifest_reading, strict_json
from trivium.checkpoint.damage import DamagedError, damage
from trivium.checkpoint.differences import Difference, common, report
from trivium.checkpoint.dtypes import from_bytes
from trivium.checkpoint.layout import Layout, Optimizers, layout_of
from trivium.checkpoint.manifest import Manifest, ParameterRecord
from trivium.checkpoint.peers import Peers, peers_of, together
from trivium.checkpoint.shard_file import ShardReader
from trivium.checkpoint.targets import Target
from trivium.dist.mesh import Mesh
from trivium.dist.shard import Entry

_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".distcp")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """Elements [start, start + length) of a stored tensor go to ``target`` at ``at``."""

    rank: int
    key: str
    start: int
    length: int
    target: Target
    at: int
    name: str


def load(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizers = None,
    mesh: Mesh | Peers | None = None,
    strict: bool = True,
) -> Any:
    """Load the checkpoint ``folder`` into ``model`` and ``optimizer``, whatever layouts write and read.

    Collective: every rank calls it, reads the ranges of its own pieces, verifies the hash of every block it reads and
    writes into the live tensors; at the end ``publish`` brings all copies up to them. Values are bit-equal where the
    types are; a wider or narrower floating-point type is converted. Optimizer states and hyper-parameters become those
    of the checkpoint. Without ``optimizer`` the states are left unread.

    ``strict=False`` skips what is missing, superfluous or of another shape, and says what.

    Returns:
        The ``extra`` that was saved.

    Raises:
        CheckpointError: not a checkpoint, damaged (file, tensor and offset named), or of another model (a table).
    """
    peers = peers_of(mesh)
    path = Path(folder)
    refuse_pickle(path)
    whole = together(peers, f"opening {path}", lambda: check_files(path, sizes=peers.rank == 0))
    layout = together(peers, "looking at the model", lambda: layout_of(model, optimizer, rank=peers.rank))
    found = together(peers, "comparing the checkpoint with the model", lambda: _compare(layout, whole))
    skipped = common(peers.all_gather_json([row.as_list() for row in found]))
    if skipped:
        table = report(path, skipped)
        if strict:
            raise CheckpointError(table)
        if peers.rank == 0:
            log.get().warning("%s", table)
    skip = {row.name for row in skipped}
    together(peers, f"reading {path}", lambda: _fill(path, whole, layout, skip, peers.rank))
    layout.publish()
    return strict_json.decode(whole.extra, f"{path}: extra")


def refuse_pickle(path: Path) -> None:
    """Raise CheckpointError when ``path`` is, or holds, a checkpoint that only pickle could read. Nothing is opened."""
    suspects = [path] if path.suffix in _PICKLES or path.name == ".metadata" else []
    if path.is_dir() and not (path / manifest.MANIFEST).exists():
        with os.scandir(path) as entries:
            suspects += [
                Path(entry.path)
                for entry in entries
                if entry.name == ".metadata" or Path(entry.name).suffix in _PICKLES
            ]
    if suspects:
        raise CheckpointError(
            f"{suspects[0]} can only be read by unpickling, which may run code: Trivium never does. Save it as "
            "safetensors where you trust it, then bring it in with 'trivium convert'"
        )


def check_files(folder: Path, *, sizes: bool = True) -> Manifest:
    """The manifest of ``folder``, every file it names being there, of the right size, and none beside them.

    Raises DamagedError, or CheckpointError when there is no checkpoint at all. Reads no tensor.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: there is no checkpoint. Give the folder that checkpoint.save wrote"
        )
    if not (folder / manifest.MANIFEST).exists():
        raise DamagedError(f"{folder} has no {manifest.MANIFEST}: not a checkpoint, or one that was never completed")
    with damage():
        whole = manifest_reading.read_manifest(folder)
        if not sizes:
            return whole
        expected = {
            name
            for file in whole.files
            for name in (manifest.shard_name(file.rank), manifest.rank_manifest_name(file.rank))
        }
        with os.scandir(folder) as entries:
            there = {entry.name: entry for entry in entries if entry.name.startswith("rank-")}
            missing, superfluous = sorted(expected - set(there)), sorted(set(there) - expected)
            if missing:
                raise CheckpointError(f"{folder / missing[0]} is missing ({len(missing)} of {len(expected)} files are)")
            if superfluous:
                raise CheckpointError(
                    f"{folder / superfluous[0]} does not belong here: the checkpoint has {len(whole.files)} ranks"
                )
            for file in whole.files:
                for name, size in (
                    (manifest.shard_name(file.rank), file.num_bytes),
                    (manifest.rank_manifest_name(file.rank), file.manifest_bytes),
                ):
                    found = there[name].stat(follow_symlinks=False).st_size
                    if found != size:
                        raise CheckpointError(
                            f"{folder / name} has {found} bytes, expected {size}: truncated or altered"
                        )
    return whole


def _by_name(whole: Manifest) -> dict[str, tuple[str, ParameterRecord]]:
    return {name: (key, record) for key, record in whole.parameters.items() for name in record.names}


def _compare(layout: Layout, whole: Manifest) -> list[Difference]:
    """What this rank finds to differ between the model and the checkpoint."""
    stored, rows = _by_name(whole), []
    used: set[str] = set()
    for entry in layout.entries.values():
        matches = {stored[name][0] for name in entry.names if name in stored}
        used |= matches
        here = f"{list(entry.shape)}"
        if not matches:
            rows.append(Difference(name=entry.name, kind="missing", here=here, there="-"))
        elif len(matches) > 1:
            rows.append(
                Difference(
                    name=entry.name,
                    kind="tied",
                    here=f"one parameter: {', '.join(entry.names)}",
                    there=f"{len(matches)} parameters",
                )
            )
        else:
            record = whole.parameters[next(iter(matches))]
            if record.shape != tuple(entry.shape):
                rows.append(Difference(name=entry.name, kind="shape", here=here, there=f"{list(record.shape)}"))
            elif layout.optimizers and record.states and entry.name in layout.places and record.group is None:
                rows.append(Difference(name=entry.name, kind="group", here="optimized", there="in no group"))
    rows += [
        Difference(name=name, kind="superfluous", here="-", there=f"{list(record.shape)}")
        for name, record in whole.parameters.items()
        if name not in used
    ]
    for name, buffer in layout.buffers.items():
        kept = whole.buffers.get(name)
        if kept is None:
            rows.append(Difference(name=name, kind="missing", here=f"buffer {list(buffer.shape)}", there="-"))
        elif kept.shape != tuple(buffer.shape):
            rows.append(
                Difference(name=name, kind="shape", here=f"buffer {list(buffer.shape)}", there=f"{list(kept.shape)}")
            )
    rows += [
        Difference(name=name, kind="superfluous", here="-", there=f"buffer {list(kept.shape)}")
        for name, kept in whole.buffers.items()
        if name not in layout.buffers
    ]
    return rows + _compare_groups(layout, whole)


def _compare_groups(layout: Layout, whole: Manifest) -> list[Difference]:
    if not layout.optimizers:
        return []
    here = [len(optimizer.param_groups) for optimizer in layout.optimizers]
    there = [len(groups) for groups in whole.groups]
    if not there:
        return [
            Difference(
                name="param_groups",
                kind="optimizer",
                here=f"{here} groups",
                there="saved without one: load with optimizer=None",
            )
        ]
    if here != there:
        return [
            Difference(name="param_groups", kind="group", here=f"{here} by optimizer", there=f"{there} by optimizer")
        ]
    stored = _by_name(whole)
    rows = []
    for name, place in layout.places.items():
        names = [other for other in layout.entries[name].names if other in stored]
        kept = stored[names[0]][1].group if names else place
        if kept is not None and kept != place:
            rows.append(
                Difference(
                    name=name,
                    kind="group",
                    here=f"optimizer {place[0]}, group {place[1]}",
                    there=f"optimizer {kept[0]}, group {kept[1]}",
                )
            )
    return rows


def _fill(path: Path, whole: Manifest, layout: Layout, skip: set[str], rank: int) -> None:
    """Read everything that this rank keeps."""
    stored = _by_name(whole)
    jobs: list[_Job] = []
    targets: list[Target] = []
    for entry in layout.entries.values():
        names = [name for name in entry.names if name in stored]
        if entry.piece is None or not names or not skip.isdisjoint(entry.names):
            continue
        name, record = stored[names[0]]
        target = Target(entry.piece.tensor)
        targets.append(target)
        jobs += _range_jobs(record, manifest.parameter_key(name), entry, target, name)
        if entry.name in layout.places and "param_groups" not in skip:
            more, filled = _state_jobs(record, name, entry, layout, whole)
            jobs, targets = jobs + more, targets + filled
    for name, buffer in layout.buffers.items():
        if name in whole.buffers and name not in skip:
            target = Target(buffer)
            targets.append(target)
            jobs.append(
                _Job(
                    rank=whole.buffers[name].rank,
                    key=manifest.buffer_key(name),
                    start=0,
                    length=buffer.numel(),
                    target=target,
                    at=0,
                    name=name,
                )
            )
    _run(path, whole, jobs, rank)
    for target in targets:
        target.finish()
    if "param_groups" not in skip:
        _set_groups(path, whole, layout)
    for name, module in layout.module_states.items():
        if name in whole.module_states:
            module.set_extra_state(strict_json.decode(whole.module_states[name], f"{path}: extra state of {name!r}"))


def _range_jobs(record: ParameterRecord, key: str, entry: Entry, target: Target, name: str) -> Iterable[_Job]:
    """The stored ranges that make up this rank's piece of ``entry``."""
    if entry.piece is None:
        return
    first, last = entry.piece.start, entry.piece.start + entry.piece.tensor.numel()
    for rank, start, length in record.pieces:
        low, high = max(first, start), min(last, start + length)
        if low < high:
            yield _Job(
                rank=rank, key=key, start=low - start, length=high - low, target=target, at=low - first, name=name
            )


def _state_jobs(
    record: ParameterRecord, name: str, entry: Entry, layout: Layout, whole: Manifest
) -> tuple[list[_Job], list[Target]]:
    """Make the optimizer's state of this piece exactly the stored one: jobs for tensors, values at once."""
    jobs: list[_Job] = []
    targets: list[Target] = []
    if entry.piece is None:
        return jobs, targets
    i, j = layout.places[entry.name]
    states, tensor = layout.optimizers[i].state, entry.piece.tensor
    group = layout.optimizers[i].param_groups[j]
    live: dict[str, Any] = states.get(tensor, {})
    for state in [key for key in live if key not in record.states]:
        del live[state]
    for state, kept in record.states.items():
        if kept.kind == "value":
            value = strict_json.decode(kept.value, f"optimizer state {state!r} of {name}")
            live[state] = _scalar(live.get(state), value, tensor, bool(group.get("fused") or group.get("capturable")))
            continue
        shape = torch.Size(kept.shape) if kept.kind == "whole" else tensor.shape
        if kept.kind == "whole" and tensor.shape != entry.shape:
            raise CheckpointError(
                f"optimizer state {state!r} of {name} is whole {list(kept.shape)} and cannot be cut: shard this "
                "optimizer by whole parameter"
            )
        if kept.kind == "whole" and shape.numel() > whole.files[kept.rank].num_bytes:
            raise DamagedError(f"{manifest.MANIFEST}: {state!r} of {name} is larger than the shard it should lie in")
        old = live.get(state)
        if not isinstance(old, torch.Tensor) or old.numel() != shape.numel():
            live[state] = torch.empty(shape, dtype=kept.dtype, device=tensor.device)
        target = Target(live[state])
        targets.append(target)
        if kept.kind == "whole":
            jobs.append(
                _Job(
                    rank=kept.rank,
                    key=manifest.state_key(state, name),
                    start=0,
                    length=shape.numel(),
                    target=target,
                    at=0,
                    name=f"{name} ({state})",
                )
            )
        else:
            jobs += _range_jobs(record, manifest.state_key(state, name), entry, target, f"{name} ({state})")
    if record.states:
        states[tensor] = live
    elif tensor in states:
        del states[tensor]
    return jobs, targets


def _scalar(old: Any, value: Any, tensor: torch.Tensor, on_device: bool) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if isinstance(old, torch.Tensor) and old.dim() == 0:
        with torch.no_grad():
            return old.copy_(value)
    return value.to(tensor.device) if on_device else value


def _run(path: Path, whole: Manifest, jobs: list[_Job], rank: int) -> None:
    """Read shard after shard, in the order of offsets."""

    def before_read() -> None:
        reach("checkpoint.read", rank=rank, step=commit.step_of(path))

    by_rank: dict[int, list[_Job]] = {}
    for job in jobs:
        by_rank.setdefault(job.rank, []).append(job)
    for source, mine in sorted(by_rank.items()):
        with damage():
            told = manifest_reading.read_rank_manifest(path, whole, source)
            with ShardReader(path / manifest.shard_name(source), before_read=before_read) as reader:
                check_header(reader, told)
                for job in mine:
                    if job.key not in told.tensors:
                        raise CheckpointError(f"{reader.path} holds no {job.key!r}, though {manifest.MANIFEST} says so")
                for job in sorted(mine, key=lambda job: told.tensors[job.key].offset):
                    stored = told.tensors[job.key]
                    if (job.start + job.length) * stored.dtype.itemsize > stored.num_bytes:
                        raise CheckpointError(
                            f"{reader.path}: {job.key!r} has {stored.num_bytes} bytes, elements {job.start} to "
                            f"{job.start + job.length} of it were asked for"
                        )
                    for start, data in reader.elements(stored, job.start, job.length, job.name):
                        job.target.write(job.at + start - job.start, from_bytes(data, stored.dtype), job.name)


def check_header(reader: ShardReader, told: manifest.RankManifest) -> None:
    """Raise CheckpointError unless the shard is the one that its rank manifest describes."""
    if reader.num_bytes != told.num_bytes:
        raise CheckpointError(
            f"{reader.path} has {reader.num_bytes} bytes, expected {told.num_bytes}: truncated or altered"
        )
    if manifest.hash_of(bytes(reader.read(0, told.header_bytes))) != told.header_hash:
        raise CheckpointError(
            f"{reader.path}: its header (bytes 0 to {told.header_bytes}) is not the one that was saved: "
            "damaged, or swapped with another rank's"
        )


def _set_groups(path: Path, whole: Manifest, layout: Layout) -> None:
    for optimizer, groups in zip(layout.optimizers, whole.groups, strict=False):
        for group, kept in zip(optimizer.param_groups, groups, strict=False):
            for key, encoded in kept.items():
                value = strict_json.decode(encoded, f"{path}: param_groups {key!r}")
                old = group.get(key)
                if isinstance(old, torch.Tensor) and isinstance(value, torch.Tensor) and old.shape == value.shape:
                    old.copy_(value)
                elif key not in ("params", "param_names"):
                    group[key] = value
