"""All or nothing on disk: a temporary folder, one rename, then retention; the newest complete one is never lost.

No paper: the protocol is docs/checkpoints.md's. Only rank 0 calls these functions.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from trivium.base import log
from trivium.base.errors import CapacityError, CheckpointError, ConfigError
from trivium.base.fault import reach
from trivium.base.units import format_bytes

LOCK = ".trivium-lock"
_LEFTOVER = re.compile(r".+\.(tmp|trash)-[0-9a-f]{8}")
_REPLACED = re.compile(r"(.+)\.old-[0-9a-f]{8}")
_NUMBERED = re.compile(r"(.*?)(\d+)")
_SPARE = 1.1


def step_of(folder: Path) -> int:
    """The number at the end of a checkpoint's name, 0 when it has none."""
    found = _NUMBERED.fullmatch(folder.name)
    return int(found[2][:18]) if found else 0


def destination(folder: str | Path) -> Path:
    """Where ``folder`` really is: a link is followed, so that it stays and what it points to is written."""
    path = Path(folder)
    return Path(os.path.realpath(path)) if path.is_symlink() else Path(os.path.abspath(path))


def check_folder(folder: str | Path) -> None:
    """Make sure that checkpoints can be written into ``folder``, creating it; to be called before the first step.

    Raises ConfigError when it is not a folder or cannot be written.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        what = "is not a folder" if isinstance(error, (FileExistsError, NotADirectoryError)) else "cannot be written"
        raise ConfigError(
            f"checkpoint folder {path} {what}: {error.strerror}. Choose a folder you may write"
        ) from error


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold ``folder`` against other runs. Raises CheckpointError naming the process that holds it.

    The kernel lets go when a process dies; a process may take it again while it holds it.
    """
    path = folder / LOCK
    file = _take(path)
    if file is None:
        yield
        return
    try:
        os.ftruncate(file, 0)
        os.write(file, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
    finally:
        os.close(file)


def _take(path: Path) -> int | None:
    """The locked file; None when this very process holds it already."""
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(file)
            holder = _holder(path)
            if (holder.get("pid"), holder.get("host")) == (os.getpid(), socket.gethostname()):
                return None
            raise CheckpointError(
                f"{path.parent} is being written by process {holder.get('pid', '?')} on host "
                f"{holder.get('host', '?')} ({path}): give each run a folder of its own"
            ) from error
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        os.close(file)


def _holder(path: Path) -> dict[str, object]:
    try:
        found = json.loads(path.read_bytes()[:4096])
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def prepare(target: Path, run: str, *, overwrite: bool) -> Path:
    """The fresh temporary folder beside ``target``; leftovers of killed saves are removed, loudly."""
    if os.path.lexists(target) and not overwrite and not _is_empty_folder(target):
        raise CheckpointError(f"{target} exists already: choose another name, or pass overwrite=True")
    sweep(target.parent)
    temporary = target.with_name(f"{target.name}.tmp-{run}")
    temporary.mkdir(mode=0o700)
    return temporary


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left in ``folder``. The caller holds the lock."""
    with os.scandir(folder) as entries:
        found = [Path(entry.path) for entry in entries if not entry.is_symlink()]
    leftovers = [path for path in found if _LEFTOVER.fullmatch(path.name)]
    for path in found:
        replaced = _REPLACED.fullmatch(path.name)
        if replaced is not None and os.path.lexists(folder / replaced[1]):
            leftovers.append(path)
        elif replaced is not None:
            log.get().warning("%s was being replaced when a save was killed: putting it back", folder / replaced[1])
            path.rename(folder / replaced[1])
    for path in leftovers:
        log.get().warning("removing %s, left by a save or deletion that did not finish", path)
        _remove(path)


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise CapacityError unless ``folder``'s disk has room for ``num_bytes`` and a tenth more."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    need = int(num_bytes * _SPARE)
    if free < need:
        raise CapacityError(
            f"need {format_bytes(need)}, {format_bytes(free)} free at {folder}: the checkpoint was not begun. "
            "Free some space, or lower keep_last"
        )


def disk_error(error: OSError, folder: Path, doing: str) -> CheckpointError | CapacityError | ConfigError:
    """``error`` while ``doing`` something in ``folder``, as an error with numbers and a next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = "unknown"
        with contextlib.suppress(OSError):
            status = os.statvfs(folder.parent)
            free = format_bytes(status.f_bavail * status.f_frsize)
        return CapacityError(
            f"{doing} {folder}: {error.strerror}, {free} free at {folder.parent}. Earlier checkpoints are "
            "intact; free some space"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return ConfigError(f"{doing} {folder}: {error.strerror}. Choose a folder you may write")
    return CheckpointError(
        f"{doing} {folder}: {error.strerror or error}. Earlier checkpoints are intact; check the disk"
    )


def publish(temporary: Path, target: Path, run: str) -> None:
    """Make the complete ``temporary`` the checkpoint ``target``, durably."""
    step = step_of(target)
    temporary.chmod(_folder_mode(temporary))
    sync_folder(temporary)
    reach("checkpoint.rename", rank=0, step=step)
    aside: Path | None = None
    if os.path.lexists(target) and not _is_empty_folder(target):
        aside = target.with_name(f"{target.name}.old-{run}")
        target.rename(aside)
    temporary.rename(target)
    sync_folder(target.parent)
    reach("checkpoint.renamed", rank=0, step=step)
    if aside is not None:
        _remove(aside)


def discard(temporary: Path) -> None:
    """Remove the folder of a save that failed; failing to is only told."""
    if temporary.exists():
        _remove(temporary)


def retain(target: Path, run: str, keep_last: int, complete: list[Path]) -> None:
    """Delete the oldest of ``complete`` (siblings, newest first) beyond ``keep_last``; failing to delete only warns."""
    for old in complete[keep_last:]:
        if old == target:
            continue
        trash = old.with_name(f"{old.name}.trash-{run}")
        try:
            old.rename(trash)
        except OSError as error:
            log.get().warning("could not delete the old checkpoint %s: %s", old, error.strerror)
            continue
        _remove(trash)


def siblings(target: Path) -> list[Path]:
    """The folders beside ``target`` whose names differ from its own only in the number, the highest number first."""
    found = _NUMBERED.fullmatch(target.name)
    if found is None:
        return []
    names = re.compile(re.escape(found[1]) + r"\d+")
    with os.scandir(target.parent) as entries:
        rows = [
            Path(entry.path) for entry in entries if names.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    return sorted(rows, key=lambda path: (step_of(path), path.name), reverse=True)


def _folder_mode(temporary: Path) -> int:
    probe = temporary / "mode"
    probe.mkdir(mode=0o777)
    mode = probe.stat().st_mode & 0o7777
    probe.rmdir()
    return mode


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _remove(folder: Path) -> None:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries)
        for name in names:
            reach("checkpoint.retention", rank=0, step=step_of(Path(folder.name.split(".")[0])))
            path = folder / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()
    except OSError as error:
        log.get().warning("could not delete %s: %s", folder, error.strerror)
