"""A module in memory as a model to run: our own decoder, or one of transformers' of a family that is known.

No paper. The weights are packed from the module's own tensors; the module is not changed and not kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import ConfigError
from trivium.inference.compile import compile_program
from trivium.inference.generation import GenerationDefaults
from trivium.inference.packing import Packer, Quantize
from trivium.inference.program_builder import Slot
from trivium.inference.resolve import resolve
from trivium.inference.source import common_dtype
from trivium.inference.weights import DType, LoadedModel, Opened, sequence_limit
from trivium.kernels.matrix import Layout, Matrix
from trivium.models import Decoder
from trivium.models.families import Family, Settings, known_family
from trivium.models.families.trivium import TRIVIUM, decoder_architecture

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModuleSource:
    """A module's parameters and buffers by name: a `trivium.inference.source.Source`."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """What most elements are."""
        return common_dtype([(tensor.dtype, tensor.numel()) for tensor in self._tensors.values()])

    def read(self, name: str, expert: int | None = None) -> torch.Tensor:
        """A copy on the CPU."""
        tensor = self._tensors[name].detach()
        return (tensor if expert is None else tensor[expert]).to("cpu", copy=True)

    def packed(self, name: str, expert: int | None = None, *, outline: bool = False) -> Matrix | None:
        """Nothing is quantised here."""
        return None


def load_module(
    module: torch.nn.Module, *, dtype: DType, quantize: Quantize, layout: Layout, max_positions: int | None = None
) -> LoadedModel:
    """``module`` as `weights.load` would have loaded it from a folder, without tokenizer.

    Raises:
        ConfigError: neither a `trivium.models.Decoder` nor a transformers model of a known family; or not all there.
    """
    family, model = _described(module)
    tensors = module.state_dict()
    absent = sorted(name for name, tensor in tensors.items() if tensor.device.type == "meta")
    if absent:
        raise ConfigError(f"{absent[0]} and {len(absent) - 1} more weights are on the meta device: load them first")
    where = Path(type(module).__name__)
    source = ModuleSource(tensors)
    if model.tied:
        tensors.pop(family.head, None)
    parts = resolve(where, family, model, source.shapes)
    opened = Opened(path=where, architecture=model, source=source, parts=parts, config={})
    stored = source.dtype if dtype == "auto" else _DTYPES[dtype]
    packer = Packer(opened, dtype=stored, quantize=quantize, keep_packed=False, layout=layout)
    slots: list[Slot] = []
    positions = sequence_limit(model, max_positions)
    program = compile_program(model, packer.get, pack=packer.pack, max_positions=positions, slots=slots)
    return LoadedModel(
        name=where.name,
        path=where,
        architecture=model,
        program=program,
        max_positions=positions,
        dtype=stored,
        quantize=quantize,
        weight_bytes=packer.num_bytes,
        tokenizer=None,
        chat_template=None,
        generation=_generation(module),
        parts=parts,
        slots=tuple(slots),
    )


def _described(module: torch.nn.Module) -> tuple[Family, Any]:
    if isinstance(module, Decoder):
        return TRIVIUM, decoder_architecture(module.config)
    config = getattr(module, "config", None)
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        raise ConfigError(
            f"{type(module).__name__}: expected a folder, a trivium.models.Decoder, or a "
            "transformers model of a known family"
        )
    told = to_dict()
    family = known_family(told)
    return family, family.read(Settings(told, f"{type(module).__name__} ({family.name})"))


def _generation(module: torch.nn.Module) -> GenerationDefaults:
    ends = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    ids = ends if isinstance(ends, list) else [ends]
    return GenerationDefaults(eos_token_ids=tuple(token for token in ids if type(token) is int and token >= 0))
