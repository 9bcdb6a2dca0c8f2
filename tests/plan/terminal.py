"""The command line in this process: exit code, stdout and stderr."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trivium.cli.main import run


def trivium(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def trivium_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    code, out, _ = trivium(capsys, *arguments, "--json")
    return code, json.loads(out)
