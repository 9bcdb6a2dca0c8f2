"""``trivium serve`` and ``trivium bench serve``: options, refusals with exit codes, and the whole way as a process."""

from __future__ import annotations

import asyncio
import csv
import importlib.util
import json
import os
import re
import socket
from dataclasses import fields
from pathlib import Path

import pytest

from tests.serve.test_model import folder  # noqa: F401 - a fixture
from trivium.bench.serve import COLUMNS
from trivium.bench.serve_client import get
from trivium.bench.serve_process import started
from trivium.cli.main import run
from trivium.serve.limits import Limits

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIVIUM_API_KEY", raising=False)


def test_every_cap_is_a_flag_with_its_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    assert run(["serve", "--help"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    for field in fields(Limits):
        flag = "--" + field.name.replace("_", "-")
        line = next(line for line in text.splitlines() if re.search(rf"{flag}\s", line))
        assert f"default: {field.default}" in line or f"[{field.default}]" in line, line


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_the_network_only_with_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str) -> None:  # H24
    assert run(["serve", str(tmp_path), "--host", host, "--port", "0"]) == 2
    told = capsys.readouterr().err
    assert "--api-key-file" in told
    assert "--host 127.0.0.1" in told


def test_a_port_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # H23
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        assert run(["serve", str(tmp_path), "--port", str(sock.getsockname()[1])]) == 2
    assert f"is taken by process {os.getpid()}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--port", "70000"], "0 to 65535"),
        (["--host", "203.0.113.7", "--api-key", "long-enough"], "not an address of this machine"),
        (["--api-key", "short"], "API key 1 has 5 bytes"),
        (["--api-key-file", "nowhere"], "cannot be read"),
        (["--queue", "-1"], "limits.queue=-1"),
        (["--body-bytes", "0"], "limits.body_bytes=0"),
        (["--access-log", "/nowhere/at/all"], "--access-log"),
        (["--threads", "0"], "'--threads': Input should be greater than or equal to 1"),
        (["--max-sequences", "0"], "'--max-sequences': Input should be greater than or equal to 1"),
        (["--step-tokens", "1"], "'--step-tokens': Input should be greater than or equal to 2"),
        (["--max-positions", "0"], "'--max-positions': Input should be greater than or equal to 1"),
    ],
)
def test_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str) -> None:
    assert run(["serve", str(tmp_path), *options]) == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_package_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # C8
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    assert run(["serve", str(tmp_path)]) == 3
    told = " ".join(capsys.readouterr().err.split())
    assert "needs uvicorn: in the project's folder, pip install -e '.[serve]'" in told


def test_models_that_cannot_be_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", str(tmp_path / "none")]) == 5
    assert "no such folder" in capsys.readouterr().err


def test_empty_keys_are_no_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "keys").write_text("# none yet\n\n")
    assert run(["serve", str(tmp_path), "--api-key-file", str(tmp_path / "keys")]) == 2
    assert "holds no key" in capsys.readouterr().err
    monkeypatch.setenv("TRIVIUM_API_KEY", " ")
    assert run(["serve", str(tmp_path)]) == 2
    assert "TRIVIUM_API_KEY is set and empty" in capsys.readouterr().err


def test_the_whole_way_as_a_process(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with started(str(folder), ["--threads=1", "--memory=64MiB"]) as server:
        url = server.url
        status, found = asyncio.run(get(url, "/models"))
        assert (status, [entry["id"] for entry in found["data"]]) == (200, ["tiny"])
        table, picture = tmp_path / "t.csv", tmp_path / "p.svg"
        command = ["bench", "serve", "--url", url, "--concurrency", "1,4", "--rates", "5", "--requests", "4"]
        command += ["--duration", "1", "--prompt-words", "4", "--max-tokens", "8", "--json", "-"]
        assert run([*command, "--csv", str(table), "--plot", str(picture)]) == 0
        report = json.loads(capsys.readouterr().out)
        assert [row["failed"] for row in report["loads"]] == [0, 0, 0]
        assert all(row["tokens_per_s"] > 0 for row in report["loads"][:2])
        with table.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS
        assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize("option", ["--concurrency", "--rates"])
@pytest.mark.parametrize("numbers", ["nan", "inf", "-1", "0", "1,inf", "1;2", "a", "1e400"])
def test_bench_wants_numbers(capsys: pytest.CaptureFixture[str], option: str, numbers: str) -> None:
    assert run(["bench", "serve", "--url", "http://127.0.0.1:1/v1", option, numbers]) == 2
    assert f"{option} '{numbers}': expected numbers above 0" in " ".join(capsys.readouterr().err.split())


def test_bench_wants_whole_requests_under_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--url", "http://127.0.0.1:1/v1", "--concurrency", "1,1.5"]) == 2
    assert "--concurrency '1,1.5': expected whole numbers" in " ".join(capsys.readouterr().err.split())
    assert run(["bench", "serve", "--url", "http://127.0.0.1:1/v1", "--concurrency", "", "--rates", "1.5"]) == 3


def test_bench_wants_one_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve"]) == 2
    assert run(["bench", "serve", "x", "--url", "http://127.0.0.1:1/v1"]) == 2
    assert run(["bench", "serve", "--url", "http://127.0.0.1:1/v1"]) == 3
    assert "does not answer" in capsys.readouterr().err
    assert run(["bench", "serve", "--url", "ftp://x/v1", "--concurrency", "a"]) == 2
