"""The configurations of the demo's runs, as the same plain values that a TOML file holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

RANKS = 2


def same(folder: Path) -> Mapping[str, Any]:
    """A short run to be repeated at every stage, killed and resumed: what counts is its last bit.

    Without clipping, so that one process can repeat it with torch alone; on one thread, since two give other bits.
    """
    return {
        "run": str(folder / "same"),
        "model": {"dim": 128, "layers": 4, "heads": 4, "kv_heads": 2, "ffn_dim": 352},
        "data": {"limit_bytes": 2_000_000, "vocabulary": 2048, "sequence": 128, "cache": str(folder / "text")},
        "optimizer": {"lr": 2e-3},
        "schedule": {"warmup_steps": 5},
        "train": {
            "steps": 24,
            "micro_batch": 2,
            "batch": 4,
            "clip": 0.0,
            "validate_every": 0,
            "log_every": 1000,
            "threads": 1,
        },
        "checkpoint": {"every": 0, "resume": "never"},
        "report": {"html": False},
    }


def text(folder: Path) -> Mapping[str, Any]:
    """A small language model on the standard library's source at stage 3."""
    return {
        "run": str(folder / "text-model"),
        "model": {"dim": 192, "layers": 4, "heads": 6, "ffn_dim": 512, "tied": True, "max_positions": 512},
        "data": {"vocabulary": 2048, "sequence": 128, "validation": 0.02, "cache": str(folder / "text")},
        "optimizer": {"lr": 4e-3, "betas": (0.9, 0.98)},
        "schedule": {"kind": "wsd", "warmup_steps": 20, "min_ratio": 0.02, "decay_fraction": 0.4},
        "zero": {"stage": 3},
        "train": {
            "steps": 160,
            "micro_batch": 8,
            "batch": 16,
            "validate_every": 80,
            "validation_batches": 0,
            "log_every": 50,
        },
        "checkpoint": {"every": 0, "resume": "never"},
        "report": {"prompts": ("def __init__(self", "import os\nimport "), "sample_tokens": 24},
    }


def teacher(folder: Path) -> Path:
    """Where the run of `tasks` lies."""
    return folder / "task-teacher"


def tasks(folder: Path) -> Mapping[str, Any]:
    """A pyramid of residual experts, half of them on each rank, that adds, reverses, sorts and finds the largest."""
    return {
        **_task_run(teacher(folder), steps=700),
        "model": {**_TASK_MODEL, "layers": 4, "moe": {**_EXPERTS, "experts": [4, 8]}},
        "mesh": {"ep": RANKS},
    }


def student(folder: Path) -> Mapping[str, Any]:
    """One layer less, which begins as the teacher's, learns from it for three fifths of its run, then on its own."""
    return {
        **_task_run(folder / "task-student", steps=360),
        "model": {**_TASK_MODEL, "layers": 3, "moe": {**_EXPERTS, "experts": [4, 8], "layers": [1, 2]}},
        "mesh": {"ep": RANKS},
        "distill": {"teacher": str(teacher(folder)), "stop": 0.6},
    }


def dense(folder: Path) -> Mapping[str, Any]:
    """As many parameters for each token as the teacher, without experts."""
    return {
        **_task_run(folder / "task-dense", steps=700),
        "model": {**_TASK_MODEL, "layers": 4},
    }


_TASK_MODEL = MappingProxyType({"dim": 128, "heads": 4, "ffn_dim": 352, "tied": True, "max_positions": 512})
_EXPERTS = MappingProxyType({"ffn_dim": 176, "residual": "add"})


def _task_run(folder: Path, steps: int) -> dict[str, Any]:
    return {
        "run": str(folder),
        "tasks": {},
        "data": {"sequence": 64},
        "optimizer": {"lr": 3e-3, "betas": (0.9, 0.98)},
        "schedule": {"kind": "wsd", "warmup_steps": 50, "min_ratio": 0.0, "decay_fraction": 0.5},
        "zero": {"stage": 3},
        "train": {"steps": steps, "micro_batch": 16, "batch": 32, "validate_every": steps, "log_every": 50},
        "checkpoint": {"every": 0, "resume": "never"},
        "report": {
            "task_prompts": 300,
            "score_every": 200,
            "score_prompts": 20,
            "prompts": ("add 12+35>", "reverse qzkab>", "sort qzkab>", "max 31 7 92>"),
            "sample_tokens": 10,
        },
    }
