"""Forked children that die where a test wants them to, and models whose values tell their step."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from trivium import checkpoint
from trivium.base import fault


def fork(work: Callable[[], None], armed: str = "") -> int:
    """The pid of a child that runs `work` with `armed` faults; it exits 0, or 1 with a traceback on stderr."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ[fault.VARIABLE] = armed
        fault.faults.cache_clear()
        work()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(pid: int) -> int:
    """The exit code of a child; minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(work: Callable[[], None], armed: str = "") -> int:
    return ended(fork(work, armed))


def kill(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)
    return ended(pid)


def model_at(step: int, size: int = 64) -> nn.Module:
    """Every value is the step; with momentum of the step too."""
    model = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step)
    return model


def optimizer_at(model: nn.Module, step: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=step or 1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.full_like(parameter, step),
            "exp_avg_sq": torch.full_like(parameter, step),
        }
    return optimizer


def save_step(folder: Path, step: int, size: int = 64, keep_last: int | None = None, overwrite: bool = False) -> Path:
    model = model_at(step, size)
    return checkpoint.save(
        folder / f"step-{step:08d}",
        model=model,
        optimizer=optimizer_at(model, step),
        extra={"step": step},
        keep_last=keep_last,
        overwrite=overwrite,
    )


def load_newest(folder: Path, size: int = 64) -> int:
    """The step of the newest checkpoint, after it was loaded and every value was looked at."""
    path = checkpoint.latest(folder)
    assert path is not None, "no complete checkpoint"
    model = model_at(0, size)
    optimizer = optimizer_at(model, 0)
    step = checkpoint.load(path, model=model, optimizer=optimizer)["step"]
    for parameter in model.parameters():
        values = [parameter, *(optimizer.state[parameter][key] for key in ("step", "exp_avg", "exp_avg_sq"))]
        assert all(bool((value == step).all()) for value in values)
    assert isinstance(step, int)
    return step
