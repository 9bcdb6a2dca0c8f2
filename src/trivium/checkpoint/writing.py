"""Write a checkpoint: every rank its own partition at once, rank 0 the manifest, then one rename.

ZeRO section 5: a rank writes what it owns, straight from memory; nothing is gathered.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trivium import __version__
from trivium.base.errors import CheckpointError, ConfigError, MismatchError
from trivium.base.fault import reach
from trivium.checkpoint import commit, manifest, manifest_reading, strict_json
from trivium.checkpoint.dtypes import dtype_name, dtype_of
from trivium.checkpoint.layout import Layout, Optimizers, hyper_parameters, layout_of, split_states
from trivium.checkpoint.peers import Peers, peers_of, together
from trivium.checkpoint.reading import check_files
from trivium.checkpoint.shard_file import ShardWriter, Slot, count, file_bytes
from trivium.dist.mesh import Mesh
from trivium.dist.shard import require_together


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank will write: each slot's elements come from its ``parts``; ``report`` is for rank 0."""

    slots: list[Slot]
    parts: list[Iterable[torch.Tensor]]
    report: dict[str, Any]


def save(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizers = None,
    extra: dict[str, Any] | None = None,
    mesh: Mesh | Peers | None = None,
    keep_last: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Save ``model``, sharded or not, its optimizer or optimizers and ``extra`` as the checkpoint ``folder``.

    Collective: every rank calls it. All ranks must see the same file system. Each writes its own shard; no bytes of
    tensors are sent. ``folder`` appears whole or not at all. ``extra`` of rank 0 is kept: None, bool, int, float, str,
    bytes, list, tuple, dict and small tensors. With ``keep_last`` (2 or more) older numbered neighbours beyond so many
    complete checkpoints are deleted afterwards.

    Returns:
        Where it was written.

    Raises:
        CheckpointError: it exists already, another run writes there, or something cannot be saved.
        CapacityError: the disk is full; earlier checkpoints are intact.
        ConfigError: the place cannot be written, ``keep_last`` is below 2, or experts are spread over the tensor axis.
        MismatchError: ranks disagree on a parameter.
    """
    if keep_last is not None and keep_last < 2:
        raise ConfigError(f"keep_last={keep_last}: expected 2 or more, so that one good checkpoint is always left")
    peers = peers_of(mesh)
    layout = together(peers, "collecting what to save", lambda: _whole(model, optimizer, peers.rank))
    told = peers.all_gather_json([*layout.buffers, *layout.module_states])
    before = {name for names in told[: peers.rank] for name in names}
    shard = together(peers, "collecting what to save", lambda: _collect(layout, peers, before))
    return write(folder, shard, extra=extra, peers=peers, keep_last=keep_last, overwrite=overwrite)


def _whole(model: nn.Module, optimizer: Optimizers, rank: int) -> Layout:
    require_together(model, "save")
    return layout_of(model, optimizer, rank=rank)


def write(
    folder: str | Path,
    shard: Shard,
    *,
    extra: dict[str, Any] | None,
    peers: Peers,
    keep_last: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write and commit every rank's ``shard``; what `save` does once it knows them. Collective."""
    target, run = peers.broadcast_json([str(commit.destination(folder)), secrets.token_hex(4)])
    target = Path(target)
    metadata = {"format": "pt", "writer": "trivium", "run": run, "rank": str(peers.rank)}
    sizes = peers.all_gather_json(file_bytes(shard.slots, metadata))
    with contextlib.ExitStack() as stack:
        temporary = together(
            peers, f"preparing {target}", lambda: _open(peers, stack, target, run, sum(sizes), overwrite)
        )
        try:
            together(
                peers,
                f"writing its shard of {target}",
                lambda: _write_shard(temporary, shard, metadata, peers.rank, target),
            )
            reach("checkpoint.shards", rank=peers.rank, step=commit.step_of(target))
            together(peers, f"completing {target}", lambda: _complete(peers, temporary, target, run, extra, sizes))
        except BaseException:
            if peers.rank == 0:
                commit.discard(temporary)
            raise
        together(peers, "deleting old checkpoints", lambda: _retain(peers, target, run, keep_last))
    return target


@contextlib.contextmanager
def _disk(target: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise commit.disk_error(error, target, doing) from error


def _open(peers: Peers, stack: contextlib.ExitStack, target: Path, run: str, num_bytes: int, overwrite: bool) -> Path:
    """Rank 0: take the lock and make the temporary folder."""
    if peers.rank == 0:
        with _disk(target, "saving"):
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(commit.lock(target.parent))
            commit.require_space(target.parent, num_bytes)
            commit.prepare(target, run, overwrite=overwrite)
    return target.with_name(f"{target.name}.tmp-{run}")


def _collect(layout: Layout, peers: Peers, before: set[str]) -> Shard:
    """The tensors that this rank writes, and what it tells rank 0 about them.

    Buffers and extra states are written by the first rank that has them; ``before`` are those of the ranks before.
    """
    slots: list[Slot] = []
    tensors: list[torch.Tensor] = []

    def add(key: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
        slots.append(Slot(key=key, dtype=tensor.dtype, shape=shape))
        tensors.append(tensor)

    parameters: dict[str, Any] = {}
    for name, entry in layout.entries.items():
        told: dict[str, Any] = {
            "names": list(entry.names),
            "shape": list(entry.shape),
            "dtype": dtype_name(entry.dtype),
        }
        parameters[name] = told
        if entry.piece is None or not entry.writes:
            continue
        tensor = entry.piece.tensor
        shape = tuple(entry.shape) if tensor.numel() == entry.shape.numel() else (tensor.numel(),)
        told |= {
            "start": entry.piece.start,
            "length": tensor.numel(),
            "stored": dtype_name(tensor.dtype),
            "group": layout.places.get(name),
            "states": {},
        }
        add(manifest.parameter_key(name), tensor, shape)
        for state, kind, value in split_states(entry, layout.state_of(entry)):
            record = manifest.StateRecord(kind=kind, value=value)
            if kind != "value":
                record = manifest.StateRecord(kind=kind, dtype=value.dtype, shape=tuple(value.shape), rank=peers.rank)
                add(manifest.state_key(state, name), value, shape if kind == "range" else tuple(value.shape))
            told["states"][state] = manifest.state_body(record)
    buffers: dict[str, Any] = {}
    for name, buffer in layout.buffers.items():
        if name not in before:
            add(manifest.buffer_key(name), buffer, tuple(buffer.shape))
            buffers[name] = {"dtype": dtype_name(buffer.dtype), "shape": list(buffer.shape), "rank": peers.rank}
    states = {
        name: strict_json.encode(module.get_extra_state(), f"extra state of module {name!r}")
        for name, module in layout.module_states.items()
        if name not in before
    }
    report = {
        "parameters": parameters,
        "buffers": buffers,
        "module_states": states,
        "groups": hyper_parameters(layout.optimizers),
    }
    return aligned(slots, [[tensor] for tensor in tensors], report)


def aligned(slots: list[Slot], parts: Sequence[Iterable[torch.Tensor]], report: dict[str, Any]) -> Shard:
    """A shard with the widest types first, so that every tensor starts on a multiple of its element size."""
    order = sorted(range(len(slots)), key=lambda i: -slots[i].dtype.itemsize)
    return Shard(slots=[slots[i] for i in order], parts=[parts[i] for i in order], report=report)


def _write_shard(temporary: Path, shard: Shard, metadata: dict[str, str], rank: int, target: Path) -> None:
    step = commit.step_of(target)
    with _disk(target, "writing a shard of"):
        path = temporary / manifest.shard_name(rank)
        writer = ShardWriter(path, shard.slots, metadata, lambda: reach("checkpoint.shard", rank=rank, step=step))
        with writer:
            for parts in shard.parts:
                writer.append(parts)
        body = manifest.rank_manifest_body(
            manifest.RankManifest(
                run=metadata["run"],
                rank=rank,
                num_bytes=writer.num_bytes,
                header_bytes=writer.header_bytes,
                header_hash=writer.header_hash,
                tensors=writer.stored,
                report={**shard.report, "hash": writer.hash},
            )
        )
        manifest.write_json(temporary / manifest.rank_manifest_name(rank), body, writer.num_bytes)


def _complete(
    peers: Peers, temporary: Path, target: Path, run: str, extra: dict[str, Any] | None, sizes: list[int]
) -> None:
    """Rank 0: verify every shard's size, write the manifest of the whole, rename."""
    if peers.rank != 0:
        return
    step = commit.step_of(target)
    with _disk(target, "completing"):
        reports, files = [], []
        for rank, expected in enumerate(sizes):
            found = (temporary / manifest.shard_name(rank)).stat().st_size
            if found != expected:
                raise CheckpointError(
                    f"{temporary / manifest.shard_name(rank)} has {found} bytes, rank {rank} wrote {expected}: "
                    "do all ranks see the same file system?"
                )
            told = manifest_reading.rank_manifest_from(temporary, rank, run, found, None)
            files.append(_file_record(temporary, told))
            reports.append(told.report)
        reach("checkpoint.manifest", rank=0, step=step)
        whole = manifest.Manifest(
            run=run,
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            versions={"trivium": __version__, "torch": str(torch.__version__)},
            files=tuple(files),
            parameters=_merge(reports),
            buffers={
                name: manifest_reading.buffer_from(item, len(reports), name)
                for told in reports
                for name, item in told["buffers"].items()
            },
            module_states={name: state for told in reports for name, state in told["module_states"].items()},
            groups=reports[0]["groups"],
            extra=strict_json.encode(extra, "extra"),
        )
        manifest.write_json(temporary / manifest.MANIFEST, manifest.manifest_body(whole), sum(sizes))
        commit.publish(temporary, target, run)


def _file_record(temporary: Path, told: manifest.RankManifest) -> manifest.FileRecord:
    raw = (temporary / manifest.rank_manifest_name(told.rank)).read_bytes()
    return manifest.FileRecord(
        rank=told.rank,
        num_bytes=told.num_bytes,
        hash=told.report["hash"],
        manifest_bytes=len(raw),
        manifest_hash=manifest.hash_of(raw),
    )


def _merge(reports: list[dict[str, Any]]) -> dict[str, manifest.ParameterRecord]:
    """One record of each parameter from all ranks' reports; they must agree and their pieces cover it."""
    told: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for rank, report in enumerate(reports):
        for name, item in report["parameters"].items():
            told.setdefault(name, []).append((rank, item))
    return {name: _merge_one(name, items) for name, items in told.items()}


def _merge_one(name: str, items: list[tuple[int, dict[str, Any]]]) -> manifest.ParameterRecord:
    first_rank, first = items[0]
    for rank, item in items:
        for key in ("names", "shape", "dtype"):
            if item[key] != first[key]:
                raise MismatchError(
                    f"parameter {name}: {key} is {first[key]} on rank {first_rank} and {item[key]} on rank {rank}"
                )
    owners = sorted(((rank, item) for rank, item in items if "start" in item), key=lambda owner: owner[1]["start"])
    owners = [owner for owner in owners if owner[1]["length"]] or owners[:1]
    if not owners:
        raise MismatchError(f"parameter {name}: no rank owns a piece of it")
    pieces = tuple((rank, item["start"], item["length"]) for rank, item in owners)
    try:
        manifest_reading.check_cover(pieces, count(first["shape"]), f"parameter {name}")
    except CheckpointError as error:
        raise MismatchError(f"the ranks' pieces do not make a whole: {error}") from error
    lead_rank, lead = owners[0]
    for rank, item in owners:
        for key in ("stored", "group", "states"):
            if item[key] != lead[key]:
                raise MismatchError(
                    f"parameter {name}: {key} is {lead[key]} on rank {lead_rank} and {item[key]} on rank {rank}"
                )
    return manifest.ParameterRecord(
        names=tuple(first["names"]),
        shape=tuple(first["shape"]),
        dtype=dtype_of(first["dtype"], name),
        stored=dtype_of(lead["stored"], name),
        pieces=pieces,
        group=None if lead["group"] is None else tuple(lead["group"]),
        states={state: manifest_reading.state_from(body, name) for state, body in lead["states"].items()},
    )


def _retain(peers: Peers, target: Path, run: str, keep_last: int | None) -> None:
    if peers.rank == 0 and keep_last is not None and os.path.isdir(target):
        complete = [path for path in commit.siblings(target) if commit.step_of(path) <= commit.step_of(target)]
        commit.retain(target, run, keep_last, [path for path in complete if path == target or _is_complete(path)])


def _is_complete(path: Path) -> bool:
    try:
        check_files(path)
    except CheckpointError:
        return False
    return True
