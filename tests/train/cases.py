"""Cases for tests/train/test_loop*.py: what each rank of a world runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from trivium import checkpoint, zero
from trivium.base import config as configs
from trivium.base.errors import TriviumError
from trivium.train import saving
from trivium.train.build import assemble, read_text
from trivium.train.config import TrainConfig
from trivium.train.digest import weights_sha256
from trivium.train.evaluate import Generator
from trivium.train.loop import train
from trivium.train.nonfinite import Policy
from trivium.train.step import Stepper


def words(folder: Path, files: int = 12) -> Path:
    """A few files of text that is easy to learn from."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for number in range(files):
        lines = [f"def function_{number}_{i}(value):\n    return value + {i * number}\n" for i in range(40)]
        (text / f"file_{number}.py").write_text("\n".join(lines))
    return text


def table(folder: Path, **changed: Any) -> dict[str, Any]:
    """A run of seconds; ``changed`` by dotted key with ``__`` for the dot."""
    values: dict[str, Any] = {
        "run": str(folder / "run"),
        "model": {"dim": 32, "layers": 2, "heads": 2, "ffn_dim": 48, "tied": True},
        "data": {
            "paths": [str(folder / "text")], "vocabulary": 300, "sequence": 32, "validation": 0.2,
            "cache": str(folder / "cache"),
        },
        "schedule": {"warmup_steps": 2},
        "train": {
            "steps": 4, "micro_batch": 2, "batch": 8, "validate_every": 2, "validation_batches": 3, "log_every": 2,
        },
        "checkpoint": {"every": 2},
        "report": {"html": False},
    }  # fmt: skip
    for key, value in changed.items():
        name, _, entry = key.partition("__")
        if entry:
            values.setdefault(name, {})[entry] = value
        else:
            values[name] = value
    return values


def config_of(values: dict[str, Any]) -> TrainConfig:
    return configs.build(TrainConfig, values)


def run(mesh: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A whole run; what it ended with."""
    outcome = train(config_of(values), mesh)
    return {
        "digest": outcome.digest, "loss": outcome.loss, "validation": outcome.validation, "steps": outcome.steps,
        "skipped": outcome.skipped, "rows": list(outcome.rows), "checkpoint": str(outcome.checkpoint),
        "scores": outcome.scores, "samples": outcome.samples,
    }  # fmt: skip


def refused(mesh: Any, values: dict[str, Any]) -> tuple[str, int, str]:
    """The error that a run ends with."""
    try:
        train(config_of(values), mesh)
    except TriviumError as error:
        return type(error).__name__, error.exit_code, str(error)
    return "", 0, ""


def stages(mesh: Any, values: dict[str, Any], which: list[int]) -> list[tuple[str, list[float], float]]:
    """Hash of the weights, losses and validation after the run's steps, per stage."""
    found = []
    text = read_text(config_of(values), mesh)
    for stage in which:
        config = config_of({**values, "zero": {"stage": stage, "bucket_bytes": 4096}})
        parts = assemble(config, mesh, text)
        stepper = Stepper(config, parts, mesh.channel(mesh.comm("dp"), "control"), mesh.device)
        losses = [stepper.step(step).loss for step in range(config.train.steps)]
        validation, _ = stepper.validate(text.validation)
        found.append((weights_sha256(parts.model), losses, validation))
    return found


def _stepper(mesh: Any, config: TrainConfig) -> Stepper:
    parts = assemble(config, mesh, read_text(config, mesh))
    return Stepper(config, parts, mesh.channel(mesh.comm("dp"), "control"), mesh.device)


def poisoned(mesh: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Two good steps with one between them whose gradient is not finite on the last rank only."""
    config = config_of(values)
    stepper = _stepper(mesh, config)
    policy = Policy(config, stepper)
    model = stepper.parts.model
    hashes, finite, counted, norms = [], [], [], []
    for step in range(3):
        handle = None
        if step == 1 and mesh.rank == mesh.size - 1:
            handle = model.blocks[1].mlp.up.weight.register_hook(lambda gradient: gradient * math.nan)
        result = stepper.step(step)
        if handle is not None:
            handle.remove()
        finite.append(result.finite)
        norms.append(result.gradient_norm)
        counted.append(policy.see(result))
        hashes.append(weights_sha256(model))
    return {"hashes": hashes, "finite": finite, "counted": counted, "norms": norms, "in_a_row": policy.in_a_row}


def poisoned_for_good(mesh: Any, values: dict[str, Any]) -> tuple[str, str]:
    """The error of a run whose gradient on the last rank is never finite, and whether weights stayed as they were."""
    config = config_of(values)
    stepper = _stepper(mesh, config)
    policy = Policy(config, stepper)
    model = stepper.parts.model
    before = weights_sha256(model)
    handle = None
    if mesh.rank == mesh.size - 1:
        handle = model.blocks[1].mlp.up.weight.register_hook(lambda gradient: gradient * math.nan)
    try:
        for step in range(20):
            policy.see(stepper.step(step))
    except TriviumError as error:
        same = "same" if weights_sha256(model) == before else "changed"
        return f"{type(error).__name__} {error}", same
    finally:
        if handle is not None:
            handle.remove()
    return "", ""


def recomputing(mesh: Any, values: dict[str, Any]) -> list[str]:
    """The hash with and without recomputation."""
    found = []
    for recompute in (False, True):
        stepper = _stepper(mesh, config_of({**values, "train": {**values["train"], "recompute": recompute}}))
        for step in range(2):
            stepper.step(step)
        found.append(weights_sha256(stepper.parts.model))
    return found


def greedy(mesh: Any, values: dict[str, Any], prompts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """What this rank's share of ``prompts`` goes on with, in a batch and one by one."""
    stepper = _stepper(mesh, config_of(values))
    parts = stepper.parts
    writer = Generator(parts.model, parts.text.tokenizer, stepper.control, mesh.device)
    mine = prompts[mesh.rank :: mesh.size]
    together = writer.extend(mine, max_tokens=5)
    apart = []
    for index in range(-(-len(prompts) // mesh.size)):
        apart += writer.extend(mine[index : index + 1], max_tokens=5)
    return together, apart


def halves(mesh: Any, values: dict[str, Any]) -> list[bool]:
    """bf16 and fp16 runs: every loss finite and falling."""
    found = []
    for dtype in ("bfloat16", "float16"):
        stepper = _stepper(mesh, config_of({**values, "model": {**values["model"], "dtype": dtype}}))
        results = [stepper.step(step) for step in range(12)]
        losses = [result.loss for result in results]
        found.append(all(map(math.isfinite, losses)) and losses[-1] < losses[0] and results[-1].finite)
    return found


def from_hugging_face(mesh: Any, values: dict[str, Any], folder: str) -> tuple[str, str, list[int]]:
    """Weights of a run that starts from what another run exported; and the shape it found."""
    from trivium.models import LLAMA

    stepper = _stepper(mesh, config_of(values))
    stepper.step(0)
    decoder = stepper.parts.decoder
    checkpoint.save_hugging_face(
        stepper.parts.model, folder, config=LLAMA.to_hugging_face(decoder), names=LLAMA.names(decoder), mesh=mesh
    )
    if mesh.rank == 0:
        stepper.parts.text.tokenizer.save(folder)
    mesh.comm("world").barrier()
    again = _stepper(mesh, config_of({**values, "model": {"from": folder}}))
    shape = [again.parts.decoder.dim, again.parts.decoder.layers, again.parts.decoder.vocabulary]
    return weights_sha256(stepper.parts.model), weights_sha256(again.parts.model), shape


def silent_step(mesh: Any, values: dict[str, Any]) -> tuple[bool, bool, int]:
    """A step without a token that carries loss: not counted, no weight changed."""
    config = config_of(values)
    stepper = _stepper(mesh, config)
    policy = Policy(config, stepper)
    before = weights_sha256(stepper.parts.model)
    loader = stepper.parts.loader
    original = loader.batch

    def batch(number: int) -> Any:
        from dataclasses import replace

        found = original(number)
        return replace(found, targets=torch.full_like(found.targets, -100), num_tokens=0)

    loader.batch = batch  # type: ignore[method-assign]
    result = stepper.step(0)
    counted = policy.see(result)
    same = weights_sha256(stepper.parts.model) == before
    loader.batch = original  # type: ignore[method-assign]
    assert policy.see(stepper.step(1))
    return counted, same, result.tokens


def memory_of(mesh: Any, values: dict[str, Any]) -> dict[str, int]:
    stepper = _stepper(mesh, config_of(values))
    stepper.step(0)
    return zero.meter_of(stepper.parts.model).by_label()


def interrupted(mesh: Any, values: dict[str, Any], number: int) -> tuple[int, int, str]:
    """A run in which the last rank is sent a signal by itself in step 2."""
    import os
    import signal

    from trivium.train import step as steps

    class Once:
        def write(self, row: Any) -> None:
            if row["kind"] == "step" and row["step"] == 2:
                os.kill(os.getpid(), signal.Signals(number))

        def close(self) -> None:
            pass

    assert steps is not None
    outcome = train(config_of(values), mesh, writers=(Once(),))
    return outcome.signal, outcome.steps, Path(str(outcome.checkpoint)).name


def saved_name(step: int) -> str:
    return saving.name_of(step)


def shape_changed(mesh: Any, values: dict[str, Any]) -> list[str]:
    """What a run whose model is another one at the gate or at its norms is told about the checkpoint it finds."""
    from dataclasses import replace

    from trivium.moe import GateConfig

    config = config_of(values)
    parts = assemble(config, mesh, read_text(config, mesh))
    decoder, told = parts.decoder, []
    assert decoder.moe is not None
    gates = replace(decoder, moe=replace(decoder.moe, gate=GateConfig(score="sigmoid")))
    roads = replace(decoder, moe=replace(decoder.moe, exchange=replace(decoder.moe.exchange, kind="flat")))
    for other in (gates, replace(decoder, norm_eps=1e-3), roads):
        try:
            saving.resume(config, replace(parts, decoder=other), mesh)
            told.append("")
        except TriviumError as error:
            told.append(str(error))
    return told


def foreign_tokenizer(mesh: Any, values: dict[str, Any], folder: str) -> tuple[list[bool], str]:
    """Whether a run from a Hugging Face folder takes its tokenizer, unless told another; and when it has none."""
    from trivium.base.errors import ConfigError
    from trivium.models import LLAMA
    from trivium.train.data import Tokenizer

    config = config_of(values)
    ours = read_text(config, mesh)
    parts = assemble(config, mesh, ours)
    names = LLAMA.names(parts.decoder)
    checkpoint.save_hugging_face(parts.model, folder, config=LLAMA.to_hugging_face(parts.decoder), names=names)
    theirs = Tokenizer.train(["zebra quux 42 " * 50, "lorem ipsum dolor"] * 5, vocabulary=280)
    table = {**values, "model": {"from": folder}}
    try:
        told = f"no error: {read_text(config_of(table), mesh).source}"
    except ConfigError as error:
        told = str(error)
    theirs.save(folder)
    ours.tokenizer.save(f"{folder}/ours")
    found = [read_text(config_of(table), mesh).tokenizer.to_json() == theirs.to_json()]
    table["data"] = {**values["data"], "tokenizer": f"{folder}/ours"}
    return [*found, read_text(config_of(table), mesh).tokenizer.to_json() == ours.tokenizer.to_json()], told


def ignored(mesh: Any, values: dict[str, Any]) -> str:
    """What the log says of a run's text."""
    import io
    import logging

    heard = logging.StreamHandler(said := io.StringIO())
    log = logging.getLogger("trivium")
    log.addHandler(heard)
    try:
        read_text(config_of(values), mesh)
    finally:
        log.removeHandler(heard)
    return said.getvalue()
