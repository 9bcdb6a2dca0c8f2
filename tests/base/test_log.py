from __future__ import annotations

import logging

import pytest

from trivium.base import log


@pytest.fixture(autouse=True)
def _restore():
    logger = log.get()
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def test_words_go_to_stderr_once_with_the_rank(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(rank=1, size=2)
    log.setup(rank=1, size=2)
    log.get().info("hidden")
    log.get().warning("slow disk")
    captured = capsys.readouterr()
    assert captured.err == "[rank 1] warning: slow disk\n"
    assert captured.out == ""


def test_a_world_of_one_has_no_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup()
    log.get().info("step 1")
    log.get().debug("hidden")
    assert capsys.readouterr().err == "step 1\n"


def test_verbose_says_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert log.setup(rank=3, size=4, verbose=True).level == logging.DEBUG
    log.get().debug("detail")
    assert capsys.readouterr().err == "[rank 3] detail\n"
