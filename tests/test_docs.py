from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.worlds import ROOT, child_environment
from trivium.cli.main import VERBS


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run(
        [*command, str(ROOT / "docs"), str(tmp_path / "html")],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "html" / f"{page.stem}.html").exists()


def test_every_verb_is_on_the_command_line_page() -> None:
    page = (ROOT / "docs" / "command-line.md").read_text()
    for verb, _, _ in VERBS:
        assert f"`trivium {verb}" in page, verb


def test_links_between_the_top_files_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert re.match(r"https?://", target) or (ROOT / target).exists(), f"{name}: {target}"
