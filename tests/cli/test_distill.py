"""``trivium distill`` on the command line: what it asks for, and that train sends its runs here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.train import cases
from trivium.cli.main import run


def written(folder: Path, **tables: Any) -> str:
    cases.words(folder)
    path = folder / "student.json"
    path.write_text(json.dumps({**cases.table(folder), **tables}))
    return str(path)


def test_a_run_with_a_teacher_is_not_trained_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = written(tmp_path, distill={"teacher": "runs/teacher"})
    assert run(["train", config]) == 2
    assert f"has a [distill] table: use trivium distill {config}" in capsys.readouterr().err


def test_a_teacher_must_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill", written(tmp_path)]) == 2
    assert "has no [distill] table: name the teacher" in capsys.readouterr().err


def test_a_teacher_that_is_not_there_is_exit_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["distill", written(tmp_path), "--teacher", str(tmp_path / "nobody")]) == 5
    assert "holds no complete checkpoint" in capsys.readouterr().err


def test_a_student_is_trained_and_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = written(tmp_path)
    assert run(["train", teacher, "--run", str(tmp_path / "teacher")]) == 0
    capsys.readouterr()
    options = ["--teacher", str(tmp_path / "teacher"), "--set", "distill.stop=2", "--set", "model.layers=1", "--json"]
    assert run(["distill", teacher, "--run", str(tmp_path / "student"), *options]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["distilled"] == 2 and answer["steps"] == 4 and answer["parameters"] == answer["activated"]
    assert run(["distill", teacher, "--run", str(tmp_path / "student"), *options[:-1]]) == 0
    assert "distilled until step 2" in capsys.readouterr().err
