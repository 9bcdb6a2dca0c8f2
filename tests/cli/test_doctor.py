"""What ``trivium doctor`` finds, and that a broken machine gets a fix for each thing (row C12)."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tests.worlds import child_environment
from trivium.cli import doctor
from trivium.cli.main import run
from trivium.kernels import build, registry

Usage = namedtuple("Usage", "total used free")
NAMES = [
    "python",
    "torch",
    "cpu",
    "gpu",
    "memory",
    "disk",
    "shared memory",
    "environment",
    "ports",
    "ranks",
    "compiler",
    "kernels",
]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [check["name"] for check in report["checks"]] == [*NAMES, "extras"]
    for check in report["checks"]:
        assert set(check) == {"name", "status", "found", "fix", "data"}
        assert check["status"] in ("ok", "note", "warn", "fail")
        assert check["found"]
        assert check["fix"] or check["status"] == "ok"


def test_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert run(["doctor"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert max(map(len, captured.out.split("\n"))) <= 40
    for name in NAMES:
        assert f"{name}:" in captured.out


def broken(capsys: pytest.CaptureFixture[str], name: str) -> dict[str, str]:
    assert run(["doctor", "--json"]) == 3
    captured = capsys.readouterr()
    assert f"fixing before Trivium can run here: {name}" in captured.err
    report = json.loads(captured.out)
    assert report["ok"] is False
    (check,) = [check for check in report["checks"] if check["status"] == "fail"]
    assert check["name"] == name
    return check


def test_old_torch(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.3.1" if name == "torch" else real(name))
    check = broken(capsys, "torch")
    assert check["found"] == "2.3.1 is too old"
    assert check["fix"] == "pip install 'torch>=2.11'"


def test_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    check = doctor.check_torch()
    assert check.status == "fail"
    assert check.found == "is not installed"


def test_a_machine_without_torch_still_gets_its_report() -> None:
    program = "import sys; sys.modules['torch'] = None; from trivium.cli.main import main; main(['doctor', '--json'])"
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: 1 thing needs fixing before Trivium can run here: torch\n"
    assert [check["name"] for check in json.loads(done.stdout)["checks"]] == [*NAMES, "extras"]


@pytest.mark.parametrize(
    ("variants", "compiler", "words"),
    [
        ((), None, "no C++ compiler was there"),
        ((), "c++", "generation is several times slower"),
        (("generic",), "c++", "without this CPU's vector instructions"),
    ],
)
def test_what_is_lost_without_native_kernels(
    variants: tuple[str, ...], compiler: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "native_variants", lambda: variants)
    monkeypatch.setattr(build, "find_compiler", lambda: compiler)
    check = doctor.check_kernels()
    assert check.status == "note" and words in check.found
    assert check.fix is not None and check.fix.startswith("python -m trivium.kernels.build")
    assert check.data == {"variants": list(variants)}


def test_full_disk(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1 << 40, 1 << 40, 1 << 20))
    check = broken(capsys, "disk")
    assert "free at least 64 MiB" in check["fix"]


def test_small_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(64 << 20, 0, 64 << 20))
    if Path("/dev/shm").is_dir():
        check = doctor.check_shared_memory()
        assert (check.status, check.found) == ("warn", "64.00 MiB free in /dev/shm")
        assert "--shm-size" in (check.fix or "")


def test_half_a_launcher(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert run(["doctor", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    (check,) = [check for check in report["checks"] if check["name"] == "environment"]
    assert check["status"] == "fail"
    assert "WORLD_SIZE" in check["found"]
    assert "torchrun" in check["fix"]


def test_no_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def bind(self, address: object) -> None:
            raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", Refused)
    check = doctor.check_ports()
    assert (check.status, check.found) == ("fail", "no port on 127.0.0.1: Operation not permitted")


def test_the_usual_port_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(doctor, "DEFAULT_PORT", other.getsockname()[1])
        check = doctor.check_ports()
    assert check.status == "note"
    assert "MASTER_PORT" in (check.fix or "")


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", missing)
    check = doctor.check_disk()
    assert check.status == "fail" and "TMPDIR" in (check.fix or "")


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode() -> float:
        raise OSError("no such sensor")

    monkeypatch.setattr(doctor, "usable_cores", explode)
    (check,) = [check for check in doctor.look() if check.name == "cpu"]
    assert (check.status, check.found) == ("warn", "could not be looked at: no such sensor")


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("flags\t\t: fpu avx2 fma avx512f amx_tile amx_bf16\n", ["AVX2", "FMA", "AVX-512", "AMX"]),
        ("Features\t: fp asimd sve i8mm bf16\n", ["NEON", "SVE", "int8 matrix", "bf16"]),
        ("flags : sse2\n", []),
    ],
)
def test_cpu_features(text: str, features: list[str]) -> None:
    assert doctor.cpu_features(text) == features
