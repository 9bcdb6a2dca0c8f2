"""The experts that live on this rank, each a module of its own, named and seeded by its global number.

DeepSpeed-MoE section 5.1: experts are placed by expert parallelism and reduced over the ranks that hold the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from trivium.base.errors import ConfigError
from trivium.dist.shard import Placement
from trivium.moe.draw import key
from trivium.moe.fused import GELU, Form, Fused, SwiGLU
from trivium.nn import MLP, Linear

Kind = Literal["swiglu", "gelu"]
Factory = Callable[[int], nn.Module]


class GELUExpert(nn.Module):
    """``down(gelu(up(x)))`` with biases: the feed-forward of the paper's models, 8·dim² + 5·dim at ffn_dim 4·dim."""

    def __init__(self, dim: int, ffn_dim: int, *, init_std: float = 0.02, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up = Linear(dim, ffn_dim, bias=True, init_std=init_std, dtype=dtype)
        self.down = Linear(ffn_dim, dim, bias=True, init_std=init_std, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., dim] → [..., dim]."""
        out: torch.Tensor = self.down(F.gelu(self.up(x)))
        return out


class Experts(nn.Module):
    """Experts ``numbers`` of one layer. Children are called "0", "1", … by global number, at any placement.

    ``placement`` names the axis over whose ranks their gradients are reduced; None: dp. Each expert draws its weights,
    on the CPU, from a generator seeded by (``seed``, ``layer``, its number): equal values wherever it lives.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        make: Factory,
        *,
        seed: int,
        layer: int = 0,
        placement: Placement | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.placement = Placement() if placement is None else placement
        self.numbers = tuple(numbers)
        self.fused = Fused()
        device = torch.device(torch.get_default_device() if device is None else device)
        for number in self.numbers:
            self.add_module(str(number), build(make, number, key(seed, layer, number), device))

    def forward(self, rows_RC: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Rows sorted by expert, ``counts`` of them for each of ``numbers`` → their outputs, in the same order.

        An expert without a row is not run. Without any row the rows themselves come back, so that the graph holds.
        """
        if rows_RC.shape[0] == 0:
            return rows_RC
        outs = []
        for number, part_RC in zip(self.numbers, torch.split(rows_RC, list(counts)), strict=True):
            if part_RC.shape[0] == 0:
                continue
            out_RC: torch.Tensor = self.get_submodule(str(number))(part_RC)
            if out_RC.shape != part_RC.shape:
                raise ConfigError(
                    f"expert {number} made {list(out_RC.shape)} of {list(part_RC.shape)}: an expert keeps the shape"
                )
            outs.append(out_RC.to(rows_RC.dtype))
        return torch.cat(outs)

    def plain(self, x: torch.Tensor, counts: Sequence[int]) -> tuple[type[Form], list[torch.Tensor]] | None:
        """What `fused` runs in one pass: the form of the experts and the parameters of those that have a row.

        None where it cannot: no row; experts of a user's, of several widths, or with hooks, which must see each call;
        autocast; a type other than the input's, or a 16-bit one, whose sums want more precision.
        """
        if x.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(x.device.type):
            return None
        forms: set[type[Form]] = set()
        shapes: set[tuple[object, ...]] = set()
        params: list[torch.Tensor] = []
        for number, count in zip(self.numbers, counts, strict=True):
            if count:
                module = self._modules[str(number)]
                form = _form_of(module)
                if form is None or module is None:
                    return None
                mine = list(module.parameters())
                forms.add(form)
                shapes.add((len(mine), *((p.shape, p.dtype, p.device) for p in mine)))
                params += mine
        if len(forms) != 1 or len(shapes) != 1 or any(p.dtype != x.dtype for p in params):
            return None
        return forms.pop(), params


def _form_of(module: nn.Module | None) -> type[Form] | None:
    """The form of one of our own experts that nobody has hooked or altered; None of any other module."""
    form = {MLP: SwiGLU, GELUExpert: GELU}.get(type(module))
    if form is None or module is None:
        return None
    children = list(module._modules.values())
    if any(type(child) is not Linear for child in children):
        return None
    for each in (module, *children):
        if each is not None and (
            each._forward_hooks
            or each._forward_pre_hooks
            or each._backward_hooks
            or each._backward_pre_hooks
            or "forward" in each.__dict__
        ):
            return None
    return form


def build(make: Factory, number: int, seed: int, device: torch.device) -> nn.Module:
    """``make(number)``, drawn on the CPU under ``seed``, then moved; torch's default generator stays where it was."""
    if device.type == "meta":
        with device:
            return make(number)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        module = make(number)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"expert({number}) returned a {type(module).__name__}: expected an nn.Module")
    return module.to(device)


def maker(kind: Kind | Factory, dim: int, ffn_dim: int, init_std: float, dtype: torch.dtype | None) -> Factory:
    """The factory of one of our own experts; the user's own as it is."""
    if not isinstance(kind, str):
        return kind
    if kind == "swiglu":
        return lambda number: MLP(dim, ffn_dim, init_std=init_std, dtype=dtype)
    if kind == "gelu":
        return lambda number: GELUExpert(dim, ffn_dim, init_std=init_std, dtype=dtype)
    raise ConfigError(
        f"expert={kind!r}: expected 'swiglu', 'gelu' or a function that takes an expert's number and makes a module"
    )
