"""When a run saves, what it keeps beside the weights, and what it goes on from.

Communication: `save` and `resume` are collectives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium import checkpoint
from trivium.base import config as configs
from trivium.base import log
from trivium.base.errors import CapacityError, CheckpointError, ConfigError
from trivium.checkpoint.convert import describe
from trivium.dist.mesh import Mesh
from trivium.models import DecoderConfig
from trivium.train.build import Parts, lead
from trivium.train.config import TrainConfig
from trivium.zero.api import engine_of

# What another value of would make the saved states meaningless or the data another; the rest may change, and is told.
# Whether paths lead to the same text is for the loader to say, which knows the text's hash.
_FIXED = ("model.", "tasks.", "data.", "train.micro_batch", "train.seed", "optimizer.betas")
_FREE = (
    *("model.from", "model.preset", "data.cache", "data.paths", "data.format", "data.limit_bytes"),
    *("model.moe.exchange.kind", "model.moe.exchange.node", "model.moe.exchange.crossover_bytes"),
)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands: steps done, steps skipped, tokens read; the objective's own state, None in a new run."""

    step: int = 0
    skipped: int = 0
    tokens: int = 0
    objective: dict[str, Any] | None = None


def name_of(step: int) -> str:
    """The checkpoint after ``step`` steps."""
    return f"step-{step:08d}"


def save(config: TrainConfig, parts: Parts, mesh: Mesh, progress: Progress) -> Path | None:
    """Save the run; None when it failed and ``on_save_error`` is ``warn``."""
    extra = {
        "step": progress.step,
        "skipped": progress.skipped,
        "tokens": progress.tokens,
        "objective": progress.objective,
        "loader": parts.loader.state_dict(),
        "loss_scale": engine_of(parts.model).scale.state_dict(),
        "model": configs.to_dict(parts.decoder),
        "config": configs.to_dict(config),
    }
    try:
        return checkpoint.save(
            config.folder / name_of(progress.step),
            model=parts.model,
            optimizer=parts.optimizer,
            extra=extra,
            mesh=mesh,
            keep_last=config.checkpoint.keep_last,
            overwrite=True,
        )
    except (CheckpointError, CapacityError, ConfigError) as error:
        if config.checkpoint.on_save_error == "stop":
            raise
        log.get().warning("step %d was not saved, training goes on: %s", progress.step, error)
        return None


def resume(config: TrainConfig, parts: Parts, mesh: Mesh) -> Progress:
    """Load what ``checkpoint.resume`` says into ``parts``; Progress() to start anew.

    Raises:
        CheckpointError: nothing to go on from though there must be, or it was made from another model or other data.
        ConfigError: ``never``, but the folder holds a run.
    """
    policy = config.checkpoint.resume
    lead(mesh, "looking for a checkpoint", lambda: _check(config, parts.decoder))
    ours = [{key: value for key, value in group.items() if key != "params"} for group in parts.optimizer.param_groups]
    loaded = checkpoint.load_resumable(config.folder, policy, model=parts.model, optimizer=parts.optimizer, mesh=mesh)
    if loaded is None:
        return Progress()
    for group, settings in zip(parts.optimizer.param_groups, ours, strict=True):
        group.update(settings)
    extra = loaded.extra
    try:
        loader, scale = extra["loader"], extra["loss_scale"]
        progress = Progress(
            step=int(extra["step"]),
            skipped=int(extra["skipped"]),
            tokens=int(extra["tokens"]),
            objective=extra.get("objective") or {},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{loaded.folder} holds no state of a training run ({error!r}): only checkpoints that trivium train wrote "
            "can be resumed; to start from its weights, convert it and use model.from"
        ) from error
    parts.loader.load_state_dict(loader)
    engine_of(parts.model).scale.load_state_dict(scale)
    if mesh.rank == 0:
        log.get().info("going on from %s: step %d", loaded.folder, progress.step)
    return progress


def _check(config: TrainConfig, decoder: DecoderConfig) -> None:
    """Tell what changed since the checkpoint was saved; refuse what would make its states meaningless."""
    policy = config.checkpoint.resume
    if policy == "never":
        found = checkpoint.latest(config.folder)
        if found is not None:
            raise ConfigError(
                f"checkpoint.resume=never, but {config.folder} holds a run ({found.name}): use --resume auto to go on, "
                "or another --run folder"
            )
        return
    folder = checkpoint.resume(config.folder, policy)
    if folder is None:
        return
    told, shape = _saved(folder, "config"), _saved(folder, "model")
    changed = {} if told is None else changes(completed(TrainConfig, told), configs.to_dict(config))
    if shape is not None:  # what a preset stands for, too
        differ = configs.diff(completed(DecoderConfig, shape), configs.to_dict(decoder))
        changed |= {f"model.{key}": pair for key, pair in differ.items()}
    lines = "\n  ".join(f"{key}: {was!r} → {now!r}" for key, (was, now) in changed.items())
    fixed = [key for key in changed if key.startswith(_FIXED) and key not in _FREE]
    if fixed:
        raise CheckpointError(
            f"{folder} was saved by a run with other settings, and {', '.join(fixed)} cannot change on resume:\n  "
            f"{lines}\nput the old values back, or start in another --run folder"
        )
    if lines:
        log.get().warning("settings changed since %s:\n  %s", folder, lines)


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What differs in a way that is worth a word: not where the run lies or how it is resumed."""
    quiet = ("run", "checkpoint.resume")
    return {key: pair for key, pair in configs.diff(old, new).items() if key not in quiet}


def completed(kind: type[Any], saved: dict[str, Any]) -> dict[str, Any]:
    """``saved``, with the defaults of settings that are younger than it; as it is where some are not known any more."""
    try:
        return configs.to_dict(configs.build(kind, saved))
    except ConfigError:
        return saved


def _saved(folder: Path, what: str) -> dict[str, Any] | None:
    extra = describe(folder).extra
    found = extra.get(what) if isinstance(extra, dict) else None
    return found if isinstance(found, dict) else None
