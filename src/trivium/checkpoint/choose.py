"""Which checkpoint to start from: the newest complete one, loudly when newer ones had to be passed over."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from trivium.base import log
from trivium.base.errors import CheckpointError, ConfigError
from trivium.checkpoint import commit, manifest
from trivium.checkpoint.damage import DamagedError
from trivium.checkpoint.layout import Optimizers
from trivium.checkpoint.peers import Peers, peers_of, together
from trivium.checkpoint.reading import check_files, load
from trivium.dist.mesh import Mesh

_UNFINISHED = re.compile(r".+\.(tmp|trash|old)-[0-9a-f]{8}")


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What a run goes on from: the checkpoint and what it kept as ``extra``."""

    folder: Path
    extra: Any


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in ``folder`` (highest number, then latest date); None when there is none.

    Says loudly which newer ones were passed over and why. Reads manifests and sizes, no tensors.
    """
    found = _complete(Path(folder))
    return found[0] if found else None


def _complete(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, newest first; the others are told of."""
    if not folder.is_dir():
        return []
    rows: list[tuple[int, str, Path]] = []
    with os.scandir(folder) as entries:
        candidates = [Path(entry.path) for entry in entries if entry.is_dir()]
    for path in sorted(candidates):
        if _UNFINISHED.fullmatch(path.name):
            log.get().warning("ignoring %s: a save or deletion that did not finish", path)
            continue
        if not any(path.glob("rank-*")) and not (path / manifest.MANIFEST).exists():
            continue
        try:
            rows.append((commit.step_of(path), check_files(path).created, path))
        except CheckpointError as error:
            log.get().warning("passing over checkpoint %s: %s", path, error)
    return [path for _, _, path in sorted(rows, reverse=True)]


def _candidates(folder: Path, policy: str) -> list[Path]:
    if policy == "never":
        return []
    if policy not in ("auto", "must"):
        path = Path(policy)
        if not path.is_dir():
            raise CheckpointError(
                f"resume={policy}: no such checkpoint. Give a checkpoint's folder, or auto, must or never"
            )
        return [path]
    found = _complete(folder)
    if policy == "must" and not found:
        raise CheckpointError(
            f"resume=must, but there is no complete checkpoint in {folder}. Check the path, or use resume=auto to "
            "start anew when there is none"
        )
    return found


def _beside(damaged: Path) -> str:
    """What to take instead of a damaged checkpoint."""
    others = [path for path in _complete(damaged.parent) if path.name != damaged.name]
    if not others:
        return f"There is no other complete checkpoint in {damaged.parent}"
    return f"{others[0]} is complete: resume={others[0]} goes on from there"


def resume(folder: str | Path, policy: str = "auto") -> Path | None:
    """Which checkpoint a run in ``folder`` goes on from.

    ``auto``: the newest complete one, None when there is none. ``must``: the same, but none is an error. ``never``:
    None. Anything else is the path of a checkpoint. Reads no tensors; `load_resumable` also falls back from damage
    inside them.

    Raises:
        CheckpointError: there is none and there must be.
    """
    found = _candidates(Path(folder), policy)
    return found[0] if found else None


def load_resumable(
    folder: str | Path,
    policy: str = "auto",
    *,
    model: nn.Module,
    optimizer: Optimizers = None,
    mesh: Mesh | Peers | None = None,
    strict: bool = True,
) -> Resumed | None:
    """`resume` and `load` in one: with ``auto`` and ``must`` a damaged checkpoint is passed over, loudly.

    Collective. None means: start anew. A checkpoint of another model is not passed over.

    Raises:
        CheckpointError: nothing to resume from though there must be, or every checkpoint is damaged.
    """
    if not policy:
        raise ConfigError("resume is empty: expected auto, must, never or a checkpoint's folder")
    peers = peers_of(mesh)
    names = together(
        peers,
        "choosing a checkpoint",
        lambda: [str(path) for path in _candidates(Path(folder), policy)] if peers.rank == 0 else [],
    )
    names = peers.broadcast_json(names)
    failures: list[str] = []
    for name in names:
        try:
            extra = load(name, model=model, optimizer=optimizer, mesh=peers, strict=strict)
        except DamagedError as error:
            if policy not in ("auto", "must"):
                raise DamagedError(f"{error}. {_beside(Path(name))}") from error
            failures.append(str(error))
            log.get().warning("checkpoint %s cannot be used, trying the one before: %s", name, error)
            continue
        return Resumed(folder=Path(name), extra=extra)
    if failures:
        raise CheckpointError(
            f"all {len(failures)} checkpoints in {folder} are damaged; the newest: {failures[0]}. Put an "
            "intact copy back, or start anew in another folder (trivium train: --run)"
        )
    return None
