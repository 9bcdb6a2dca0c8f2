"""Make an MoE of a dense model: every expert begins as a copy of the dense MLP, the router afresh.

DeepSpeed-MoE sections 3.1 and 4.1 name the layers; at step 0 the result computes what the dense model does.

[Note: equal at step 0]
Copies of one MLP give one output, so their weighted sum is that output times the sum of a token's weights, which is
the gate's ``scale`` if it renormalises: the last projection of each copy is divided by the scale. A gate that does not
(top-1, say) cannot be equal this way. Beside a residual MLP it can, whatever the gate: that MLP is the copy, and each
expert's last projection begins at zero (its other weights are the copy's), so that experts learn a correction. Where a
softmax mixes the two, it begins at one half for all tokens, and the residual copy's last projection is doubled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from trivium.base.errors import CheckpointError, ConfigError
from trivium.checkpoint.manifest_reading import read_manifest
from trivium.checkpoint.reading import load
from trivium.moe.gate import Gate
from trivium.moe.layer import MoE

Dense = Mapping[str, torch.Tensor] | nn.Module | str | Path


@torch.no_grad()
def upcycle(model: nn.Module, dense: Dense, *, mlp: str = "mlp", last: str = "down") -> tuple[str, ...]:
    """Fill ``model``, which has `MoE` layers, from a ``dense`` model of else the same names. Returns those layers.

    ``dense``: a state dict, a module, or the folder of a Trivium checkpoint, which is then held whole in host memory.
    Every MoE layer ``….x`` is made from the MLP ``….{mlp}`` beside it, whose parameters must be named and shaped as one
    expert's; ``last`` is the name of its last projection. Routers keep the weights they were built with. Equal to the
    dense model at step 0, in eval or training, as long as no token is dropped: see [Note: equal at step 0].

    Call it before `tv.zero.shard`, or inside `tv.zero.gathered(model)`; every rank fills the experts it holds, with
    the same ``dense``. Sends nothing, except to open a checkpoint.

    Raises:
        ConfigError: the model has no MoE layer, or one whose gate neither renormalises nor has a residual beside it.
        CheckpointError: names or shapes do not fit; names the first that do not.
    """
    state = _state_of(dense)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoE)}
    if not layers:
        raise ConfigError(f"upcycle: the {type(model).__name__} has no MoE layer to fill")
    for name, layer in layers.items():
        _check_gate(name, layer)
    targets = model.state_dict(keep_vars=True)
    sources: dict[str, tuple[str, float]] = {}
    fresh: set[str] = set()
    for name, layer in layers.items():
        inside = {key for key in targets if key.startswith(f"{name}." if name else "")}
        found = _sources(name, layer, inside, mlp, last)
        sources |= found
        fresh |= inside - found.keys()
    sources |= {name: (name, 1.0) for name in targets if name not in sources and name not in fresh}
    _check(targets, state, sources)
    for name, (source, factor) in sources.items():
        targets[name].copy_(state[source] * factor if factor not in (0.0, 1.0) else state[source])
        if factor == 0.0:
            targets[name].zero_()
    for layer in layers.values():
        if layer.mix is not None:
            layer.mix.weight.zero_()
            layer.mix.bias.zero_()
    return tuple(layers)


def _sources(name: str, layer: MoE, inside: set[str], mlp: str, last: str) -> dict[str, tuple[str, float]]:
    """Parameter of the layer → (the dense one it begins from, times what)."""
    dot = f"{name}." if name else ""
    parent = name.rpartition(".")[0]
    beside = f"{parent}.{mlp}" if parent else mlp
    scale = layer.gate.config.scale if isinstance(layer.gate, Gate) else 1.0
    found: dict[str, tuple[str, float]] = {}
    for key in inside:
        path = key[len(dot) :].split(".")
        if path[0] == "experts":
            rest, factor = path[2:], 1.0 / scale if layer.dense is None else 0.0
        elif path[0] == "dense":
            rest, factor = path[1:], 1.0 if layer.mix is None else 2.0
        else:
            continue
        found[key] = (".".join([beside, *rest]), factor if rest[0] == last else 1.0)
    return found


def _check_gate(name: str, layer: MoE) -> None:
    if layer.dense is not None:
        return
    if isinstance(layer.gate, Gate) and layer.gate.renormalize:
        return
    what = "top_k=1" if layer.top_k == 1 else "a gate that does not renormalise"
    raise ConfigError(
        f"upcycle: layer {name or 'MoE'} has {what} and no residual MLP, so its weights do not add up to 1 and it "
        "cannot begin equal to the dense model: use residual='add', or top_k above 1 with GateConfig(renormalize=True)"
    )


def _check(
    targets: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], sources: Mapping[str, tuple[str, float]]
) -> None:
    for name, (source, _) in sources.items():
        if source not in state:
            raise CheckpointError(f"upcycle: {name} begins as {source}, which the dense model does not have")
        if state[source].shape != targets[name].shape:
            raise CheckpointError(
                f"upcycle: {name} is {list(targets[name].shape)} and {source} of the dense model "
                f"{list(state[source].shape)}: an expert must be as wide as the dense MLP"
            )
    unused = sorted(state.keys() - {source for source, _ in sources.values()})
    if unused:
        raise CheckpointError(
            f"upcycle: {len(unused)} of the dense model's parameters have no place in the MoE, the first {unused[0]}"
        )


def _state_of(dense: Dense) -> Mapping[str, torch.Tensor]:
    if isinstance(dense, nn.Module):
        return dense.state_dict()
    if not isinstance(dense, str | Path):
        return dense
    holder = nn.Module()
    manifest = read_manifest(Path(dense))
    for parameter in manifest.parameters.values():
        held = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
        for name in parameter.names:
            _home(holder, name).register_parameter(name.rpartition(".")[2], held)
    for name, buffer in manifest.buffers.items():
        _home(holder, name).register_buffer(name.rpartition(".")[2], torch.empty(buffer.shape, dtype=buffer.dtype))
    load(dense, model=holder)
    return holder.state_dict()


def _home(root: nn.Module, name: str) -> nn.Module:
    """The module inside ``root`` that owns ``name``, made where it is not there."""
    module = root
    for part in name.split(".")[:-1]:
        children = dict(module.named_children())
        if part not in children:
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    return module
