"""Where a report goes: what cannot be written is refused before, what exists is replaced whole or written as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.worlds import ROOT, child_environment
from trivium.base.errors import ConfigError
from trivium.cli.report import check_files, keep

REPORT = {"of": "ä", "figures": [1, 2]}
PROGRAM = (
    "import sys\nfrom pathlib import Path\nfrom trivium.cli.report import check_files, keep\n"
    "check_files(Path(sys.argv[1]))\nkeep({'figures': [1]}, Path(sys.argv[1]))\nprint('and a table')"
)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "x.json")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for path, words in (
        (tmp_path, "it is a folder"),
        (tmp_path / "no" / "x.json", "the folder .* does not exist"),
        (tmp_path / "nowhere", "cannot be written .*No such file"),
        (tmp_path / "round", "cannot be written .*symbolic links"),
        (tmp_path / ("x" * 300), "cannot be written .*too long"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_files(None, path)
    check_files(None, Path("-"), tmp_path / "x.json", Path("/dev/null"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nowhere", "round"]


def test_a_file_or_a_folder_without_leave_to_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "x.json").touch(0o400)
    (tmp_path / "shut").mkdir(0o500)
    for path in (tmp_path / "x.json", tmp_path / "shut" / "x.json"):
        with pytest.raises(ConfigError, match="Permission denied"):
            check_files(path)


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "x.json", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    with target.open() as held:
        keep(REPORT, link)
        assert held.read() == "before"  # who reads meanwhile has the whole of it
    assert link.is_symlink() and json.loads(target.read_text(encoding="utf-8")) == REPORT
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["x.json"]


def test_what_is_no_file_is_written_as_it_is(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", []
    os.mkfifo(pipe)
    listener = threading.Thread(target=lambda: heard.append(pipe.read_text(encoding="utf-8")), daemon=True)
    listener.start()
    keep(REPORT, pipe)
    listener.join(60)
    assert pipe.is_fifo() and json.loads(heard[0]) == REPORT
    keep(REPORT, Path("/dev/null"))
    assert Path("/dev/null").is_char_device()


def test_a_full_disk_leaves_the_report_before_and_nothing_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "x.json"
    keep(REPORT, file)

    def full(path: Path, text: str, encoding: str) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
        patched.setattr(Path, "write_text", full)
        keep({}, file)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert json.loads(file.read_text(encoding="utf-8")) == REPORT


@pytest.mark.skipif(sys.platform != "linux", reason="names of descriptors as Linux has them")
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1"])
def test_stdout_by_name_has_the_report_and_then_the_rest(tmp_path: Path, name: str) -> None:
    command, environment = [sys.executable, "-c", PROGRAM, name], child_environment()
    if name == "/dev/stdout":  # once a file, once a pipe
        with (tmp_path / "out").open("w") as out:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=out, check=True, timeout=240)
        said = (tmp_path / "out").read_text()
    else:
        said = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=240
        ).stdout
    report, _, rest = said.rpartition("}\n")
    assert json.loads(report + "}") == {"figures": [1]} and rest == "and a table\n"
    assert Path("/dev/stdout").is_symlink()
