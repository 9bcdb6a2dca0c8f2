"""A model folder becomes a program: config read, tensors checked, each one streamed and packed once.

No paper. Memory on the way: the packed weights and one layer's largest projection. Nothing of the folder is ever run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.base import config as configs
from trivium.base.errors import CheckpointError, ConfigError
from trivium.base.units import format_bytes
from trivium.checkpoint import latest, strict_json
from trivium.checkpoint.folders import read_config
from trivium.checkpoint.reading import check_files, refuse_pickle
from trivium.inference.compile import compile_program
from trivium.inference.generation import GenerationDefaults, chat_template_of, generation_defaults, tokenizer_of
from trivium.inference.packing import Packer, Quantize
from trivium.inference.program_builder import Slot
from trivium.inference.resolve import resolve
from trivium.inference.source import Source, open_checkpoint, open_safetensors
from trivium.inference.storage import unquantised
from trivium.inference.stored_int4 import GptqSource
from trivium.inference.stored_packed import PackedSource
from trivium.kernels.matrix import Layout
from trivium.kernels.program import Program
from trivium.models import DecoderConfig
from trivium.models.architecture import Architecture
from trivium.models.families import Part, Settings, canonical_names, known_family
from trivium.models.families.trivium import TRIVIUM, decoder_architecture

DType = Literal["auto", "float32", "bfloat16", "float16"]
_MOST_TABLE_BYTES = 4 << 30
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model ready to run. ``parts`` says where each canonical tensor lies in the folder, ``slots`` what became of it.

    ``tokenizer`` is the path of a tokenizer.json, ``chat_template`` the template's text; None where there is none.
    ``max_positions``: tokens of the longest sequence that the program's tables hold. ``dtype``: of unquantised weights.
    """

    name: str
    path: Path
    architecture: Architecture
    program: Program
    max_positions: int
    dtype: torch.dtype
    quantize: Quantize
    weight_bytes: int
    tokenizer: Path | None
    chat_template: str | None
    generation: GenerationDefaults
    parts: dict[str, Part] = field(repr=False)
    slots: tuple[Slot, ...] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A folder whose config is understood and whose tensors fit it; nothing is read yet."""

    path: Path
    architecture: Architecture
    source: Source
    parts: dict[str, Part]
    config: dict[str, Any]

    def get(self, name: str) -> torch.Tensor:
        """A canonical tensor as floats."""
        part = self.parts[name]
        return part.take(self.source.read(part.name, part.expert))


def load(
    path: str | Path,
    *,
    dtype: DType = "auto",
    quantize: Quantize = None,
    layout: Layout = "plain",
    max_positions: int | None = None,
) -> LoadedModel:
    """Load a Hugging Face folder, a Trivium checkpoint, or a run's folder (its newest checkpoint).

    ``dtype`` "auto" keeps the stored one (and the int4 of GPTQ, AWQ and `write_quantized`); ``quantize`` packs the
    projections, exactly what is stored where MXFP4 becomes int8. ``layout`` is what `kernels.registry.layout` says.
    ``max_positions`` bounds sequences (and the tables made for them); a number above the default is for positions
    scaled by length ("longrope", "dynamic"): all positions are then scaled as for a sequence of that length.

    Raises:
        ConfigError: an unknown family, config key value or quantisation; the message says which are known.
        CheckpointError: files, tensors or shapes that are missing, altered or superfluous.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected auto, {', '.join(_DTYPES)}")
    with open_model(path) as opened:
        model = opened.architecture
        positions = sequence_limit(model, max_positions)
        stored = opened.source.dtype if dtype == "auto" else _DTYPES[dtype]
        keep = keeps_packed(opened, dtype)
        packer = Packer(opened, dtype=stored, quantize=quantize, keep_packed=keep, layout=layout)
        slots: list[Slot] = []
        program = compile_program(
            model, packer.get, pack=packer.pack, keep=packer.keep, max_positions=positions, slots=slots
        )
        folder = opened.path
        tokenizer = tokenizer_of(folder)
        beside = folder if tokenizer is None else tokenizer.parent
        return LoadedModel(
            name=Path(path).resolve().name,
            path=folder,
            architecture=model,
            program=program,
            max_positions=positions,
            dtype=stored,
            quantize=quantize,
            weight_bytes=packer.num_bytes,
            tokenizer=tokenizer,
            chat_template=chat_template_of(beside),
            generation=generation_defaults(beside, opened.config, tokenizer),
            parts=opened.parts,
            slots=tuple(slots),
        )


def keeps_packed(opened: Opened, dtype: DType) -> bool:
    """Whether weights that are stored as whole numbers stay so, where nothing else is asked for."""
    return dtype == "auto" and isinstance(opened.source, (GptqSource, PackedSource))


@contextlib.contextmanager
def open_model(path: str | Path) -> Iterator[Opened]:
    """Find out what a folder holds, and check that all of it is there. Errors as of `load`."""
    folder = Path(path)
    if folder.is_dir() and not (folder / "manifest.json").exists() and not (folder / "config.json").exists():
        folder = latest(folder) or folder
    if (folder / "manifest.json").exists():
        with open_checkpoint(folder) as own:
            model = _own_architecture(folder)
            yield Opened(
                path=folder,
                architecture=model,
                source=own,
                parts=resolve(folder, TRIVIUM, model, own.shapes),
                config={},
            )
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: expected one with config.json and safetensors")
    config = read_config(folder)
    family = known_family(config)
    settings = Settings(config, f"{folder} ({family.name})")
    model = family.read(settings)
    spare = settings.further_layers("num_nextn_predict_layers")
    with open_safetensors(folder) as plain:
        source = unquantised(folder, plain, config, model)
        if isinstance(source, PackedSource):
            family = replace(family, names=canonical_names, base="", head="head.weight", dropped=())
        parts = resolve(folder, family, model, source.shapes, spare)
        yield Opened(path=folder, architecture=model, source=source, parts=parts, config=config)


def _own_architecture(folder: Path) -> Architecture:
    refuse_pickle(folder)
    extra = strict_json.decode(check_files(folder).extra, f"{folder}: extra")
    told = extra.get("model") if isinstance(extra, dict) else None
    if not isinstance(told, dict):
        raise CheckpointError(
            f"{folder} does not say what model it holds (extra['model'] is missing): checkpoints of trivium train "
            "have it, and those of checkpoint.save with extra={'model': …}"
        )
    return decoder_architecture(configs.build(DecoderConfig, told, f"{folder}: extra.model"))


def sequence_limit(model: Architecture, asked: int | None) -> int:
    """How long sequences may be: what was asked for, as far as the positions and the memory for their tables reach."""
    limit, trained = model.max_positions, model.max_positions
    ropes = {layer.attention.rope for layer in model.layers if layer.attention.rope is not None}
    for rope in ropes:
        if rope.kind == "longrope":
            trained = min(trained, rope.original_positions)
    unbounded = any(rope.kind == "dynamic" for rope in ropes) or all(layer.attention.alibi for layer in model.layers)
    if asked is not None and (asked < 1 or (asked > limit and not unbounded)):
        raise ConfigError(
            f"max_positions={asked}: expected 1 to {limit}, which is as far as the model's positions reach"
        )
    positions = trained if asked is None else asked
    rounded = {
        layer.attention.alibi for layer in model.layers if layer.attention.alibi and layer.attention.alibi.rounded
    }
    columns = sum(rope.dim for rope in ropes) + sum(len(alibi.slopes) for alibi in rounded)
    if 4 * columns * positions > _MOST_TABLE_BYTES:
        raise ConfigError(
            f"tables of {positions} positions would take {format_bytes(4 * columns * positions)}: pass max_positions, "
            f"at most {_MOST_TABLE_BYTES // (4 * columns)}"
        )
    return positions
