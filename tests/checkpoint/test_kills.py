"""Rows T1 to T6, T14 and T15 of the fault matrix: killed, out of space, broken disk."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.kills import fork, kill, load_newest, model_at, run, save_step
from tests.clock import Since
from tests.worlds import ROOT, Launch, child_environment, free_port
from trivium import checkpoint
from trivium.base import fault
from trivium.base.errors import CapacityError, CheckpointError

KILLED = -signal.SIGKILL
UNFINISHED = (".tmp-", ".trash-", ".old-")


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if any(word in path.name for word in UNFINISHED)]


@pytest.mark.parametrize("point", ["shard", "shards", "manifest", "rename"])
def test_killed_before_the_rename_the_step_before_loads(
    tmp_path: Path, point: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 1)
    assert run(lambda: _save(tmp_path, 2), f"checkpoint.{point}:0:2:kill9") == KILLED
    left = unfinished(tmp_path)
    assert len(left) == 1 and ".tmp-" in left[0]
    with caplog.at_level(logging.WARNING, "trivium"):
        assert load_newest(tmp_path) == 1
    assert f"ignoring {tmp_path / left[0]}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "trivium"):
        save_step(tmp_path, 2)
    assert f"removing {tmp_path / left[0]}" in caplog.text
    assert unfinished(tmp_path) == []
    assert load_newest(tmp_path) == 2


def _save(folder: Path, step: int, keep_last: int | None = None, overwrite: bool = False) -> None:
    save_step(folder, step, keep_last=keep_last, overwrite=overwrite)


def test_killed_after_the_rename_the_new_step_loads_and_the_extra_old_one_stays(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    assert run(lambda: _save(tmp_path, 3, keep_last=2), "checkpoint.renamed:0:3:kill9") == KILLED
    assert load_newest(tmp_path) == 3
    assert (tmp_path / "step-00000001").is_dir()
    save_step(tmp_path, 4, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def test_killed_while_deleting_the_half_deleted_one_is_never_chosen(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    assert run(lambda: _save(tmp_path, 3, keep_last=2), "checkpoint.retention:0:1:kill9") == KILLED
    assert any("step-00000001.trash-" in name for name in unfinished(tmp_path))
    shutil.rmtree(tmp_path / "step-00000003")
    assert load_newest(tmp_path) == 2
    save_step(tmp_path, 3)
    assert unfinished(tmp_path) == []


def test_killed_while_overwriting_the_old_one_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)

    def die_between_the_renames() -> None:
        rename = Path.rename

        def once(self: Path, target: Any) -> Path:
            if ".tmp-" in self.name:
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = once  # type: ignore[method-assign]
        _save(tmp_path, 1, overwrite=True)

    assert run(die_between_the_renames) == KILLED
    assert len(unfinished(tmp_path)) == 2
    save_step(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000002"]
    shutil.rmtree(tmp_path / "step-00000002")
    assert load_newest(tmp_path) == 1


def test_killed_at_any_moment_a_complete_step_loads(tmp_path: Path) -> None:
    size, rng = 512, random.Random(0)
    save_step(tmp_path, 1, size)
    started = time.perf_counter()
    save_step(tmp_path, 2, size)
    duration = time.perf_counter() - started
    newest = 2
    for _ in range(15):

        def go_on(first: int = newest + 1) -> None:
            for step in itertools.count(first):
                save_step(tmp_path, step, size, keep_last=2)

        pid = fork(go_on)
        time.sleep(rng.uniform(0, 3 * duration))
        assert kill(pid) == KILLED
        found = load_newest(tmp_path, size)
        assert found >= newest
        newest = found
    save_step(tmp_path, newest + 1, size, keep_last=2)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_rank_killed_while_saving_leaves_no_partial_checkpoint(tmp_path: Path, launch: Launch) -> None:
    arguments = ["-m", "tests.checkpoint.two_ranks", str(tmp_path / "run")]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    env = child_environment({**place, "TRIVIUM_FAULT": "checkpoint.shard:1:2:kill9"})
    ranks = [
        subprocess.Popen([sys.executable, *arguments], env={**env, "RANK": str(rank)}, cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        assert ranks[1].wait(150) == KILLED
        since = Since()
        _, words = ranks[0].communicate(timeout=240)
        assert since.seconds() < 10
        assert ranks[0].returncode > 0
        assert b"RankError: a peer was lost" in words and b"rank 1 (process" in words
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert load_two_ranks(tmp_path / "run") == 1
    assert not (tmp_path / "run" / "step-00000002").exists()
    assert launch([*arguments, "2"], ranks=2).wait(150) == 0
    assert load_two_ranks(tmp_path / "run") == 2
    assert unfinished(tmp_path / "run") == []


def load_two_ranks(folder: Path) -> int:
    path = checkpoint.latest(folder)
    assert path is not None
    model = nn.Linear(64, 64)
    step = checkpoint.load(path, model=model)["step"]
    assert bool((model.weight == step).all())
    return int(step)


@pytest.mark.parametrize("point", ["shard", "manifest"])
def test_a_full_disk_leaves_the_step_before(tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    monkeypatch.setattr(fault, "faults", lambda: fault.parse(f"checkpoint.{point}:0:2:enospc"))
    with pytest.raises(CapacityError, match=r"No space left on device, .* free at .*Earlier checkpoints are intact"):
        save_step(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-00000001"]
    assert load_newest(tmp_path) == 1


def test_too_little_space_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs

    def nearly_full(path: Any) -> Any:
        status = list(real(path))
        status[4] = 300_000 // status[1]
        return os.statvfs_result(status)

    monkeypatch.setattr(os, "statvfs", nearly_full)
    with pytest.raises(CapacityError, match=r"need 1\.\d+ MiB, 29\d\.\d+ KiB free at .*not begun") as caught:
        save_step(tmp_path, 1, size=200)
    assert caught.value.exit_code == 4
    assert os.listdir(tmp_path) == []


def test_a_file_size_limit_is_a_full_disk(tmp_path: Path) -> None:
    save_step(tmp_path, 1)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        with pytest.raises(CapacityError, match="File too large"):
            save_step(tmp_path, 2)

    assert run(limited) == 0
    assert os.listdir(tmp_path) == ["step-00000001"]


TINY_DISK = """
import subprocess, sys, pathlib, os
from trivium.base.errors import CapacityError, ConfigError
from tests.checkpoint.kills import save_step, load_newest
from trivium import checkpoint
from trivium.checkpoint import commit
disk = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", disk], check=True)
save_step(disk, 1)
commit.require_space = lambda *_: None
for first in (2, 40):
    try:
        for step in range(first, 100):
            save_step(disk, step)
    except CapacityError as error:
        print("full", error)
for name in sorted(os.listdir(disk)):
    assert ".tmp" not in name, name
print("newest", load_newest(disk))
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
try:
    checkpoint.check_folder(disk)
except ConfigError as error:
    print("check", error.exit_code, error)
try:
    save_step(disk, 50)
except ConfigError as error:
    print("save", error)
"""


def test_a_real_disk_that_is_full_or_read_only(tmp_path: Path) -> None:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("T14, T16: mounting a tiny disk in a private namespace is not allowed here")
    found = subprocess.run(
        ["unshare", "-rm", sys.executable, "-c", TINY_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env=child_environment(),
    )
    assert found.returncode == 0, found.stderr
    words = found.stdout.splitlines()
    assert words[0].startswith("full") and words[1].startswith("full")
    assert words[2].startswith("newest")
    assert words[3].startswith("check 2") and "Read-only file system" in words[3]
    assert words[4].startswith("save") and "Read-only file system" in words[4]


def test_a_broken_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_step(tmp_path, 1)
    monkeypatch.setattr(fault, "faults", lambda: fault.parse("checkpoint.shard:0:2:eio"))
    with pytest.raises(
        CheckpointError, match=r"writing a shard of .*step-00000002: .*Input/output error.*check the disk"
    ):
        save_step(tmp_path, 2)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_short_write_is_seen_before_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault, "faults", lambda: fault.parse("checkpoint.shard:0:2:short"))
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, expected \d+"):
        save_step(tmp_path, 2)
    assert os.listdir(tmp_path) == []


def test_a_bit_that_flips_on_the_way_to_the_disk_is_seen_when_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(fault, "faults", lambda: fault.parse("checkpoint.shard:0:2:flip"))
        save_step(tmp_path, 2)
    with pytest.raises(checkpoint.DamagedError, match=r"0\.weight is damaged: the hash of bytes \d+ to \d+"):
        load_newest(tmp_path)


@pytest.mark.parametrize("failures", [1, 2])
def test_reading_is_tried_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    path = save_step(tmp_path, 1)
    real, left = os.preadv, Counter({"shard": failures})

    def flaky(file: int, buffers: Sequence[Any], offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".safetensors") and offset and left["shard"]:
            left["shard"] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(file, buffers, offset)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("T15: /proc is needed to tell the files apart")
    monkeypatch.setattr(os, "preadv", flaky)
    model = model_at(0)
    if failures == 1:
        checkpoint.load(path, model=model)
        assert torch.equal(model[0].bias, torch.ones(64))
    else:
        with pytest.raises(
            CheckpointError, match=r"rank-00000.safetensors: reading \d+ bytes at offset \d+ failed twice"
        ):
            checkpoint.load(path, model=model)
