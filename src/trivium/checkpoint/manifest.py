"""What a checkpoint holds and where: `manifest.json` of the whole, `rank-00000.json` of each shard.

ZeRO section 5: the manifest is the map from logical tensors to the ranks' partitions; nothing in it is a path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128_hexdigest

from trivium.base.errors import CheckpointError
from trivium.checkpoint import strict_json
from trivium.checkpoint.dtypes import dtype_name
from trivium.checkpoint.shard_file import Stored

SCHEMA = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class StateRecord:
    """One optimizer state of one parameter.

    ``range``: cut like the parameter; ``whole``: one tensor of its own ``shape`` in the shard of ``rank``;
    ``value``: a number or a small tensor, kept in the manifest.
    """

    kind: str
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()
    rank: int = 0
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class ParameterRecord:
    """One logical parameter: ``pieces`` are (rank, start, length), in order, covering it exactly."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stored: torch.dtype
    pieces: tuple[tuple[int, int, int], ...]
    group: tuple[int, int] | None
    states: dict[str, StateRecord] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BufferRecord:
    """A persistent buffer, whole in the shard of ``rank``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    rank: int


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One rank's shard and the manifest beside it."""

    rank: int
    num_bytes: int
    hash: str
    manifest_bytes: int
    manifest_hash: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A whole checkpoint. ``groups[i][j]`` are the hyper-parameters of the i-th optimizer's j-th group, encoded."""

    run: str
    created: str
    versions: dict[str, str]
    files: tuple[FileRecord, ...]
    parameters: dict[str, ParameterRecord]
    buffers: dict[str, BufferRecord]
    module_states: dict[str, Any]
    groups: list[list[dict[str, Any]]]
    extra: Any

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return len(self.files)


@dataclass(frozen=True, kw_only=True)
class RankManifest:
    """One shard: its tensors with their hashes, and what its rank reports of each parameter (read by rank 0 only)."""

    run: str
    rank: int
    num_bytes: int
    header_bytes: int
    header_hash: str
    tensors: dict[str, Stored]
    report: dict[str, Any]


def shard_name(rank: int) -> str:
    """The file of ``rank``'s tensors."""
    return f"rank-{rank:05d}.safetensors"


def rank_manifest_name(rank: int) -> str:
    """The file that describes ``rank``'s tensors."""
    return f"rank-{rank:05d}.json"


def parameter_key(name: str) -> str:
    """Where a shard keeps its range of parameter ``name``."""
    return f"parameters/{name}"


def state_key(state: str, name: str) -> str:
    """Where a shard keeps its range of optimizer state ``state`` of parameter ``name``."""
    return f"optimizer/{state}/{name}"


def buffer_key(name: str) -> str:
    """Where a shard keeps buffer ``name``."""
    return f"buffers/{name}"


def hash_of(data: bytes) -> str:
    """The hash of a small file, as manifests give it."""
    return xxh3_128_hexdigest(data)


def write_json(path: Path, body: Mapping[str, Any], payload_bytes: int) -> tuple[int, str]:
    """Write ``body`` with its own checksum first, to disk; returns the bytes and the hash of the file.

    Raises CheckpointError when it would be larger than is read beside ``payload_bytes`` of tensors.
    """
    text = strict_json.dump(body)[1:]
    data = b'{"checksum":"' + xxh3_128_hexdigest(text).encode() + b'",' + text
    limit = strict_json.json_limit(payload_bytes)
    if len(data) > limit:
        raise CheckpointError(
            f"{path} would have {len(data)} bytes: at most {limit} are read beside {payload_bytes} bytes of tensors. "
            "Keep less in extra"
        )
    file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(file, view) :]
        os.fsync(file)
    finally:
        os.close(file)
    return len(data), xxh3_128_hexdigest(data)


def manifest_body(manifest: Manifest) -> dict[str, Any]:
    """``manifest`` as JSON."""
    return {
        "schema": SCHEMA,
        "run": manifest.run,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "versions": manifest.versions,
        "files": [
            {
                "rank": f.rank,
                "file": shard_name(f.rank),
                "bytes": f.num_bytes,
                "hash": f.hash,
                "manifest": rank_manifest_name(f.rank),
                "manifest_bytes": f.manifest_bytes,
                "manifest_hash": f.manifest_hash,
            }
            for f in manifest.files
        ],
        "parameters": {name: _parameter_body(record) for name, record in manifest.parameters.items()},
        "buffers": {
            name: {"dtype": dtype_name(b.dtype), "shape": list(b.shape), "rank": b.rank}
            for name, b in manifest.buffers.items()
        },
        "module_states": manifest.module_states,
        "groups": manifest.groups,
        "extra": manifest.extra,
    }


def _parameter_body(record: ParameterRecord) -> dict[str, Any]:
    return {
        "names": list(record.names),
        "shape": list(record.shape),
        "dtype": dtype_name(record.dtype),
        "stored": dtype_name(record.stored),
        "pieces": [list(piece) for piece in record.pieces],
        "group": None if record.group is None else list(record.group),
        "states": {name: state_body(state) for name, state in record.states.items()},
    }


def state_body(state: StateRecord) -> dict[str, Any]:
    """``state`` as JSON."""
    if state.dtype is None:
        return {"value": state.value}
    if state.kind == "range":
        return {"range": dtype_name(state.dtype)}
    return {"whole": dtype_name(state.dtype), "shape": list(state.shape), "rank": state.rank}


def rank_manifest_body(manifest: RankManifest) -> dict[str, Any]:
    """``manifest`` as JSON."""
    return {
        "schema": SCHEMA,
        "run": manifest.run,
        "rank": manifest.rank,
        "file": shard_name(manifest.rank),
        "bytes": manifest.num_bytes,
        "header_bytes": manifest.header_bytes,
        "header_hash": manifest.header_hash,
        "tensors": {
            key: {
                "dtype": dtype_name(t.dtype),
                "shape": list(t.shape),
                "offset": t.offset,
                "hash": t.digest.hex(),
                "blocks": b"".join(t.blocks).hex() if len(t.blocks) > 1 else "",
            }
            for key, t in manifest.tensors.items()
        },
        "report": manifest.report,
    }
