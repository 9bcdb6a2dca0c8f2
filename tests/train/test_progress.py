"""What a person sees of a run: a live line on a terminal, plain lines elsewhere, nothing from the other ranks."""

from __future__ import annotations

import logging

import pytest

from trivium.train.progress import Display


def steps_of(display: Display) -> None:
    with display:
        display.step(1, 5.0, 1000.0)
        display.validation(2, 4.25)
        display.step(2, 4.5, 1000.0)
        display.scores(2, {"max": 0.5}, {"max": {"1": [3, 1]}})
        display.step(3, 4.0, 2500.0)


def test_a_terminal_has_one_line_that_lives(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with caplog.at_level(logging.INFO, "trivium"):
        steps_of(Display(steps=3, done=0, every=1, shown=True, terminal=True))
    out, err = capsys.readouterr()
    assert out == "" and caplog.text == ""
    assert "\x1b[" in err  # the line is drawn over itself
    assert "3/3" in err and "loss 4.000" in err and "validation 4.250" in err
    assert err.count("step 2: max 50%") == 1


def test_elsewhere_there_are_lines_every_so_often(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "trivium"):
        steps_of(Display(steps=3, done=0, every=2, shown=True, terminal=False))
    told = [record.getMessage() for record in caplog.records]
    assert "\x1b" not in "".join(capsys.readouterr()) + caplog.text
    assert [line.split("  ")[0] for line in told if " of " in line] == ["step 2 of 3", "step 3 of 3"]
    assert "step 2: validation loss 4.2500" in told and "step 2: max 50%" in told


def test_other_ranks_say_nothing(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "trivium"):
        steps_of(Display(steps=3, done=0, every=1, shown=False, terminal=True))
    assert "".join(capsys.readouterr()) + caplog.text == ""
