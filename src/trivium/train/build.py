"""From a config to what a run works with: data, a sharded model, its optimizer and its loader.

ZeRO section 5.3: the model is built on the meta device and materialised shard by shard.
Communication: every function with a mesh is a collective.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from trivium import zero
from trivium.base import log
from trivium.base.errors import ConfigError, RankError, TriviumError
from trivium.checkpoint.folders import read_config
from trivium.checkpoint.hugging_face import load_hugging_face
from trivium.dist.mesh import Mesh
from trivium.models import Decoder, DecoderConfig, FamilyMap, build, family_of
from trivium.train import tasks
from trivium.train.config import OptimizerConfig, TrainConfig, check_fit
from trivium.train.data import Corpus, DataConfig, Loader, Tokenizer, prepare
from trivium.train.evaluate import encoded

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is learned from: two corpora, their tokenizer, and in words where they come from."""

    tokenizer: Tokenizer
    train: Corpus
    validation: Corpus
    source: str


@dataclass(frozen=True, kw_only=True)
class Parts:
    """A model of this run, sharded, with its optimizer and loader."""

    model: Decoder
    optimizer: zero.ZeroOptimizer
    decoder: DecoderConfig
    loader: Loader
    text: Text


def lead(mesh: Mesh, doing: str, work: Callable[[], T]) -> T | None:
    """Run ``work`` on rank 0 alone; its result there, None elsewhere. All ranks fail when it does. Collective."""
    result: T | None = None
    failure: TriviumError | OSError | None = None
    if mesh.rank == 0:
        try:
            result = work()
        except (TriviumError, OSError) as error:
            failure = error
    told = mesh.comm("world").broadcast_json(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if told is not None:
        raise RankError(f"a consequence: rank 0 failed while {doing}: {told}")
    return result


def first(mesh: Mesh, doing: str, work: Callable[[], T]) -> T:
    """Run ``work`` on rank 0, then on the others, who find what it left on disk. All fail when rank 0 does."""
    result = lead(mesh, doing, work)
    return work() if result is None else result


def read_text(config: TrainConfig, mesh: Mesh) -> Text:
    """Find, tokenise and split the run's text, or draw its tasks."""
    if config.tasks is not None:
        if mesh.rank == 0 and config.unused:
            log.get().warning("%s: without effect, since [tasks] makes the text", ", ".join(config.unused))
        return _task_text(config.tasks)
    found = first(mesh, "preparing the text", lambda: prepare(data_of(config), config.folder / "data"))
    source = f"{len(found.sources.files)} files, {found.sources.num_bytes:,} bytes"
    return Text(tokenizer=found.tokenizer, train=found.train, validation=found.validation, source=source)


def data_of(config: TrainConfig) -> DataConfig:
    """The ``[data]`` table; where it names no tokenizer, ``model.from``'s weights are read with their own.

    Raises ConfigError when that folder has none.
    """
    source = config.model.from_
    if source is None or config.data.tokenizer is not None:
        return config.data
    if not (Path(source).expanduser() / "tokenizer.json").is_file():
        raise ConfigError(
            f"model.from={source!r} holds no tokenizer.json, and its weights mean nothing to a tokenizer trained anew: "
            "set data.tokenizer to the one they were trained with"
        )
    return replace(config.data, tokenizer=source)


def _task_text(config: tasks.TaskConfig) -> Text:
    using = tasks.tokenizer()
    held = tasks.held_out_examples(config, 64)
    examples = tasks.train_examples(config)
    return Text(
        tokenizer=using,
        train=tasks.corpus(examples, using),
        validation=tasks.corpus(held, using),
        source=f"{len(examples):,} generated examples of {', '.join(config.names)}",
    )


def decoder_of(config: TrainConfig, vocabulary: int) -> DecoderConfig:
    """The model's shape for a tokenizer of ``vocabulary`` entries; reads config.json for ``model.from``."""
    source = config.model.from_
    decoder = config.model.decoder(vocabulary) if source is None else _family(source)[1]
    check_fit(decoder, vocabulary, config.data.sequence)
    return decoder


def _family(folder: str) -> tuple[FamilyMap, DecoderConfig]:
    found = read_config(Path(folder).expanduser())
    family = family_of(found)
    return family, family.from_hugging_face(found)


def assemble(config: TrainConfig, mesh: Mesh, text: Text) -> Parts:
    """Shard a fresh model (or ``model.from``'s) over the ranks, with optimizer and loader."""
    decoder = decoder_of(config, text.tokenizer.vocabulary)
    model = build(
        decoder,
        device="meta",
        dtype=getattr(torch, config.model.dtype),
        seed=config.train.seed,
        mesh=mesh,
        ep=config.mesh.ep if decoder.moe is not None else None,
    )
    optimizer = adamw(model, config.optimizer)
    _, sharded = zero.shard(model, optimizer, mesh, seed=config.train.seed, config=config.zero)
    if config.model.from_ is not None:
        family = _family(config.model.from_)[0]
        source = Path(config.model.from_).expanduser()
        load_hugging_face(model, source, family.names(decoder), ignore=family.dropped, mesh=mesh)
    loader = Loader(
        text.train,
        sequence=config.data.sequence,
        batch_size=config.train.micro_batch,
        seed=config.train.seed,
        rank=mesh.data_rank,
        size=mesh.data_size,
        vocabulary=decoder.vocabulary,
    )
    return Parts(model=model, optimizer=sharded, decoder=decoder, loader=loader, text=text)


def adamw(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """torch's AdamW in two groups: matrices, which are decayed, and vectors, which are not."""
    groups = groups_of(list(model.parameters()))
    return torch.optim.AdamW(
        [
            {"params": params, "weight_decay": decay}
            for params, decay in zip(groups, (config.weight_decay, 0.0), strict=True)
            if params
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=config.fused,
    )


def groups_of(params: Sequence[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices and vectors."""
    return [p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]


def check_corpus(text: Text, config: TrainConfig) -> None:
    """Raise ConfigError when validation is asked for and there is nothing to validate on."""
    if config.train.validate_every and len(text.validation.documents) == 0:
        raise ConfigError(
            "train.validate_every is set but data.validation = 0 keeps no text apart: raise data.validation or set "
            "train.validate_every = 0"
        )


def check_prompts(text: Text, config: TrainConfig) -> None:
    """Raise ConfigError for a prompt of the report that the model could not be asked, before it is trained."""
    limit = decoder_of(config, text.tokenizer.vocabulary).max_positions
    for index, prompt in enumerate(config.report.prompts):
        try:
            count = len(encoded(text.tokenizer, prompt))
        except TriviumError as error:
            raise ConfigError(f"report.prompts[{index}]: {error}") from error
        if not 1 <= count <= limit:
            raise ConfigError(
                f"report.prompts[{index}] = {prompt[:40]!r} has {count} tokens: expected 1 to max_positions={limit}"
            )
