"""Manifests read and checked: every number in range, every piece in its place, nothing that is a path.

ZeRO section 5: what is read here decides which bytes of whose partition are read next.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from trivium.base.errors import CheckpointError
from trivium.checkpoint import strict_json
from trivium.checkpoint.dtypes import dtype_of
from trivium.checkpoint.manifest import (
    MANIFEST,
    SCHEMA,
    BufferRecord,
    FileRecord,
    Manifest,
    ParameterRecord,
    RankManifest,
    StateRecord,
    rank_manifest_name,
    shard_name,
)
from trivium.checkpoint.shard_file import BLOCK_BYTES, ShardReader, Stored, count, extents, sizes

_PREFIX = re.compile(rb'\{"checksum":"([0-9a-f]{32})",')
_HASH = re.compile(r"[0-9a-f]{32}")
_MAX_NAME = 4096
_MAX_WORLD = 1 << 20


def _read_json(path: Path, payload_bytes: int, expected: tuple[int, str] | None = None) -> dict[str, Any]:
    with ShardReader(path) as reader:
        limit = strict_json.json_limit(payload_bytes)
        if reader.num_bytes > limit:
            raise CheckpointError(
                f"{path} has {reader.num_bytes} bytes: at most {limit} are read beside {payload_bytes} bytes of tensors"
            )
        raw = bytes(reader.read(0, reader.num_bytes))
    found = _PREFIX.match(raw)
    if found is None:
        raise CheckpointError(f"{path} does not begin with its checksum: damaged, or not written by Trivium")
    if xxh3_128_hexdigest(memoryview(raw)[found.end() :]) != found[1].decode():
        raise CheckpointError(
            f"{path} is damaged: its checksum does not match its {len(raw)} bytes. Load another checkpoint"
        )
    if expected is not None and (len(raw), xxh3_128_hexdigest(raw)) != expected:
        raise CheckpointError(
            f"{path} is not the file that {MANIFEST} tells of: it belongs to another rank or another save"
        )
    body = strict_json.parse(raw, path)
    if body.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {str(body.get('schema'))[:40]}, this version reads {SCHEMA}: "
            "load it with the version of Trivium that wrote it"
        )
    return body


def state_from(body: Any, where: str) -> StateRecord:
    """The state that `state_body` was given."""
    kinds = {"value": {"value"}, "range": {"range"}, "whole": {"whole", "shape", "rank"}}
    for kind, keys in kinds.items():
        if isinstance(body, dict) and set(body) == keys:
            if kind == "value":
                return StateRecord(kind=kind, value=body["value"])
            dtype = dtype_of(body[kind], where)
            if kind == "range":
                return StateRecord(kind=kind, dtype=dtype)
            return StateRecord(
                kind=kind,
                dtype=dtype,
                shape=extents(body["shape"], where),
                rank=_whole(body["rank"], where, _MAX_WORLD),
            )
    raise CheckpointError(f"{where}: expected a value, a range or a whole tensor")


def read_manifest(folder: Path) -> Manifest:
    """The checked manifest of ``folder``. Raises CheckpointError, naming the file and the field, on anything odd."""
    path = folder / MANIFEST
    body = _read_json(path, _payload_bytes(folder))
    where = str(path)
    files = tuple(_file_from(item, rank, where) for rank, item in enumerate(_list(body, "files", where)))
    if body.get("world_size") != len(files) or not files:
        raise CheckpointError(
            f"{where}: world_size is {str(body.get('world_size'))[:40]}, but {len(files)} files are listed"
        )
    groups = _list(body, "groups", where)
    for group in groups:
        if not isinstance(group, list) or not all(isinstance(item, dict) for item in group):
            raise CheckpointError(f"{where}: groups: expected a list of lists of hyper-parameters")
    manifest = Manifest(
        run=str(body.get("run")),
        created=str(body.get("created")),
        versions={str(k): str(v) for k, v in _dict(body, "versions", where).items()},
        files=files,
        parameters={
            name: _parameter_from(item, name, len(files), groups, f"{where}: {name[:200]!r}")
            for name, item in _dict(body, "parameters", where).items()
        },
        buffers={
            _name(name, where): buffer_from(item, len(files), f"{where}: {name[:200]!r}")
            for name, item in _dict(body, "buffers", where).items()
        },
        module_states=_dict(body, "module_states", where),
        groups=groups,
        extra=body.get("extra"),
    )
    _no_shared_names(manifest, where)
    return manifest


def read_rank_manifest(folder: Path, manifest: Manifest, rank: int) -> RankManifest:
    """The checked description of ``rank``'s shard."""
    file = manifest.files[rank]
    return rank_manifest_from(folder, rank, manifest.run, file.num_bytes, (file.manifest_bytes, file.manifest_hash))


def rank_manifest_from(
    folder: Path, rank: int, run: str, num_bytes: int, expected: tuple[int, str] | None
) -> RankManifest:
    """As `read_rank_manifest`, before there is a manifest of the whole."""
    path = folder / rank_manifest_name(rank)
    body = _read_json(path, num_bytes, expected)
    where = str(path)
    if body.get("rank") != rank or body.get("run") != run:
        raise CheckpointError(
            f"{where} is of rank {str(body.get('rank'))[:40]} and save {str(body.get('run'))[:40]}, "
            f"expected rank {rank} and save {run[:40]}: files were swapped"
        )
    if body.get("bytes") != num_bytes:
        raise CheckpointError(
            f"{where}: {shard_name(rank)} should have {str(body.get('bytes'))[:40]} bytes, found {num_bytes}"
        )
    header_bytes = _whole(body.get("header_bytes"), where, num_bytes + 1)
    tensors: dict[str, Stored] = {}
    end = header_bytes
    for key, item in _dict(body, "tensors", where).items():
        stored = _tensor_from(item, f"{where}: {key[:200]!r}")
        if stored.offset != end:
            raise CheckpointError(f"{where}: {key[:200]!r} starts at {stored.offset}, expected {end}: overlap or hole")
        end += stored.num_bytes
        tensors[key] = stored
    if end != num_bytes:
        raise CheckpointError(f"{where}: the tensors end at {end}, the shard has {num_bytes} bytes")
    return RankManifest(
        run=run,
        rank=rank,
        num_bytes=num_bytes,
        header_bytes=header_bytes,
        header_hash=_hash(body.get("header_hash"), where),
        tensors=tensors,
        report=_dict(body, "report", where),
    )


def _payload_bytes(folder: Path) -> int:
    """Bytes of tensors really on disk (a sparse file counts for what it occupies, eightfold for compressing disks)."""
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(".safetensors"):
                status = entry.stat(follow_symlinks=False)
                total += min(status.st_size, status.st_blocks * 512 * 8)
    return total


def _parameter_from(item: Any, name: str, world_size: int, groups: list[Any], where: str) -> ParameterRecord:
    keys = {"names", "shape", "dtype", "stored", "pieces", "group", "states"}
    if not isinstance(item, dict) or set(item) != keys:
        raise CheckpointError(f"{where}: expected {', '.join(sorted(keys))}")
    names = tuple(_name(other, where) for other in _list(item, "names", where))
    if not names or names[0] != name:
        raise CheckpointError(f"{where}: names must begin with its own")
    shape = extents(item["shape"], where)
    pieces = tuple(_piece_from(piece, world_size, where) for piece in _list(item, "pieces", where))
    check_cover(pieces, count(shape), where)
    states = {
        _name(key, where): state_from(body, f"{where}: state {key[:200]!r}")
        for key, body in _dict(item, "states", where).items()
    }
    for state in states.values():
        _whole(state.rank, where, world_size)
    group = item["group"]
    if group is not None:
        first, second = sizes(group, where) if isinstance(group, list) and len(group) == 2 else (1 << 60, 0)
        if first >= len(groups) or second >= len(groups[first]):
            raise CheckpointError(f"{where}: there is no parameter group {str(group)[:80]}")
        group = (first, second)
    return ParameterRecord(
        names=names,
        shape=shape,
        dtype=dtype_of(item["dtype"], where),
        stored=dtype_of(item["stored"], where),
        pieces=pieces,
        group=group,
        states=states,
    )


def check_cover(pieces: tuple[tuple[int, int, int], ...], num_elements: int, where: str) -> None:
    """Raise CheckpointError unless ``pieces`` (rank, start, length), in order, cover every element exactly once."""
    end = 0
    for rank, start, length in pieces:
        if start != end:
            fault = "overlap" if start < end else "leave a hole"
            raise CheckpointError(
                f"{where}: pieces {fault} at element {min(start, end)}: rank {rank} starts at {start}, "
                f"the one before ends at {end}"
            )
        end += length
    if end != num_elements:
        raise CheckpointError(f"{where}: pieces end at element {end} of {num_elements}")


def _piece_from(item: Any, world_size: int, where: str) -> tuple[int, int, int]:
    if not isinstance(item, list) or len(item) != 3:
        raise CheckpointError(f"{where}: a piece is [rank, start, length]")
    return (_whole(item[0], where, world_size), _whole(item[1], where, 1 << 60), _whole(item[2], where, 1 << 60))


def buffer_from(item: Any, world_size: int, where: str) -> BufferRecord:
    """The buffer that a manifest tells of."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "rank"}:
        raise CheckpointError(f"{where}: expected dtype, shape and rank")
    return BufferRecord(
        dtype=dtype_of(item["dtype"], where),
        shape=extents(item["shape"], where),
        rank=_whole(item["rank"], where, world_size),
    )


def _file_from(item: Any, rank: int, where: str) -> FileRecord:
    keys = {"rank", "file", "bytes", "hash", "manifest", "manifest_bytes", "manifest_hash"}
    if not isinstance(item, dict) or set(item) != keys:
        raise CheckpointError(f"{where}: files[{rank}]: expected {', '.join(sorted(keys))}")
    if (item["rank"], item["file"], item["manifest"]) != (rank, shard_name(rank), rank_manifest_name(rank)):
        raise CheckpointError(
            f"{where}: files[{rank}] names {str(item['file'])[:80]!r} and {str(item['manifest'])[:80]!r}: "
            f"only {shard_name(rank)} and {rank_manifest_name(rank)} are allowed there"
        )
    return FileRecord(
        rank=rank,
        num_bytes=_whole(item["bytes"], where, 1 << 60),
        hash=_hash(item["hash"], where),
        manifest_bytes=_whole(item["manifest_bytes"], where, 1 << 60),
        manifest_hash=_hash(item["manifest_hash"], where),
    )


def _tensor_from(item: Any, where: str) -> Stored:
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "offset", "hash", "blocks"}:
        raise CheckpointError(f"{where}: expected dtype, shape, offset, hash and blocks")
    shape, dtype = extents(item["shape"], where), dtype_of(item["dtype"], where)
    num_bytes = count(shape) * dtype.itemsize
    text = item["blocks"] or item["hash"]
    expected = max(1, -(-num_bytes // BLOCK_BYTES))
    if not isinstance(text, str) or len(text) != 32 * expected or not re.fullmatch(r"[0-9a-f]+", text):
        raise CheckpointError(f"{where}: expected the hashes of {expected} blocks")
    raw = bytes.fromhex(text)
    stored = Stored(
        dtype=dtype,
        shape=shape,
        offset=_whole(item["offset"], where, 1 << 60),
        num_bytes=num_bytes,
        blocks=tuple(raw[i : i + 16] for i in range(0, len(raw), 16)),
    )
    if stored.digest.hex() != _hash(item["hash"], where):
        raise CheckpointError(f"{where}: the hashes of its blocks do not give its hash")
    return stored


def _no_shared_names(manifest: Manifest, where: str) -> None:
    seen: set[str] = set(manifest.buffers)
    for record in manifest.parameters.values():
        for name in record.names:
            if name in seen:
                raise CheckpointError(f"{where}: {name[:200]!r} is listed twice")
            seen.add(name)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MAX_NAME or "\0" in value:
        raise CheckpointError(
            f"{where}: {str(value)[:80]!r} is not a name: expected 1 to {_MAX_NAME} characters without NUL"
        )
    return value


def _whole(value: Any, where: str, below: int) -> int:
    if type(value) is not int or not 0 <= value < below:
        raise CheckpointError(f"{where}: {str(value)[:40]} is out of range: expected 0 to {below - 1}")
    return value


def _hash(value: Any, where: str) -> str:
    if not isinstance(value, str) or not _HASH.fullmatch(value):
        raise CheckpointError(f"{where}: {str(value)[:80]!r} is not a hash of 32 hexadecimal digits")
    return value


def _list(body: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = body.get(key)
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: {key}: expected a list")
    return value


def _dict(body: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = body.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {key}: expected an object")
    return value
