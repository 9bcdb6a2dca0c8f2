"""Which modules are gathered together, and which flat buffers their parameters form.

ZeRO section 7.2.2: parameters are gathered just before their layer runs. Works on meta modules as well: the planner
uses it.

[Note: experts are gathered whole]
Ranks hold and use different experts of one layer, and wait for each other inside of it, in the all-to-all. A gather
that only some of them come to there, or come to in another order, could never end. So a layer of experts (the module
around the one that declares a ``placement``) is gathered at once, with its router, by itself or with the unit around.

[Note: modules that read their children]
torch's attention reads the parameters of its ``out_proj`` and never calls it, its fused loss those of its ``linear``;
its encoder layer does so with all of its children on the fast path of evaluation. A gather that waits for such a
child's call would never come. So these are never cut, and a list without a ``forward``, which nobody can call, is never
a unit either: its elements are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from trivium.base.errors import ConfigError
from trivium.dist.shard import Placement
from trivium.zero.placement import Cut

Units = str | Iterable[nn.Module] | Callable[[str, nn.Module], bool]
_OWN_UNIT_NUMEL = 2**16
_READS_CHILDREN: tuple[type[nn.Module], ...] = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
if "LinearCrossEntropyLoss" in vars(nn):
    _READS_CHILDREN = (*_READS_CHILDREN, nn.LinearCrossEntropyLoss)  # torch 2.13 and later
_BY_SIZE: tuple[type[nn.Module], ...] = (nn.Embedding, nn.Linear, *_READS_CHILDREN)
_NO_OWNER: tuple[int | None, Cut] = (None, "element")


@dataclass(frozen=True)
class FlatKey:
    """Parameters with equal keys in one unit share a flat buffer."""

    dtype: torch.dtype
    device: torch.device
    trainable: bool
    optimizer: int | None
    cut: Cut
    axis: str


@dataclass(kw_only=True)
class UnitSpec:
    """A module whose own parameters (not those of units inside it) are gathered and reduced together."""

    name: str
    module: nn.Module
    flats: dict[FlatKey, list[str]] = field(default_factory=dict)


def assign(root: nn.Module, units: Units, owner: Mapping[int, tuple[int, Cut]]) -> list[UnitSpec]:
    """Cut ``root`` into units, the root's first, then in the order of ``named_modules``.

    ``owner`` maps ``id(parameter)`` to (optimizer index, cut). A parameter that several units use belongs to the
    innermost unit around all of them. Units without parameters are left out, except the root. A layer of
    experts that are reduced over another axis than ``"dp"`` is not cut (see [Note: experts are gathered whole]), nor
    are torch's attention and transformer layers (see [Note: modules that read their children]).
    """
    chosen = _surely_called(root, _outside_of_experts(root, _choose(root, units)))
    specs = {name: UnitSpec(name=name, module=module) for name, module in root.named_modules() if name in chosen}
    for names, parameter in _by_identity(root).values():
        home = _home(names, specs)
        number, cut = owner.get(id(parameter), _NO_OWNER)
        key = FlatKey(parameter.dtype, parameter.device, parameter.requires_grad, number, cut, axis_of(root, names[0]))
        specs[home].flats.setdefault(key, []).append(names[0])
    return [spec for name, spec in specs.items() if spec.flats or name == ""]


def shared_units(root: nn.Module, specs: Sequence[UnitSpec]) -> set[str]:
    """Names of the units that stay gathered from forward to backward: the root's, and the last one run before
    backward."""
    return {"", specs[-1].name}


def names_by_identity(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """Canonical name → all names of each parameter, in the order of ``named_parameters``."""
    return {names[0]: tuple(names) for names, _ in _by_identity(root).values()}


def _choose(root: nn.Module, units: Units) -> set[str]:
    named = dict(root.named_modules())
    if isinstance(units, str):
        if units != "auto":
            raise ConfigError(
                f"units={units!r}: expected 'auto', a list of modules, or a predicate (name, module) -> bool"
            )
        return {""} | _automatic(root)
    if callable(units):
        return {""} | {name for name, module in named.items() if units(name, module)}
    by_id = {id(module): name for name, module in named.items()}
    chosen = {""}
    for module in units:
        if id(module) not in by_id:
            raise ConfigError(f"units names a {type(module).__name__} that is not inside the model")
        chosen.add(by_id[id(module)])
    return chosen


def _automatic(root: nn.Module) -> set[str]:
    """Elements of the outermost lists of layers, and large embeddings, projections and attentions outside of them."""
    chosen: set[str] = set()
    within: set[str] = set()  # dictionaries that are elements of a list
    for name, module in root.named_modules():
        is_list = isinstance(module, nn.ModuleList | nn.Sequential) or name in within
        if (name == "" and not is_list) or any(name == unit or name.startswith(unit + ".") for unit in chosen):
            continue
        if is_list:
            for child, layer in module.named_children():
                inside = f"{name}.{child}" if name else child
                if isinstance(layer, nn.ModuleDict) and not _can_run(layer):
                    within.add(inside)
                elif _can_run(layer) and any(True for _ in layer.parameters()):
                    chosen.add(inside)
        elif isinstance(module, _BY_SIZE) and sum(p.numel() for p in module.parameters()) >= _OWN_UNIT_NUMEL:
            chosen.add(name)
    return chosen


def _can_run(module: nn.Module) -> bool:
    """Whether anyone can call it: lists and dictionaries of modules or parameters have no ``forward``."""
    return type(module).forward is not nn.Module.forward or "forward" in module.__dict__


def _surely_called(root: nn.Module, chosen: set[str]) -> set[str]:
    """``chosen`` without what nobody calls: see [Note: modules that read their children]."""
    named = dict(root.named_modules())
    readers = [f"{name}." if name else "" for name, module in named.items() if isinstance(module, _READS_CHILDREN)]
    return {name for name in chosen if name == "" or (_can_run(named[name]) and not any(map(name.startswith, readers)))}


def _outside_of_experts(root: nn.Module, chosen: set[str]) -> set[str]:
    """``chosen`` without what lies inside of a layer of experts: of the module around one that says ``placement``."""
    apart = [name for name, module in root.named_modules() if (_declared(module) or "dp") != "dp"]
    layers = {name.rpartition(".")[0] for name in apart}
    return {name for name in chosen if not any(layer == "" or name.startswith(f"{layer}.") for layer in layers if name)}


def _by_identity(root: nn.Module) -> dict[int, tuple[list[str], nn.Parameter]]:
    found: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), ([], parameter))[0].append(name)
    return found


def _home(names: Sequence[str], specs: Mapping[str, UnitSpec]) -> str:
    paths = [name.split(".")[:-1] for name in names]
    common = paths[0]
    for path in paths[1:]:
        length = next(
            (i for i, (a, b) in enumerate(zip(common, path, strict=False)) if a != b), min(len(common), len(path))
        )
        common = common[:length]
    while common and ".".join(common) not in specs:
        common = common[:-1]
    return ".".join(common)


def axis_of(root: nn.Module, name: str) -> str:
    """The axis over which the parameter ``name`` is reduced: that of the nearest module around it that declares one."""
    path = name.split(".")[:-1]
    axis, module = _declared(root) or "dp", root
    for part in path:
        module = module.get_submodule(part)
        axis = _declared(module) or axis
    return axis


def _declared(module: nn.Module) -> str | None:
    placement = module.__dict__.get("placement")
    return placement.axis if isinstance(placement, Placement) else None
