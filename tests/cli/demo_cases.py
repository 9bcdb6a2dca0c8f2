"""What the ranks run for tests/cli/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivium.cli import demo_same


def same(mesh: Any, config: str, rows: str) -> list[dict[str, Any]]:
    """The demo's second part; its rows of JSON."""
    demo_same.run(Path(config), Path(rows), mesh)
    mesh.comm("world").barrier()
    return [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
