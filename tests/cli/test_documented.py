"""The command-line page tells every option of the verbs that it gives tables for, and no option that is not there."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.main import get_command

from tests.worlds import ROOT
from trivium.cli.main import build_app

PAGE = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## trivium (\w+)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def options_of(verb: str, *inside: str) -> set[str]:
    command: Any = get_command(build_app(verb))
    for name in (verb, *inside):
        command = command.commands[name]
    shown = [option for option in command.params if not getattr(option, "hidden", False)]
    return {word for option in shown for word in option.opts if word.startswith("--") and word != "--help"}


@pytest.mark.parametrize("verb", ["demo", "train", "distill", "plan", "convert", "doctor"])
def test_every_option_is_told_and_every_option_told_is_there(verb: str) -> None:
    told = set(re.findall(r"--[a-z][a-z-]+", SECTIONS[verb]))
    there = options_of(verb)
    assert there - told == set()
    assert told - there <= {"--nproc-per-node"}, "torchrun's own are the only others"


def test_those_of_bench_zero_too() -> None:
    section = SECTIONS["bench"].split("`trivium bench moe`")[0]
    told = set(re.findall(r"--[a-z][a-z-]+", section))
    there = {option for option in options_of("bench", "zero") if f"--no-{option[2:]}" not in told}
    assert there - told == set()
