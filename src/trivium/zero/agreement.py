"""What all ranks must have alike before a model is cut: its shape, its values, its units, the optimizers over it.

ZeRO section 5 takes data parallelism's identical replicas for granted; here that is checked, before any payload.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from trivium.base.errors import ConfigError, MismatchError
from trivium.dist.mesh import Mesh
from trivium.zero.placement import ZeroConfig
from trivium.zero.units import UnitSpec


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Raise ConfigError when an optimizer holds a parameter of another model, or one that another optimizer holds."""
    names = {id(param): name for name, param in model.named_parameters()}
    seen: set[int] = set()
    for one in optimizers:
        for group in one.param_groups:
            for param in group["params"]:
                if id(param) not in names:
                    raise ConfigError(
                        f"{type(one).__name__} holds a parameter of shape {tuple(param.shape)} that is not in the model"
                    )
                if id(param) in seen:
                    raise ConfigError(f"{names[id(param)]} is in two optimizers or groups: give each parameter to one")
                seen.add(id(param))


def agree_on_model(model: nn.Module, optimizers: Sequence[Optimizer], mesh: Mesh, config: ZeroConfig) -> None:
    """The same names, shapes and dtypes everywhere, the same configuration and kinds of optimizers."""
    described = [
        [name, str(param.dtype), list(param.shape), param.requires_grad] for name, param in model.named_parameters()
    ]
    everyone = mesh.comm("dp").all_gather_json(described)
    for rank, other in enumerate(everyone):
        for mine, theirs in zip(everyone[0], other, strict=False):
            if mine != theirs:
                mesh.comm("dp").require_equal(theirs if mesh.data_rank == rank else mine, "the model's parameter")
        if len(other) != len(everyone[0]):
            mesh.comm("dp").require_equal(len(described), "the model's number of parameters")
    mesh.comm("dp").require_equal(repr(config), "the [zero] configuration")
    mesh.comm("dp").require_equal([type(one).__name__ for one in optimizers], "the list of optimizers")


def agree_on_units(specs: Sequence[UnitSpec], mesh: Mesh) -> None:
    """The same modules gathered together everywhere, and the same parameters under each optimizer."""
    described = [
        [spec.name, sorted([key.axis, key.cut, str(key.optimizer), *names] for key, names in spec.flats.items())]
        for spec in specs
    ]
    comm = mesh.comm("dp")
    comm.require_equal(len(described), "the number of units")
    everyone = comm.all_gather_json([zlib.crc32(repr(one).encode()) for one in described])
    for place, one in enumerate(described):
        if len({numbers[place] for numbers in everyone}) > 1:
            comm.require_equal(one, "the unit (module, its parameters and their optimizers)")


def agree_on_values(model: nn.Module, specs: Sequence[UnitSpec], mesh: Mesh) -> None:
    """The same bits in every parameter that all data-parallel ranks hold; meta parameters get theirs later."""
    parameters = dict(model.named_parameters())
    names = [
        name
        for spec in specs
        for key, inside in spec.flats.items()
        if key.axis == "dp" and key.device.type != "meta"
        for name in inside
    ]
    comm = mesh.comm("dp")
    if comm.size == 1 or not names:
        return
    everyone = comm.all_gather_json([_fingerprint(parameters[name]) for name in names])
    for place, name in enumerate(names):
        for rank, fingerprints in enumerate(everyone):
            if fingerprints[place] != everyone[0][place]:
                raise MismatchError(
                    f"{name} has other values on rank {comm.ranks[rank]} than on rank {comm.ranks[0]}: build the model "
                    "from the same seed or checkpoint on every rank, or on the meta device"
                )


def _fingerprint(parameter: torch.Tensor) -> int:
    data = parameter.detach().to("cpu", copy=True).contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_64_intdigest(data.numpy().data)
