"""Run under torchrun: save a sharded layer at step 1 and 2 (or only the step given) on every rank."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import trivium as tv
from tests.checkpoint.ranks import Cut, even


def main() -> None:
    mesh = tv.init()
    for step in [int(text) for text in sys.argv[2:]] or [1, 2]:
        model = nn.Linear(64, 64)
        cut = Cut(model, mesh.rank, even(model, mesh.size), torch.optim.AdamW)
        for piece in cut.pieces.values():
            piece.fill_(step)
        tv.checkpoint.save(
            Path(sys.argv[1]) / f"step-{step:08d}",
            model=model,
            optimizer=cut.optimizer,
            extra={"step": step},
            mesh=mesh,
        )
    tv.shutdown()


main()
