"""What the ranks run for tests/train/test_distill.py."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F

from tests.train.cases import config_of
from trivium import zero
from trivium.base import log
from trivium.models import Decoder, DecoderConfig, MoEConfig, build
from trivium.moe import GateConfig
from trivium.train import saving
from trivium.train.build import assemble, read_text
from trivium.train.data import validation_batches
from trivium.train.distill import Distillation, copy_layers, objective
from trivium.train.loop import train


def teach(mesh: Any, values: dict[str, Any]) -> float:
    outcome = train(config_of(values), mesh)
    assert outcome.validation is not None
    return outcome.validation


def study(mesh: Any, values: dict[str, Any]) -> dict[str, Any]:
    """A distilling run: what it ended with."""
    outcome = train(config_of(values), mesh, objective=objective)
    return {"digest": outcome.digest, "validation": outcome.validation, "rows": list(outcome.rows)}


def interrupted(mesh: Any, values: dict[str, Any], after: int) -> int:
    """A distilling run in which the last rank is asked to stop in step ``after``."""
    import os
    import signal

    class Once:
        def write(self, row: Any) -> None:
            if row["kind"] == "step" and row["step"] == after - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self) -> None:
            pass

    return train(config_of(values), mesh, writers=(Once(),), objective=objective).steps


def begun(mesh: Any, values: dict[str, Any]) -> Distillation:
    config = config_of(values)
    parts = assemble(config, mesh, read_text(config, mesh))
    return objective(config, parts, mesh, None)


def agreement(mesh: Any, values: dict[str, Any]) -> tuple[float, float, bool]:
    """The cosine as measured, as plain autograd has it from whole models, and whether anything was left behind."""
    distillation = begun(mesh, values)
    teacher, config = distillation.teacher, distillation.config
    assert teacher is not None
    measured = distillation.agreement()
    clean = all(
        segment.grad is None or not segment.grad.any()
        for group in distillation.parts.optimizer.param_groups
        for segment in group["params"]
    )
    whole = [whole_model(model) for model in (distillation.parts.model, teacher)]
    if mesh.rank:
        return measured, measured, clean
    student, wise = (model.double().eval() for model in whole)
    limit = distillation.stage.config.check_batches * mesh.size
    hard = soft = torch.zeros(())
    text = distillation.parts.text.validation
    micro = config.train.micro_batch
    for batch in validation_batches(text, sequence=config.data.sequence, batch_size=micro, limit=limit):
        places = {"positions_BT": batch.positions, "documents_BT": batch.documents}
        logits, wanted = student(batch.tokens, **places), wise(batch.tokens, **places).detach()
        counted = batch.targets != -100
        hard = hard + F.cross_entropy(logits[counted], batch.targets[counted], reduction="sum")
        heat = distillation.stage.config.temperature
        own, theirs = (x[counted].div(heat).log_softmax(-1) for x in (logits, wanted))
        soft = soft + (theirs.exp() * (theirs - own)).sum()
    ours = list(student.parameters())
    first, second = (torch.autograd.grad(loss, ours, retain_graph=True, allow_unused=True) for loss in (hard, soft))
    flat = [
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(ours, each, strict=True)])
        for each in (first, second)
    ]
    return measured, float(F.cosine_similarity(*flat, dim=0)), clean


def whole_model(model: Decoder) -> Decoder:
    state = zero.full_state_dict(model)
    plain = Decoder(model.config)
    if state:
        plain.load_state_dict(state)
    return plain


def same_as_teacher(mesh: Any, values: dict[str, Any]) -> bool:
    """Whether a student as deep as its teacher begins as its equal."""
    distillation = begun(mesh, values)
    assert distillation.teacher is not None
    ours, theirs = (zero.full_state_dict(model) for model in (distillation.parts.model, distillation.teacher))
    return all(torch.equal(value, theirs[name]) for name, value in ours.items())


def biases(mesh: Any, rates: tuple[float, float]) -> tuple[bool, list[float]]:
    """A student begins as its teacher's layers, their gates with these ``rates`` of their biases (0: no bias): whether
    the routers are equal, and the student's bias."""
    models = []
    for rate in rates:
        moe = MoEConfig(experts=4, top_k=2, gate=GateConfig(bias_rate=rate))
        shape = DecoderConfig(vocabulary=50, dim=8, layers=2, heads=2, ffn_dim=12, moe=moe)
        model = build(shape, seed=len(models))
        if rate:
            model.blocks[1].moe.update_bias(torch.arange(4))  # type: ignore[union-attr, operator]
        models.append(zero.shard(model, None, mesh, stage=3)[0])
    teacher, pupil = models
    copy_layers(teacher, pupil, None, lead=False)
    told = [zero.full_state_dict(model) for model in models]
    name = "blocks.1.moe.gate"
    return torch.equal(told[0][f"{name}.weight"], told[1][f"{name}.weight"]), told[1][f"{name}.bias"].tolist()


def refusal(mesh: Any, values: dict[str, Any]) -> str:
    from trivium.base.errors import TriviumError

    try:
        begun(mesh, values)
    except TriviumError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def warned(mesh: Any, values: dict[str, Any]) -> tuple[str, list[str]]:
    """`refusal`, and the warnings logged meanwhile."""
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Keep(logging.WARNING)
    log.get().addHandler(handler)
    try:
        return refusal(mesh, values), seen
    finally:
        log.get().removeHandler(handler)


def resumed_agreement(mesh: Any, values: dict[str, Any]) -> float:
    """The cosine for a student with the weights that its run has saved."""
    config = config_of({key: value for key, value in values.items() if key != "distill"})
    parts = assemble(config, mesh, read_text(config, mesh))
    saving.resume(config, parts, mesh)
    return objective(config_of(values), parts, mesh, None).agreement()


def let_go(mesh: Any, values: dict[str, Any]) -> tuple[list[Any], bool, bool]:
    """What the stage told after two steps, and whether the teacher's weights were there before and are after."""
    import weakref

    distillation = begun(mesh, values)
    assert distillation.teacher is not None
    weight = weakref.ref(distillation.teacher.blocks[0].attention.q.weight)
    before = weight() is not None
    told = [distillation.after_step(done) for done in (1, 2, 3)]
    return told, before, weight() is not None


def decoders_left(mesh: Any, values: dict[str, Any]) -> tuple[int, int | None]:
    """How many models a distilling run has at its beginning, found without collecting; and where its stage stopped."""
    import gc

    gc.collect()
    known = {id(one) for one in gc.get_objects() if type(one) is Decoder}
    gc.disable()
    try:
        distillation = begun(mesh, values)
        left = sum(type(one) is Decoder and id(one) not in known for one in gc.get_objects())
    finally:
        gc.enable()
    return left, distillation.stage.stopped
