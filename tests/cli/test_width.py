"""Row C9 for what the verbs print as tables: forty columns of screen, and no figure is cut off."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from trivium.cli.main import run
from trivium.cli.output import fitted

HEADER = ("stage", "weights", "gradients", "optimizer", "bytes/Ψ", "sent/step")
ROWS = [(str(stage), "8.26 MiB", "8.26 MiB", "16.51 MiB", "16.00", "123.45 MiB") for stage in range(4)]


def shown(width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(fitted(HEADER, ROWS, width))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize("width", [20, 40, 56, 120])
def test_a_table_keeps_every_figure_at_any_width(width: int) -> None:
    text = shown(width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    if width >= 40:
        assert text.count("8.26") == 8 and text.count("123.45") == text.count("16.51") == 4
    assert (text.split()[1] == "weights") == (width > 80)


@pytest.mark.parametrize("verb", ["plan", "paper", "demo"])
def test_c9_plans_on_forty_columns(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    arguments = {
        "plan": ["plan", "--preset", "7.5b", "--ranks", "64"],
        "paper": ["plan", "--paper"],
        "demo": ["demo", "--part", "1", "--folder", str(tmp_path / "demo")],
    }[verb]
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "…" not in out and "\x1b" not in out
    figures = {"plan": ("120.02", "31.41", "16.64", "1.88", "2.98"), "paper": ("31.4", "16.6", "1.88", "15.6")}
    for figure in figures.get(verb, ("8.26", "16.51", "2.00", "2.61")):
        assert figure in out, out
