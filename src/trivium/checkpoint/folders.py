"""A folder in Hugging Face's layout: config.json, model.safetensors or index and shards; read and replaced safely."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import CheckpointError
from trivium.checkpoint import commit, strict_json
from trivium.checkpoint.shard_file import ShardReader, ShardWriter, Slot, Stored

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,200}\.safetensors")
_OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A tensor of the folder and the file it lies in."""

    path: Path
    stored: Stored


def open_folder(folder: str | Path) -> dict[str, Found]:
    """Every tensor of ``folder`` by its name there. Reads headers only, each number checked against its file.

    Raises CheckpointError when files are missing, lead out of the folder, contradict the index or only hold pickles.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a folder: expected one with {SINGLE} or {INDEX}")
    index = path / INDEX
    if not index.exists():
        if not (path / SINGLE).exists():
            _explain_absence(path)
        return {name: Found(path=path / SINGLE, stored=stored) for name, stored in _header(path, SINGLE).items()}
    weight_map = _read_index(index)
    found: dict[str, Found] = {}
    for file in sorted(set(weight_map.values())):
        header = _header(path, file)
        for name, stored in header.items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{path / file} holds {name[:200]!r}, which {INDEX} places in {weight_map.get(name, 'no file')}"
                )
            found[name] = Found(path=path / file, stored=stored)
    for name, file in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{index} places {name[:200]!r} in {file}, which does not hold it")
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """The folder's ``config.json``."""
    path = Path(folder) / CONFIG
    if not path.exists():
        raise CheckpointError(f"{path} is missing: it says what model the tensors belong to")
    with ShardReader(_inside(Path(folder), CONFIG), follow=True) as reader:
        if reader.num_bytes > strict_json.json_limit(0):
            raise CheckpointError(f"{path} has {reader.num_bytes} bytes: at most {strict_json.json_limit(0)} are read")
        return strict_json.parse(bytes(reader.read(0, reader.num_bytes)), path)


def _explain_absence(path: Path) -> None:
    with os.scandir(path) as entries:
        pickles = sorted(entry.name for entry in entries if Path(entry.name).suffix in _PICKLES)
    if pickles:
        raise CheckpointError(
            f"{path} holds {pickles[0]} but no {SINGLE}: such files can only be read by unpickling, which may run "
            "code, and Trivium never does. Save them as safetensors where you trust them"
        )
    raise CheckpointError(f"{path} holds neither {SINGLE} nor {INDEX}")


def _read_index(index: Path) -> dict[str, str]:
    with ShardReader(_inside(index.parent, INDEX), follow=True) as reader:
        limit = strict_json.json_limit(sum(file.stat().st_size for file in index.parent.glob("*.safetensors")))
        if reader.num_bytes > limit:
            raise CheckpointError(f"{index} has {reader.num_bytes} bytes: at most {limit} are read")
        weight_map = strict_json.parse(bytes(reader.read(0, reader.num_bytes)), index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: weight_map: expected an object of names and files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _FILE.fullmatch(file):
            raise CheckpointError(
                f"{index} places {name[:200]!r} in {str(file)[:80]!r}: expected the name of a .safetensors file "
                "in the same folder"
            )
    return weight_map


def _header(folder: Path, file: str) -> dict[str, Stored]:
    with ShardReader(_inside(folder, file), follow=True) as reader:
        return reader.header()


def _inside(folder: Path, file: str) -> Path:
    """The real path of ``file``; links may stay in the folder or lead to the blobs of the same Hugging Face cache."""
    real, home = Path(os.path.realpath(folder / file)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if home not in real.parents and blobs not in real.parents:
        raise CheckpointError(
            f"{folder / file} is a link that leads out of the folder, to {real}: copy the file instead"
        )
    return real


def plan_files(slots: Sequence[Slot], max_shard_bytes: int) -> dict[str, list[Slot]]:
    """Files as of `group_files`; in each the tensors of the widest dtype come first, so that all are aligned."""
    files = group_files(slots, max_shard_bytes)
    return {name: sorted(group, key=lambda slot: -slot.dtype.itemsize) for name, group in files.items()}


def group_files(slots: Sequence[Slot], max_shard_bytes: int) -> dict[str, list[Slot]]:
    """Which file holds which tensors, in order; each file at most ``max_shard_bytes`` unless one tensor is larger."""
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_shard_bytes}: expected 1 or more")
    groups: list[list[Slot]] = [[]]
    filled = 0
    for slot in slots:
        if groups[-1] and filled + slot.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(slot)
        filled += slot.num_bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


class FolderWriter:
    """Writes the files of ``plan`` beside ``folder`` and puts them into place together at the end."""

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, Sequence[Slot]],
        config: Mapping[str, Any] | None,
        *,
        overwrite: bool,
    ) -> None:
        self.target = commit.destination(folder)
        self._plan, self._config = plan, config
        self._queue = [(file, slot) for file, slots in plan.items() for slot in slots]
        self._writer: ShardWriter | None = None
        self._stack = contextlib.ExitStack()
        if self.target.is_dir() and not overwrite:
            old = sorted(
                entry.name for entry in self.target.iterdir() if _OURS.fullmatch(entry.name) or entry.name == INDEX
            )
            if old:
                raise CheckpointError(
                    f"{self.target} holds {old[0]} already: choose another folder, or pass overwrite=True"
                )
        self.target.parent.mkdir(parents=True, exist_ok=True)
        num_bytes = sum(slot.num_bytes for slots in plan.values() for slot in slots)
        commit.require_space(self.target.parent, num_bytes)
        self._temporary = self.target.with_name(f".{self.target.name}.export-{secrets.token_hex(4)}")
        self._temporary.mkdir()

    def __enter__(self) -> FolderWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._stack.__exit__(kind, *_)  # type: ignore[arg-type]
        finally:
            if self._temporary.exists():
                shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, parts: Iterable[torch.Tensor]) -> None:
        """Write the plan's next tensor."""
        file, _ = self._queue.pop(0)
        if self._writer is None or self._writer.path.name != file:
            self._stack.close()
            writer = ShardWriter(self._temporary / file, self._plan[file], {"format": "pt"})
            self._writer = self._stack.enter_context(writer)
        self._writer.append(parts)

    def _finish(self) -> None:
        self._stack.close()
        for file, slots in self._plan.items():
            if not slots:
                with ShardWriter(self._temporary / file, [], {"format": "pt"}):
                    pass
        if len(self._plan) > 1:
            weight_map = {slot.key: file for file, slots in self._plan.items() for slot in slots}
            total = sum(slot.num_bytes for slots in self._plan.values() for slot in slots)
            self._write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        if self._config is not None:
            self._write_json(CONFIG, self._config)
        if not self.target.exists():
            self._temporary.rename(self.target)
            commit.sync_folder(self.target.parent)
            return
        names = sorted((path.name for path in self._temporary.iterdir()), key=lambda name: (name == INDEX, name))
        for name in names:
            os.replace(self._temporary / name, self.target / name)
        for entry in list(self.target.iterdir()):
            if entry.name not in names and (_OURS.fullmatch(entry.name) or entry.name == INDEX):
                entry.unlink()
        commit.sync_folder(self.target)

    def _write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with open(self._temporary / name, "x", encoding="utf-8") as file:
            json.dump(value, file, indent=2, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def readers(paths: Iterable[Path]) -> Iterator[dict[Path, ShardReader]]:
    """Every file of ``paths`` open for reading."""
    with contextlib.ExitStack() as stack:
        yield {
            path: stack.enter_context(ShardReader(_inside(path.parent, path.name), follow=True))
            for path in sorted(set(paths))
        }
