"""The chunked loss equals the plain one, in value and gradient, and never holds all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.allocated import allocated
from trivium.base.errors import ConfigError
from trivium.nn import Head

DIM, VOCABULARY, TOKENS = 13, 37, 29


class Largest(TorchDispatchMode):
    """Records the most elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def heads_and_batch(chunk: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    head = Head(DIM, VOCABULARY, chunk_tokens=chunk, init_std=0.5, dtype=dtype)
    weight = torch.randn(VOCABULARY, DIM, generator=generator).to(dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
    x = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    targets[[0, 7, 8]] = -100
    return head, x, targets


def run(chunk: int, reduction: str, dtype: torch.dtype = torch.float32):
    head, x, targets = heads_and_batch(chunk, dtype)
    loss = head(x, targets, reduction)
    scale = torch.linspace(0.5, 2.0, TOKENS, dtype=loss.dtype) if reduction == "none" else torch.tensor(1.5)
    (loss * scale).sum().backward()
    return loss.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 8, 28, 29, 1024])
def test_any_chunk_equals_torch(chunk, reduction):
    head, x, targets = heads_and_batch(chunk, torch.float64)
    expected = F.cross_entropy(F.linear(x, head.weight), targets, ignore_index=-100, reduction=reduction)
    scale = torch.linspace(0.5, 2.0, TOKENS, dtype=torch.float64) if reduction == "none" else torch.tensor(1.5)
    grads = torch.autograd.grad((expected * scale).sum(), (x, head.weight))
    loss, grad_x, grad_weight = run(chunk, reduction, torch.float64)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_x, grads[0], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(grad_weight, grads[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_gradcheck(chunk):
    head, x, targets = heads_and_batch(chunk, torch.float64)
    small = x.detach()[:6].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: head(x, targets[:6], "none"), (small,))


@pytest.mark.parametrize("chunk", [8, 1024])
def test_a_second_backward_gives_the_same_bits(chunk):
    head, x, targets = heads_and_batch(chunk)
    loss = head(x, targets)
    first = torch.autograd.grad(loss, (x, head.weight), retain_graph=True)
    second = torch.autograd.grad(loss, (x, head.weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_large_logits_do_not_overflow():
    head, x, targets = heads_and_batch(8)
    loss = head(x * 1e4, targets)
    expected = F.cross_entropy(F.linear(x * 1e4, head.weight), targets, ignore_index=-100)
    torch.testing.assert_close(loss, expected)


def test_the_same_bits_every_time():
    first, second = run(8, "mean"), run(8, "mean")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_bf16_loss_is_fp32_and_its_weight_gradient_is_summed_in_fp32():
    loss, grad_x, grad_weight = run(4, "sum", torch.bfloat16)
    whole = run(1024, "sum", torch.bfloat16)
    assert loss.dtype == torch.float32
    assert grad_x.dtype == grad_weight.dtype == torch.bfloat16
    torch.testing.assert_close(loss, whole[0], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_weight, whole[2], rtol=2e-2, atol=2e-2)


def test_all_logits_never_exist_at_once():
    head = Head(4, 512, chunk_tokens=16)
    x, targets = torch.randn(160, 4, requires_grad=True), torch.randint(0, 512, (160,))
    with Largest() as largest:
        head(x, targets).backward()
    assert largest.numel == 16 * 512
    assert x.grad is not None and head.weight.grad is not None


def test_autocast_chunked_equals_autocast_whole():
    results = []
    for chunk in (8, 1024):
        head, x, targets = heads_and_batch(chunk)
        with torch.autocast("cpu", torch.bfloat16):
            loss = head(x, targets)
        loss.backward()
        assert loss.dtype == torch.float32 and head.weight.grad.dtype == torch.float32
        results.append((loss.detach(), head.weight.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_frozen_sides_get_no_gradient(frozen):
    head, x, targets = heads_and_batch(8)
    (x if frozen == "x" else head.weight).requires_grad_(False)
    head(x, targets).backward()
    assert (x.grad is None) == (frozen == "x")
    assert (head.weight.grad is None) == (frozen == "weight")


def test_no_counting_token_is_nan_in_the_mean_and_zero_in_the_sum():
    for chunk in (8, 1024):
        head, x, targets = heads_and_batch(chunk)
        targets.fill_(-100)
        assert head(x, targets).isnan()
        assert head(x, targets, "sum") == 0


def test_bad_input():
    head, x, targets = heads_and_batch(8)
    with pytest.raises(ConfigError, match="reduction='avg'"):
        head(x, targets, "avg")
    with pytest.raises(ConfigError, match=r"targets have shape \(28,\), the tokens \(29,\)"):
        head(x, targets[1:])
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        Head(4, 4, chunk_tokens=0)


@pytest.mark.parametrize("backward", [False, True])
def test_one_chunk_of_logits_lives_at_a_time(backward):
    head = Head(8, 4096, chunk_tokens=64)
    x, targets = torch.randn(512, 8).requires_grad_(), torch.zeros(512, dtype=torch.int64)
    loss = head(x, targets) if backward else None
    with allocated() as seen:
        if loss is None:
            loss = head(x, targets)
        else:
            loss.backward()
    assert 64 * 4096 * 4 <= seen.peak_bytes < 1.5 * 64 * 4096 * 4
