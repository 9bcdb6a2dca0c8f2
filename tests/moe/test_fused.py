"""The pass over all experts against the experts' own modules: values, gradients, what it keeps, when it stands by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.moe import cases
from trivium.dist.shard import Placement
from trivium.moe import MoE, fused
from trivium.moe.experts import Experts, maker

COUNTS = [3, 0, 5, 1]


def setting(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Experts, torch.Tensor, torch.Tensor, torch.Tensor]:
    experts = Experts(range(4), maker(kind, 6, 10, 0.5, dtype), seed=1)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(0)
    for p in experts.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=draw, dtype=dtype)  # biases too
    x_NC = torch.randn(7, 6, generator=draw, dtype=dtype)
    rows_R = torch.tensor([0, 3, 6, 1, 2, 3, 4, 0, 6])
    return experts, x_NC, torch.rand(9, generator=draw, dtype=dtype), rows_R


def by_modules(
    experts: Experts, x_NC: torch.Tensor, weights_R: torch.Tensor | None, rows_R: torch.Tensor
) -> torch.Tensor:
    out_RC = experts(x_NC[rows_R], COUNTS)
    return torch.zeros_like(x_NC).index_add(0, rows_R, out_RC if weights_R is None else out_RC * weights_R[:, None])


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("weighed", [True, False])
def test_values_and_gradients_are_the_modules(kind: str, weighed: bool) -> None:
    experts, x, w, rows = setting(kind)
    leaves = [x.requires_grad_(), *([w.requires_grad_()] if weighed else []), *experts.parameters()]
    form, params = experts.plain(x, COUNTS)  # type: ignore[misc]
    y = fused.Fused()(x, w if weighed else None, rows, [n for n in COUNTS if n], form, params)
    expected = by_modules(experts, x, w if weighed else None, rows)
    assert torch.allclose(y, expected, rtol=0, atol=1e-13)
    up = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(each, leaves, up, allow_unused=True) for each in (y, expected))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None and b is None) or cases.far(a, b) < 1e-13
    assert len(params) == 3 * form.num_params


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    experts, x, w, rows = setting(kind)
    form, params = experts.plain(x, COUNTS)  # type: ignore[misc]
    values = [p.detach().requires_grad_() for p in params]
    inputs = (x.requires_grad_(), w.requires_grad_(), *values)
    assert torch.autograd.gradcheck(
        lambda x, w, *values: fused.Fused()(x, w, rows, [3, 5, 1], form, list(values)), inputs
    )


@pytest.mark.parametrize("frozen", ["up", "down", "gate"])
def test_frozen_weights_get_no_gradient_and_the_others_the_same(frozen: str) -> None:
    grads = []
    for off in (False, True):
        experts, x, w, rows = setting("swiglu")
        for name, p in experts.named_parameters():
            p.requires_grad_(not (off and f".{frozen}." in name))
        form, params = experts.plain(x, COUNTS)  # type: ignore[misc]
        fused.Fused()(x.requires_grad_(), w, rows, [3, 5, 1], form, params).sum().backward()
        grads.append({name: p.grad for name, p in experts.named_parameters()} | {"x": x.grad})
    for name, grad in grads[1].items():
        assert (grad is None) == (f".{frozen}." in name or name.startswith("1.")), name
        assert grad is None or torch.equal(grad, grads[0][name])  # type: ignore[arg-type]


def test_two_runs_give_the_same_bits() -> None:
    found = []
    for _ in range(2):
        layer, x = MoE(32, 48, 8, seed=1), torch.randn(100, 32, generator=torch.Generator().manual_seed(0))
        torch.nn.init.normal_(layer.get_parameter("gate.weight"), generator=torch.Generator().manual_seed(2))
        y, aux = layer(x.requires_grad_())
        (y.square().sum() + aux.loss).backward()
        found.append([y, x.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Wider(torch.nn.Linear):
    """What an adapter puts in the place of a projection."""


@pytest.mark.parametrize("how", ["hook", "subclass", "autocast", "16 bit", "widths", "user", "no row"])
def test_it_stands_by_where_modules_must_be_called(how: str) -> None:
    experts, x, _, _ = setting("swiglu", torch.float32)
    assert experts.plain(x, COUNTS) is not None and isinstance(experts.placement, Placement)
    seen: list[Any] = []
    if how == "hook":
        experts.get_submodule("2.up").register_forward_hook(lambda *a: seen.append(a))
    elif how == "subclass":
        experts.get_submodule("2").up = Wider(6, 10)  # type: ignore[assignment]
    elif how == "widths":
        experts.add_module("2", maker("swiglu", 6, 12, 0.5, torch.float32)(2))
    elif how == "user":
        experts.add_module("2", torch.nn.Linear(6, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        given = x.bfloat16() if how == "16 bit" else x
        assert experts.plain(given, [0] * 4 if how == "no row" else COUNTS) is None
        if how == "hook":
            experts(x[:9].expand(7, 6).repeat(2, 1)[:9], COUNTS)
            assert len(seen) == 1


def test_it_keeps_rows_of_the_inner_width_alone() -> None:
    kept: list[int] = []
    layer = MoE(64, 16, 4, 2)
    own = {p.data_ptr() for p in layer.parameters()}
    x = torch.randn(256, 64).requires_grad_()

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.data_ptr() not in own and t.data_ptr() != x.data_ptr() and t.is_floating_point():
            kept.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    rows_bytes = 2 * 256 * 16 * 4
    assert sum(kept) < 2 * rows_bytes + 256 * 4 * 4 * 12, "two pre-activations, and a few numbers per token and expert"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, while tracing
def test_a_compiled_layer_gives_the_same_bits() -> None:
    torch.compiler.reset()
    found = []
    for way in (lambda layer: torch.compile(layer, backend="aot_eager"), lambda layer: layer):
        torch.manual_seed(2)
        layer = MoE(16, 24, 4, 2, seed=1)
        x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out, _ = way(layer)(x)
        out.square().sum().backward()
        found.append([out.detach(), x.grad, *(p.grad for p in layer.parameters())])
    for compiled, eager in zip(*found, strict=True):
        assert (compiled is None) == (eager is None)
        assert compiled is None or torch.equal(compiled, eager)
