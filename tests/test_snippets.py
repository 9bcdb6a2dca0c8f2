"""Programs that the documentation prints run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.worlds import ROOT, Launch, child_environment


def programs(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.DOTALL | re.M)


def test_getting_started_runs_on_two_ranks(launch: Launch, tmp_path: Path) -> None:
    (program,) = programs("getting-started.md")
    script = tmp_path / "program.py"
    target = tmp_path / "run" / "step-00000010"
    assert program.count('"run/step-00000010"') == 1
    script.write_text(program.replace('"run/step-00000010"', repr(str(target))))
    launched = launch([str(script)], ranks=2)
    assert launched.wait(timeout=240) == 0, launched.stderr
    assert sorted(path.name for path in target.iterdir()) == [
        "manifest.json",
        *(f"rank-0000{rank}.{kind}" for rank in (0, 1) for kind in ("json", "safetensors")),
    ]


def test_a_plan_from_python() -> None:
    (program,) = programs("plan.md")
    done = subprocess.run(
        [sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "total" in done.stdout
