"""Each building block initialises its own parameters and computes its formula."""

from __future__ import annotations

import pytest
import torch

from trivium.nn import MLP, Embedding, Head, Linear, RMSNorm


@pytest.mark.parametrize(
    "make",
    [
        lambda device: Linear(300, 200, bias=True, init_std=0.03, device=device),
        lambda device: Head(300, 200, init_std=0.03, device=device),
        lambda device: Embedding(300, 200, init_std=0.03, device=device),
    ],
)
def test_meta_then_reset_draws_what_a_direct_build_draws(make):
    torch.manual_seed(1)
    direct = make("cpu")
    meta = make("meta")
    assert all(parameter.is_meta for parameter in meta.parameters())
    filled = meta.to_empty(device="cpu")
    torch.manual_seed(1)
    filled.reset_parameters()
    assert torch.equal(direct.weight, filled.weight)
    assert abs(float(direct.weight.detach().std()) - 0.03) < 0.001
    if getattr(direct, "bias", None) is not None:
        assert not filled.bias.detach().any()


def test_linear_has_no_bias_unless_asked():
    assert Linear(3, 4).bias is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rms_norm_is_its_formula(dtype):
    norm = RMSNorm(17, eps=1e-3, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 17))
    x = torch.randn(4, 5, 17).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight.double()
    out = norm(x)
    assert out.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=tolerance, atol=tolerance)


def test_rms_norm_gradients():
    norm = RMSNorm(6, eps=1e-3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, norm.weight)
    )


def test_mlp_is_swiglu():
    mlp = MLP(5, 9, init_std=0.5, out_init_std=0.1)
    x = torch.randn(2, 5)
    gate = x @ mlp.gate.weight.T
    expected = (gate * gate.sigmoid() * (x @ mlp.up.weight.T)) @ mlp.down.weight.T
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp.gate.init_std, mlp.up.init_std, mlp.down.init_std) == (0.5, 0.5, 0.1)
