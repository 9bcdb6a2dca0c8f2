"""Give meta parameters their values, a module at a time, and cut them at once: the model never exists whole on one
rank.

ZeRO section 5.3 (a model larger than one device). Values depend on (seed, name) only, never on the number of ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
from torch import nn

from trivium.base.errors import ConfigError
from trivium.zero.flat import Flat, nothing

Init = Callable[[str, torch.Tensor], None]


def seed_of(seed: int, name: str) -> int:
    """The generator seed for the parameters of the module (or the parameter) called ``name``."""
    return (zlib.crc32(name.encode()) << 31) ^ seed


def replace_meta(model: nn.Module, device: torch.device) -> dict[int, nn.Parameter]:
    """Put parameters without memory on ``device`` in place of meta ones, under every name; ``id`` of the new → the
    old one."""
    new: dict[int, nn.Parameter] = {}
    replaced: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None or not param.is_meta:
                continue
            if id(param) not in new:
                empty = nothing(param.dtype, device).expand(param.shape)
                new[id(param)] = nn.Parameter(empty, requires_grad=param.requires_grad)
                replaced[id(new[id(param)])] = param
            module._parameters[name] = new[id(param)]
    return replaced


def fill_flat(model: nn.Module, flat: Flat, init: Init | None, seed: int, replaced: dict[int, nn.Parameter]) -> None:
    """Give ``flat`` its values: those the parameters have, or for replaced meta parameters fresh ones, cut at once."""
    if not flat.params or id(flat.params[0]) not in replaced:
        flat.adopt()
        return
    shard = torch.zeros(flat.layout.shard_numel, dtype=flat.dtype, device=flat.device)
    values: dict[str, torch.Tensor] = {}
    for index, name in enumerate(flat.names):
        owner = name.rpartition(".")[0]
        if init is not None:
            value = torch.empty(flat.shapes[index], dtype=flat.dtype, device=flat.device)
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed_of(seed, name))
                init(name, value)
        else:
            if name not in values:
                values = _reset(model.get_submodule(owner), owner, flat.device, seed)
            value = values.pop(name)
        overlap = flat.layout.overlap(index, flat.comm.rank)
        if overlap is not None:
            shard[overlap.at : overlap.at + overlap.length].copy_(
                value.reshape(-1)[overlap.start : overlap.start + overlap.length]
            )
    flat.adopt_shard(shard)


def fill_buffers(model: nn.Module, device: torch.device, init: Init | None, seed: int) -> None:
    """Give buffers on the meta device their values, whole on every rank."""
    for owner, module in model.named_modules():
        names = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not names:
            continue
        for name in names:
            buffer = module._buffers[name]
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        if init is None:
            _reset(module, owner, device, seed)
            continue
        for name in names:
            fresh = module._buffers[name]
            full_name = f"{owner}.{name}" if owner else name
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(seed_of(seed, full_name))
                if fresh is not None:
                    init(full_name, fresh)


def _reset(module: nn.Module, owner: str, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Fresh values of a module's own parameters from its ``reset_parameters``; the module keeps the parameters it
    has."""
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise ConfigError(
            f"{owner or 'the model'} ({type(module).__name__}) is on the meta device and has no reset_parameters: "
            "pass init=(name, tensor) -> None to shard"
        )
    kept = dict(module._parameters)
    try:
        for name, param in kept.items():
            if param is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(param.shape, dtype=param.dtype, device=device), requires_grad=param.requires_grad
                )
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, owner))
            reset()
        prefix = f"{owner}." if owner else ""
        return {prefix + name: param.detach() for name, param in module._parameters.items() if param is not None}
    finally:
        module._parameters.update(kept)
