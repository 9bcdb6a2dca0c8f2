"""Rows T9 to T13, T16 to T18, T22, T24 and T25 of the fault matrix: files altered, crafted, misplaced."""

from __future__ import annotations

import gc
import json
import logging
import os
import pickle
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.checkpoint.kills import fork, kill, load_newest, model_at, optimizer_at, run, save_step
from tests.checkpoint.ranks import Cut, all_ok, even, on_ranks
from trivium import checkpoint
from trivium.base.errors import CheckpointError, ConfigError
from trivium.checkpoint import commit, manifest


@pytest.fixture
def two_ranks(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, 0.weight first."""

    def save(peers: Any) -> Path:
        model = model_at(7)
        Cut(model, peers.rank, even(model, 2), None)
        return checkpoint.save(tmp_path / "run" / "step-7", model=model, mesh=peers)

    path = all_ok(on_ranks(2, save))[0]
    assert isinstance(path, Path)
    return path


def load(path: Path) -> Any:
    return checkpoint.load(path, model=model_at(0))


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.json", "manifest.json"])
def test_a_truncated_file_is_named_with_its_bytes_and_the_one_before_is_taken_loudly(
    tmp_path: Path, share: float, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_step(tmp_path, 1)
    all_ok(on_ranks(2, lambda peers: _two(tmp_path / "step-00000002", peers)))
    path = tmp_path / "step-00000002" / file
    size = path.stat().st_size
    os.truncate(path, int(size * share))
    with pytest.raises(checkpoint.DamagedError, match=file) as caught:
        load(tmp_path / "step-00000002")
    if file != "manifest.json":
        assert f"has {int(size * share)} bytes, expected {size}" in str(caught.value)
    with caplog.at_level(logging.WARNING, "trivium"):
        model = model_at(0)
        found = checkpoint.load_resumable(tmp_path, "auto", model=model, optimizer=optimizer_at(model, 0))
    assert found is not None
    assert found.extra == {"step": 1}
    assert "passing over checkpoint" in caplog.text and file in caplog.text
    with pytest.raises(checkpoint.DamagedError, match=f"{file}.*step-00000001 is complete: resume="):
        checkpoint.load_resumable(tmp_path, str(tmp_path / "step-00000002"), model=model_at(0))
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(checkpoint.DamagedError, match="There is no other complete checkpoint in"):
        checkpoint.load_resumable(tmp_path, str(tmp_path / "step-00000002"), model=model_at(0))


def _two(path: Path, peers: Any) -> Path:
    model = model_at(2)
    Cut(model, peers.rank, even(model, 2), None)
    return checkpoint.save(path, model=model, mesh=peers)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_names_tensor_file_and_offset_and_resume_falls_back(
    two_ranks: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_folder = two_ranks.parent
    path = two_ranks / "rank-00001.safetensors"
    told = json.loads((two_ranks / "rank-00001.json").read_text())["tensors"]["parameters/1.weight"]
    flip(path, told["offset"] + 4)
    end = told["offset"] + 4 * told["shape"][0]
    with pytest.raises(checkpoint.DamagedError) as caught:
        load(two_ranks)
    assert f"{path}: 1.weight is damaged: the hash of bytes {told['offset']} to {end}" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints in .* are damaged"):
        checkpoint.load_resumable(run_folder, "auto", model=model_at(0))
    save_step(run_folder, 3)
    shutil.move(run_folder / "step-00000003", run_folder / "step-3")
    with caplog.at_level(logging.WARNING, "trivium"):
        found = checkpoint.load_resumable(run_folder, "must", model=model_at(0))
    assert found is not None and found.extra == {"step": 3}
    assert "cannot be used, trying the one before" in caplog.text


def test_all_ranks_agree_on_damage_that_one_of_them_sees(two_ranks: Path) -> None:
    save_step(two_ranks.parent, 3)
    shutil.move(two_ranks.parent / "step-00000003", two_ranks.parent / "step-3")
    told = json.loads((two_ranks / "rank-00001.json").read_text())["tensors"]["parameters/1.weight"]
    flip(two_ranks / "rank-00001.safetensors", told["offset"] + 4)

    def resume(peers: Any) -> Any:
        model = model_at(0)
        Cut(model, peers.rank, even(model, 2), None)
        found = checkpoint.load_resumable(two_ranks.parent, "auto", model=model, mesh=peers)
        assert found is not None
        return found.folder.name

    assert all_ok(on_ranks(2, resume)) == ["step-3", "step-3"]


@pytest.mark.parametrize("file", ["manifest.json", "rank-00000.json"])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.9])
def test_a_flipped_bit_in_a_manifest(two_ranks: Path, file: str, place: float) -> None:
    flip(two_ranks / file, int((two_ranks / file).stat().st_size * place))
    with pytest.raises(checkpoint.DamagedError, match=rf"{file}.*checksum"):
        load(two_ranks)


def test_a_flipped_bit_in_a_shard_header(two_ranks: Path) -> None:
    flip(two_ranks / "rank-00000.safetensors", 30)
    with pytest.raises(checkpoint.DamagedError, match=r"rank-00000\.safetensors: its header"):
        load(two_ranks)


@pytest.mark.parametrize("file", ["rank-00001.safetensors", "rank-00001.json"])
def test_a_missing_file_is_named(two_ranks: Path, file: str) -> None:
    (two_ranks / file).unlink()
    with pytest.raises(checkpoint.DamagedError, match=f"{file} is missing"):
        load(two_ranks)
    assert checkpoint.latest(two_ranks.parent) is None


def test_a_superfluous_shard_is_named(two_ranks: Path) -> None:
    shutil.copy(two_ranks / "rank-00001.safetensors", two_ranks / "rank-00002.safetensors")
    with pytest.raises(checkpoint.DamagedError, match=r"rank-00002\.safetensors does not belong here.* has 2 ranks"):
        load(two_ranks)


@pytest.mark.parametrize("kind", ["safetensors", "json"])
def test_swapped_files_are_named(two_ranks: Path, kind: str) -> None:
    one, other = two_ranks / f"rank-00000.{kind}", two_ranks / f"rank-00001.{kind}"
    kept = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(kept)
    with pytest.raises(checkpoint.DamagedError, match=rf"rank-0000\d\.{kind}"):
        load(two_ranks)


def test_a_shard_of_another_save_is_named(two_ranks: Path, tmp_path: Path) -> None:
    other = all_ok(on_ranks(2, lambda peers: _two(tmp_path / "other", peers)))[0]
    for name in ("rank-00001.safetensors", "rank-00001.json"):
        shutil.copy(other / name, two_ranks / name)
    with pytest.raises(checkpoint.DamagedError, match=r"rank-00001\.json"):
        load(two_ranks)


def test_a_shard_that_is_a_link_is_refused(two_ranks: Path, tmp_path: Path) -> None:
    shutil.move(two_ranks / "rank-00001.safetensors", tmp_path / "away")
    (two_ranks / "rank-00001.safetensors").symlink_to(tmp_path / "away")
    with pytest.raises(checkpoint.DamagedError, match=r"rank-00001\.safetensors"):
        load(two_ranks)


def test_two_runs_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()

    def holder() -> None:
        with commit.lock(tmp_path):
            os.write(write_end, b"x")
            time.sleep(600)

    pid = fork(holder)
    os.read(read_end, 1)
    with pytest.raises(CheckpointError, match=rf"is being written by process {pid} on host .*a folder of its own"):
        save_step(tmp_path, 1)
    kill(pid)
    save_step(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_the_same_process_may_hold_the_folder_already(tmp_path: Path) -> None:
    with commit.lock(tmp_path):
        save_step(tmp_path, 1)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_complete_checkpoint_is_not_overwritten_unasked(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"step-00000001 exists already.*overwrite=True"):
        save_step(tmp_path, 1)
    save_step(tmp_path, 1, overwrite=True)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="is not a folder") as caught:
            checkpoint.check_folder(path)
        assert caught.value.exit_code == 2
        with pytest.raises(ConfigError, match="Choose a folder you may write"):
            save_step(path, 1)

    def as_nobody() -> None:
        os.setuid(65534)
        with pytest.raises(ConfigError, match="cannot be written: Permission denied"):
            checkpoint.check_folder(tmp_path)

    if os.getuid() == 0:
        tmp_path.chmod(0o755)
        assert run(as_nobody) == 0


@pytest.mark.parametrize(
    ("umask", "file_mode", "folder_mode"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask(tmp_path: Path, umask: int, file_mode: int, folder_mode: int) -> None:
    def save() -> None:
        os.umask(umask)
        save_step(tmp_path, 1)
        checkpoint.save_hugging_face(model_at(1), tmp_path / "hf")

    assert run(save) == 0
    for folder in (tmp_path / "step-00000001", tmp_path / "hf"):
        assert stat.S_IMODE(folder.stat().st_mode) == folder_mode
        for path in folder.iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == file_mode, path


def test_links_on_the_way_are_kept(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    save_step(tmp_path / "run", 1)
    assert (tmp_path / "run").is_symlink()
    assert load_newest(tmp_path / "disk") == 1
    link = tmp_path / "disk" / "step-00000002"
    link.symlink_to(tmp_path / "elsewhere")
    save_step(tmp_path / "run", 2)
    assert link.is_symlink()
    assert load_newest(tmp_path / "run") == 2
    assert (tmp_path / "elsewhere" / "manifest.json").exists()


def test_resume_policies(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        assert checkpoint.resume(folder, "auto") is None
        assert checkpoint.load_resumable(folder, "auto", model=model_at(0)) is None
        with pytest.raises(CheckpointError, match="resume=must, but there is no complete checkpoint in") as caught:
            checkpoint.resume(folder, "must")
        assert caught.value.exit_code == 5
        with pytest.raises(CheckpointError, match="resume=must, but there is no complete checkpoint in"):
            checkpoint.load_resumable(folder, "must", model=model_at(0))
    for step in (9, 10):
        save_step(tmp_path, step)
    assert checkpoint.resume(tmp_path, "auto") == tmp_path / "step-00000010"
    assert checkpoint.resume(tmp_path, "never") is None
    assert checkpoint.resume(tmp_path, str(tmp_path / "step-00000009")) == tmp_path / "step-00000009"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.resume(tmp_path, "nowhere")


def test_a_checkpoint_of_another_model_is_not_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        save_step(tmp_path, step)
    with pytest.raises(CheckpointError, match="the model differ") as caught:
        checkpoint.load_resumable(tmp_path, "auto", model=nn.Linear(3, 3))
    assert not isinstance(caught.value, checkpoint.DamagedError)
    assert "step-00000002" in str(caught.value)


def test_retention_keeps_complete_ones_of_the_same_name_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    (tmp_path / "best-00000001").mkdir()
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    save_step(tmp_path, 4, keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["best-00000001", "step-00000002", "step-00000003", "step-00000004"]
    with pytest.raises(ConfigError, match="keep_last=1: expected 2 or more"):
        save_step(tmp_path, 5, keep_last=1)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("name", [".metadata", "model.pt", "pytorch_model.bin", "x.ckpt"])
def test_pickles_are_refused_unopened(tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / name
    file.write_bytes(pickle.dumps(Canary(canary)))
    for path in (file, file.parent):
        with pytest.raises(CheckpointError, match=r"unpickling, which may run code.*trivium convert") as caught:
            load(path)
        assert caught.value.exit_code == 5
    with pytest.raises(CheckpointError):
        checkpoint.load_hugging_face(model_at(0), file.parent)
    assert not canary.exists()


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Alter a manifest and give it the checksum of its new contents, as an attacker would."""
    body = json.loads(path.read_text())
    del body["checksum"]
    body = change(body) or body
    path.unlink()
    manifest.write_json(path, body, 1 << 40)


def put(value: Any, *keys: Any) -> Callable[[Any], None]:
    def change(body: Any) -> None:
        for key in keys[:-1]:
            body = body[key]
        body[keys[-1]] = value

    return change


W = ("parameters", "0.weight")
CRAFTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "parent path": (put("../../etc/x", "files", 0, "file"), "only rank-00000.safetensors"),
    "absolute path": (put("/etc/passwd", "files", 1, "manifest"), "only rank-00001.safetensors and rank-00001.json"),
    "NUL in a name": (put(["0.weight", "a\0b"], *W, "names"), "is not a name"),
    "10 MB name": (put(["0.weight", "x" * 10_000_000], *W, "names"), "bytes: at most"),
    "long name": (put(["0.weight", "x" * 5000], *W, "names"), "is not a name"),
    "10^9 elements": (put([10**9, 10**9], *W, "shape"), "pieces end at element 4096 of 1000000000000000000"),
    "huge shape": (put([1 << 59, 1 << 59], *W, "shape"), "more than 2"),
    "negative shape": (put([-64, -64], *W, "shape"), "is not a size"),
    "float shape": (put([64.0, 64], *W, "shape"), "is not a size"),
    "true as a size": (put([True, 4096], *W, "shape"), "is not a size"),
    "negative start": (put([[0, -1, 2049], [1, 2048, 2048]], *W, "pieces"), "out of range"),
    "overlap": (put([[0, 0, 2048], [1, 2047, 2049]], *W, "pieces"), "pieces overlap"),
    "hole": (put([[0, 0, 2047], [1, 2048, 2048]], *W, "pieces"), "leave a hole"),
    "rank beyond the world": (put([[0, 0, 2048], [9, 2048, 2048]], *W, "pieces"), "9 is out of range: expected 0 to 1"),
    "unknown dtype": (put("PICKLE", *W, "stored"), "unknown dtype 'PICKLE'"),
    "world of 10^9": (put(10**9, "world_size"), "world_size is 1000000000, but 2 files"),
    "a name twice": (put(["0.weight", "1.weight"], *W, "names"), "is listed twice"),
    "group beyond": (put([3, 0], *W, "group"), "no parameter group"),
    "state beyond": (put({"m": {"whole": "F32", "shape": [4], "rank": 7}}, *W, "states"), "7 is out of range"),
    "state of no kind": (put({"m": {"load": "x"}}, *W, "states"), "expected a value, a range or a whole tensor"),
    "unknown field": (put(1, *W, "loader"), "expected dtype, group"),
    "next schema": (put(2, "schema"), "schema 2, this version reads 1"),
    "parameters are a list": (put([], "parameters"), "parameters: expected an object"),
    "hash of another length": (put("ab", "files", 0, "hash"), "is not a hash"),
    "huge tensor inside": (put({"$tensor": ["F32", [1 << 50], ""]}, "extra"), "is not the shape of 0 bytes"),
    "unknown kind inside": (put({"$object": "os.system"}, "extra"), "unknown kind of value"),
}


def peak_rss_growth(work: Callable[[], Any]) -> int:
    """How far the resident set grew at its highest while `work` ran."""
    Path("/proc/self/clear_refs").write_text("5")

    def read(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def refused(path: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load(path)


def measured(path: Path, words: str) -> None:
    """`path` is refused with `words` in under a CPU second and 100 MB; what other tests left on the heap is out."""
    gc.freeze()
    started = time.process_time()
    if Path("/proc/self/clear_refs").exists():
        assert peak_rss_growth(lambda: refused(path, words)) < 100 << 20
    else:
        refused(path, words)
    assert time.process_time() - started < 1.0
    gc.unfreeze()


@pytest.mark.parametrize("case", CRAFTED)
def test_a_crafted_manifest_is_refused_quickly_and_cheaply(two_ranks: Path, case: str) -> None:
    change, words = CRAFTED[case]
    rewrite(two_ranks / "manifest.json", change)
    measured(two_ranks, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'"parameters":{"a":1,"a":2}}', "duplicate key 'a'"),
        (b'"extra":NaN}', "NaN is not JSON"),
        (b'"extra":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not valid JSON"),
        (b'"extra":' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b'"extra":[' + b"[]," * 650_000 + b"[]]}", "schema None"),
        (b'"extra":' + b"[" * 20_000_000, "bytes: at most"),
        (b'"extra":', "not valid JSON"),
        (b"\xff\xfe}", "not valid JSON"),
    ],
    ids=["duplicate", "nan", "deep", "digits", "many", "long", "cut", "encoding"],
)
def test_crafted_json_is_refused_quickly_and_cheaply(two_ranks: Path, text: bytes, words: str) -> None:
    data = b'{"checksum":"' + manifest.hash_of(text).encode() + b'",' + text
    (two_ranks / "manifest.json").write_bytes(data)
    measured(two_ranks, words)


def test_a_manifest_of_a_billion_tensors_is_refused_unread(two_ranks: Path) -> None:
    with (two_ranks / "manifest.json").open("r+b") as file:
        file.truncate(100 << 30)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        os.truncate(two_ranks / name, 1 << 40)
    measured(two_ranks, "bytes: at most")


def test_depth_that_json_reads_but_no_extra_has(two_ranks: Path) -> None:
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    try:
        rewrite(two_ranks / "manifest.json", put(deep, "extra"))
    except RecursionError:
        pytest.skip("this interpreter cannot write so deep a JSON value")
    measured(two_ranks, "nested too deeply|not valid JSON")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(-8, "tensors", "parameters/0.weight", "offset"), "out of range"),
        (put(10**18, "tensors", "parameters/0.weight", "offset"), "overlap or hole"),
        (put([1 << 40], "tensors", "parameters/0.weight", "shape"), "expected the hashes of"),
        (put("zz", "tensors", "parameters/0.weight", "hash"), "hashes of 1 blocks"),
        (put("0" * 32, "tensors", "parameters/0.weight", "hash"), "0.weight is damaged"),
        (put(1, "rank"), "files were swapped"),
        (put(10**12, "header_bytes"), "out of range"),
        (put(12, "bytes"), "should have 12 bytes"),
    ],
)
def test_a_crafted_rank_manifest_is_refused(two_ranks: Path, change: Any, words: str) -> None:
    path = two_ranks / "rank-00000.json"
    rewrite(path, change)
    raw = path.read_bytes()

    def adopt(body: Any) -> None:
        body["files"][0]["manifest_bytes"], body["files"][0]["manifest_hash"] = len(raw), manifest.hash_of(raw)

    rewrite(two_ranks / "manifest.json", adopt)
    measured(two_ranks, words)


def test_a_piece_that_its_shard_does_not_hold(two_ranks: Path) -> None:
    rewrite(two_ranks / "manifest.json", put([[0, 0, 4096]], *W, "pieces"))
    measured(two_ranks, r"has 8192 bytes, elements 0 to 4096 of it were asked for")


def test_a_huge_model_claimed_by_a_small_checkpoint_allocates_nothing(two_ranks: Path) -> None:
    def claim(body: Any) -> None:
        record = body["parameters"]["0.weight"]
        record["states"] = {"exp_avg": {"whole": "F32", "shape": [1 << 34], "rank": 0}}
        record["group"] = [0, 0]
        body["groups"] = [[{}]]

    rewrite(two_ranks / "manifest.json", claim)
    model = model_at(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    started = time.process_time()

    def attempt() -> None:
        with pytest.raises(CheckpointError, match=r"exp_avg"):
            checkpoint.load(two_ranks, model=model, optimizer=optimizer)

    assert peak_rss_growth(attempt) < 100 << 20
    assert time.process_time() - started < 1.0
