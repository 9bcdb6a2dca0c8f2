"""The demo's second part, on its ranks: stages 0 to 3 and one process doing the same work, in one launch.

ZeRO section 5: what is partitioned changes, what is computed does not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trivium import zero
from trivium.base import config as configs
from trivium.dist.mesh import Mesh
from trivium.models import Decoder, build
from trivium.train.build import adamw, decoder_of, read_text
from trivium.train.config import TrainConfig
from trivium.train.data import Loader
from trivium.train.digest import sha256_of
from trivium.train.loop import train
from trivium.train.schedule import factor


def run(config_path: Path, rows_path: Path, mesh: Mesh) -> int:
    """Train the configuration at every stage, then on rank 0 alone with nothing but torch; a row of JSON for each.

    Returns the signal that stopped one of the runs and with it the rest, or 0.
    """
    config = configs.load(TrainConfig, config_path)

    def write(**row: Any) -> None:
        if mesh.rank == 0:
            with rows_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    for stage in range(4):
        begun = time.perf_counter()
        at_stage = replace(config, run=f"{config.run}/stage-{stage}", zero=replace(config.zero, stage=stage))
        outcome = train(at_stage, mesh, terminal=False)
        if outcome.signal:
            return outcome.signal
        sent = [row["payload_bytes"] for row in outcome.rows if row["kind"] == "step"][2:]
        write(
            name=f"stage {stage}",
            sha256=outcome.digest,
            seconds=time.perf_counter() - begun,
            sent_bytes=sent[len(sent) // 2] if sent else 0,
        )
    _alone(config, mesh, write)
    return 0


def _alone(config: TrainConfig, mesh: Mesh, write: Callable[..., None]) -> None:
    """One process: the same micro-batches one after the other, torch's own backward and optimizer, nothing sharded."""
    settings = replace(config, run=f"{config.run}/stage-0")
    text = read_text(settings, mesh)
    decoder = decoder_of(settings, text.tokenizer.vocabulary)
    fresh = build(decoder, device="meta")
    zero.shard(fresh, None, mesh, seed=config.train.seed, stage=0)
    weights = zero.full_state_dict(fresh)
    if mesh.rank != 0:
        return
    begun = time.perf_counter()
    model = Decoder(decoder)
    model.load_state_dict(weights)
    optimizer = adamw(model, config.optimizer)
    loader = Loader(
        text.train,
        sequence=config.data.sequence,
        batch_size=config.train.micro_batch,
        seed=config.train.seed,
        vocabulary=decoder.vocabulary,
    )
    for step in range(config.train.steps):
        tokens = 0
        for _ in range(config.train.accumulation_for(1)):
            batch = next(loader)
            tokens += batch.num_tokens
            loss: torch.Tensor = model(
                batch.tokens,
                batch.targets,
                positions_BT=batch.positions,
                documents_BT=batch.documents,
                reduction="sum",
            )
            loss.backward()  # type: ignore[no-untyped-call]
        for group in optimizer.param_groups:
            group["lr"] = config.optimizer.lr * factor(config.schedule, step, config.train.steps)
            for param in group["params"]:
                param.grad.div_(tokens)
        optimizer.step()
        optimizer.zero_grad()
    write(
        name="plain torch",
        sha256=sha256_of(model.named_parameters()),
        seconds=time.perf_counter() - begun,
        sent_bytes=0,
    )
