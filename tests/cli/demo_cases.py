"""What the ranks run for tests/cli/test_demo.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trivium.base import config as configs
from trivium.cli import demo_runs, demo_same
from trivium.train.config import TrainConfig
from trivium.train.loop import train


def same(mesh: Any, config: str, rows: str) -> list[dict[str, Any]]:
    """The demo's second part; its rows of JSON."""
    demo_same.run(Path(config), Path(rows), mesh)
    mesh.comm("world").barrier()
    return [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]


def teach(mesh: Any, folder: str) -> None:
    """The demo's task model, experts on both ranks, after a few steps of a small one."""
    values = json.loads(json.dumps(demo_runs.tasks(Path(folder))))
    values["model"] |= {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "max_positions": 64}
    values["model"]["moe"] |= {"experts": [4], "layers": [1], "ffn_dim": 24}
    values["tasks"] = {"examples": 400}
    values["schedule"] = {"warmup_steps": 2}
    values["train"] |= {"steps": 6, "micro_batch": 2, "batch": 4, "validate_every": 0}
    values["report"] = {"html": False, "task_prompts": 4, "prompts": [], "score_every": 0}
    train(configs.build(TrainConfig, values), mesh, terminal=False)
    mesh.comm("world").barrier()
