"""One training run as data: the tables of CONFIG.toml, and the contradictions between them, told with their arithmetic.

ZeRO's stage and buckets are the ``[zero]`` table, `trivium.zero.ZeroConfig` but for ``average``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from trivium.base.errors import ConfigError
from trivium.models.config import DecoderConfig
from trivium.models.moe_config import MoEConfig
from trivium.models.presets import preset
from trivium.train.data.config import DataConfig
from trivium.train.schedule import ScheduleConfig
from trivium.train.tasks import TaskConfig
from trivium.zero.placement import ZeroConfig

_SHAPE = tuple(entry.name for entry in fields(DecoderConfig))
_REQUIRED = ("dim", "layers", "heads", "ffn_dim")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The ``[model]`` table: a preset, a Hugging Face folder (``from``), or a shape written out.

    With ``preset`` the other keys replace single values of it (``[model.moe]`` its whole table). Without it,
    ``vocabulary`` unset means the tokenizer's.
    ``dtype`` is what parameters and gradients are computed in; optimizer states stay in fp32.
    """

    preset: str | None = None
    from_: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    vocabulary: int | None = None
    dim: int | None = None
    layers: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int | None = None
    max_positions: int | None = None
    rope_theta: float | None = None
    norm_eps: float | None = None
    tied: bool | None = None
    init_std: float | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        given = sorted(self._shape())
        if self.from_ is not None and (self.preset is not None or given):
            other = "preset" if self.preset is not None else given[0]
            raise ConfigError(
                f"model.from={self.from_!r} and model.{other} are both given: the folder's config.json says the whole "
                "shape; leave one out"
            )
        if self.preset is not None:
            preset(self.preset)
        if self.preset is None and self.from_ is None:
            missing = [name for name in _REQUIRED if getattr(self, name) is None]
            if missing:
                raise ConfigError(
                    f"no model is described: {', '.join(missing)} missing; give model.preset, model.from or "
                    f"{', '.join(_REQUIRED)}"
                )

    def decoder(self, vocabulary: int) -> DecoderConfig:
        """The shape for a tokenizer of ``vocabulary`` entries. For ``from`` see `trivium.train.build`."""
        if self.preset is not None:
            return replace(preset(self.preset), **self._shape())
        return DecoderConfig(**{"vocabulary": vocabulary, **self._shape()})

    def _shape(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SHAPE if getattr(self, name) is not None}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The ``[mesh]`` table. ``ep``: over how many neighbouring data-parallel ranks experts are spread; one number, or
    one for each layer that has experts. It may change from run to run of one model."""

    ep: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if not self.degrees or min(self.degrees) < 1:
            raise ConfigError(f"mesh.ep={self.ep}: expected 1 or more, or a list of such")

    @property
    def degrees(self) -> tuple[int, ...]:
        """The one number, or the list."""
        return (self.ep,) if isinstance(self.ep, int) else self.ep

    @property
    def largest(self) -> int:
        """The degree of the mesh's own ``ep`` axis."""
        return max(self.degrees)

    def check(self, decoder: DecoderConfig, ranks: int) -> None:
        """Raise ConfigError for degrees that do not fit the model or the ranks."""
        counts = [count for count in decoder.num_experts if count]
        if not counts and self.largest > 1:
            raise ConfigError(f"mesh.ep={self.largest}, but the model has no experts: add [model.moe] or leave it out")
        if not isinstance(self.ep, int) and len(self.ep) != len(counts):
            raise ConfigError(f"mesh.ep lists {len(self.ep)} degrees: expected one for each of {len(counts)} layers")
        for degree in self.degrees:
            if ranks % degree:
                raise ConfigError(f"mesh.ep={degree} does not divide {ranks} ranks")
        for degree, count in zip(self.degrees * (len(counts) if isinstance(self.ep, int) else 1), counts, strict=True):
            if count < degree:
                raise ConfigError(f"mesh.ep={degree} ranks for {count} experts: some would hold none; lower mesh.ep")
            if decoder.moe is not None:
                decoder.moe.node_of(degree)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The ``[optimizer]`` table: torch's AdamW. Vectors (norms) are not decayed."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    fused: bool = True

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optimizer.lr={self.lr}: expected a positive number")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(
                f"optimizer.betas={list(self.betas)}: expected two numbers from 0 up to, not including, 1"
            )
        if not self.eps > 0:
            raise ConfigError(f"optimizer.eps={self.eps}: expected a positive number")
        if not self.weight_decay >= 0:
            raise ConfigError(f"optimizer.weight_decay={self.weight_decay}: expected 0 or more")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The ``[train]`` table.

    ``micro_batch``: sequences per rank and backward pass. ``batch``: sequences per step over all ranks, from which
    ``accumulation`` (backward passes per step) follows; give either. Runs of equal ``batch`` and ``micro_batch``
    compute the same bits on any number of ranks. ``clip`` 0: no clipping. ``validate_every``, ``log_every`` in steps;
    ``validation_batches``: at most so many micro-batches of validation text, 0 for all of it. ``recompute``: keep only
    each block's input and recompute it in backward. ``on_nonfinite``: ``skip`` goes on with the next step (up to
    ``max_nonfinite`` in a row), ``stop`` stops, ``dump`` writes the batch and a report of every parameter first.
    ``threads`` 0: what the environment says. ``nearby``: see `dist.launch.init`.
    """

    steps: int = 1000
    micro_batch: int = 8
    batch: int | None = None
    accumulation: int | None = None
    clip: float = 1.0
    seed: int = 0
    validate_every: int = 100
    validation_batches: int = 16
    log_every: int = 10
    recompute: bool = False
    on_nonfinite: Literal["skip", "stop", "dump"] = "skip"
    max_nonfinite: int = 10
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    timeout_s: float = 300.0
    nearby: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch", "log_every", "max_nonfinite"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)}: expected 1 or more")
        for name in ("clip", "seed", "validate_every", "validation_batches", "threads"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)}: expected 0 or more")
        for name in ("batch", "accumulation"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"train.{name}={value}: expected 1 or more")
        if self.seed >= 2**31:
            raise ConfigError(f"train.seed={self.seed}: expected below 2^31")
        if not self.timeout_s > 0:
            raise ConfigError(f"train.timeout_s={self.timeout_s}: expected a positive number of seconds")

    def accumulation_for(self, ranks: int) -> int:
        """Backward passes per step on ``ranks`` ranks. Raises ConfigError when ``batch`` cannot be dealt out."""
        if self.batch is None:
            return self.accumulation or 1
        once = self.micro_batch * ranks
        if self.batch % once:
            lower = self.batch // once * once
            near = [str(number) for number in (lower, lower + once) if number]
            raise ConfigError(
                f"train.batch={self.batch} cannot be dealt out: micro_batch={self.micro_batch} × {ranks} ranks = "
                f"{once} sequences at once, and {self.batch} / {once} = {self.batch / once:.3g}; "
                f"nearest: {' or '.join(near)}"
            )
        passes = self.batch // once
        if self.accumulation not in (None, passes):
            raise ConfigError(
                f"train.batch={self.batch} / (micro_batch={self.micro_batch} × {ranks} ranks) = {passes} passes per "
                f"step, but train.accumulation={self.accumulation}: leave one of the two out"
            )
        return passes


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The ``[distill]`` table of `trivium distill`.

    ``teacher``: a run's folder or one of its checkpoints. ``alpha``, ``temperature``: of the divergence.
    ``stop``: when distillation ends and the run goes on without: after a step (a whole number), a fraction of the steps
    (below 1), ``never``, or ``auto``: when it holds the student back, which is looked for every ``check_every`` steps
    on ``check_batches`` micro-batches per rank of held-out text: the cosine of the two losses' gradients is at most
    ``conflict``, ``patience`` times in succession. ``init``: the student begins as ``layers`` of the teacher (None:
    spread evenly), or ``fresh``.
    """

    teacher: str
    alpha: float = 1.0
    temperature: float = 1.0
    stop: Literal["auto", "never"] | int | float = "auto"
    check_every: int = 50
    check_batches: int = 4
    conflict: float = 0.0
    patience: int = 2
    init: Literal["layers", "fresh"] = "layers"
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ConfigError("distill.teacher is empty: expected a run's folder or one of its checkpoints")
        if not self.alpha >= 0 or not self.temperature > 0:
            raise ConfigError(
                f"distill.alpha={self.alpha}, distill.temperature={self.temperature}: expected 0 or more, and above 0"
            )
        if isinstance(self.stop, str):
            if self.stop not in ("auto", "never"):
                raise ConfigError(f"distill.stop={self.stop!r}: expected auto, never, a step or a fraction below 1")
        elif self.stop < 0 or (isinstance(self.stop, float) and self.stop >= 1):
            raise ConfigError(f"distill.stop={self.stop}: expected a whole number of steps, or a fraction from 0 to 1")
        for name in ("check_every", "check_batches", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distill.{name}={getattr(self, name)}: expected 1 or more")
        if not -1 < self.conflict < 1:
            raise ConfigError(f"distill.conflict={self.conflict}: expected a cosine between -1 and 1")
        if self.layers is not None and self.init == "fresh":
            raise ConfigError("distill.layers is given, but distill.init='fresh' uses no layer: leave one out")


@dataclass(frozen=True, kw_only=True)
class SaveConfig:
    """The ``[checkpoint]`` table. Checkpoints lie in the run's folder as ``step-00000100``.

    ``every`` 0: only at the end. ``resume``: ``auto`` goes on from the newest complete one if there is one, ``must``
    fails when there is none, ``never`` starts anew and refuses a folder that has one; else a checkpoint's path.
    """

    every: int = 200
    keep_last: int = 2
    resume: str = "auto"
    on_save_error: Literal["stop", "warn"] = "stop"

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every={self.every}: expected 0 (only at the end) or a number of steps")
        if self.keep_last < 2:
            raise ConfigError(
                f"checkpoint.keep_last={self.keep_last}: expected 2 or more, so that one good checkpoint is always left"
            )
        if not self.resume:
            raise ConfigError("checkpoint.resume is empty: expected auto, must, never or a checkpoint's folder")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """The ``[report]`` table: what is told besides metrics.jsonl, which is always written.

    ``prompts`` are completed greedily by up to ``sample_tokens`` tokens at the end. ``task_prompts``: held-out inputs
    per task, for runs with ``[tasks]``; every ``score_every`` steps ``score_prompts`` of them are asked on the way (0:
    only at the end). ``digest``: end with a SHA-256 of all weights.
    """

    html: bool = True
    tensorboard: bool = False
    wandb: bool = False
    project: str = "trivium"
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 48
    task_prompts: int = 100
    score_every: int = 0
    score_prompts: int = 25
    digest: bool = True

    def __post_init__(self) -> None:
        if self.score_every < 0 or self.score_prompts < 1:
            raise ConfigError(
                f"report.score_every={self.score_every}, report.score_prompts={self.score_prompts}: expected 0 or "
                "more, and 1 or more"
            )
        if self.sample_tokens < 1 or self.task_prompts < 1:
            raise ConfigError(
                f"report.sample_tokens={self.sample_tokens}, report.task_prompts={self.task_prompts}: "
                "expected 1 or more"
            )


@dataclass(frozen=True, kw_only=True)
class SummedZeroConfig(ZeroConfig):
    """The ``[zero]`` table. ``average`` is none of its keys: the trainer sums, and divides by the step's tokens."""

    average: bool = field(default=False, init=False)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A whole run. ``run`` is its folder; ``tasks`` present: train on generated tasks in place of ``[data]``'s text;
    ``distill`` present: learn from a teacher as well (`trivium distill`)."""

    run: str = "runs/train"
    model: ModelConfig = field(default_factory=lambda: ModelConfig(preset="34m"))
    mesh: MeshConfig = field(default_factory=MeshConfig)
    data: DataConfig = field(default_factory=DataConfig)
    tasks: TaskConfig | None = None
    distill: DistillConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    zero: SummedZeroConfig = field(default_factory=SummedZeroConfig)
    train: LoopConfig = field(default_factory=LoopConfig)
    checkpoint: SaveConfig = field(default_factory=SaveConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

    def __post_init__(self) -> None:
        if self.zero.average:
            raise ConfigError(
                "zero.average: the trainer sums gradients and divides by its tokens: give SummedZeroConfig"
            )
        if not self.run or "\0" in self.run:
            raise ConfigError("run is empty: expected the folder that the run writes to")
        if self.schedule.warmup_steps > self.train.steps:
            raise ConfigError(
                f"schedule.warmup_steps={self.schedule.warmup_steps} is more than train.steps={self.train.steps}: the "
                f"rate would never reach optimizer.lr; at most {self.train.steps}"
            )
        if self.train.batch is not None and self.train.batch % self.train.micro_batch:
            self.train.accumulation_for(1)
        if self.model.from_ is None and self.tasks is None and self.data.tokenizer is None:
            check_fit(self.model.decoder(self.data.vocabulary), self.data.vocabulary, self.data.sequence)

    @property
    def unused(self) -> list[str]:
        """Keys of ``[data]`` that say something and change nothing: with ``[tasks]``, all but the sequence length."""
        if self.tasks is None:
            return []
        usual = DataConfig(sequence=self.data.sequence)
        names = [entry.name for entry in fields(DataConfig)]
        return [f"data.{name}" for name in names if getattr(self.data, name) != getattr(usual, name)]

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run).expanduser()

    def check_ranks(self, ranks: int) -> None:
        """Raise ConfigError for what cannot be done on ``ranks`` ranks."""
        self.train.accumulation_for(ranks)
        if self.model.from_ is None:
            self.mesh.check(self.model.decoder(self.data.vocabulary), ranks)
        elif self.mesh.largest > 1:
            raise ConfigError(
                f"mesh.ep={self.mesh.largest} with model.from: a Hugging Face model is read whole; leave it out"
            )
        self._check_shards(ranks)

    def _check_shards(self, ranks: int) -> None:
        """Of each axis that parameters are sharded over: all ranks, and those that hold the same experts."""
        size = self.zero.shard_size
        for degree in (1, *self.mesh.degrees):
            alike = ranks // degree
            if size is None or size >= alike or alike % size == 0:
                continue
            which = "ranks" if degree == 1 else f"ranks that hold the same experts ({ranks} ranks, mesh.ep={degree})"
            raise ConfigError(
                f"zero.shard_size={size} does not divide {alike} {which} ({alike} / {size} = {alike / size:.3g}): "
                f"expected one of {', '.join(str(n) for n in range(1, alike + 1) if alike % n == 0)}"
            )


def check_fit(decoder: DecoderConfig, vocabulary: int, sequence: int) -> None:
    """Raise ConfigError when the tokenizer or the sequences are larger than the model allows."""
    if vocabulary > decoder.vocabulary:
        raise ConfigError(
            f"the tokenizer has {vocabulary} entries (data.vocabulary), the model only {decoder.vocabulary}: set "
            f"data.vocabulary={decoder.vocabulary} or model.vocabulary={vocabulary}"
        )
    if sequence > decoder.max_positions:
        raise ConfigError(
            f"data.sequence={sequence} is longer than the model's max_positions={decoder.max_positions}: set "
            f"data.sequence={decoder.max_positions} or model.max_positions={sequence}"
        )
