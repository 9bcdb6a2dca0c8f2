"""Distillation's loss equals the plain formulas, in value and gradient, at any chunk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trivium.base.errors import ConfigError
from trivium.nn import Head, SoftTargets

DIM, VOCABULARY, TOKENS = 7, 23, 19


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(shape[0]))


def case(chunk: int = 1024) -> tuple[Head, torch.Tensor, torch.Tensor, torch.Tensor]:
    head = Head(DIM, VOCABULARY, chunk_tokens=chunk, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(drawn(VOCABULARY, DIM))
    targets = torch.arange(TOKENS) % VOCABULARY
    targets[[0, 5, 6]] = -100
    return head, drawn(TOKENS, DIM).requires_grad_(), targets, 2 * drawn(TOKENS, VOCABULARY).flip(0)


@pytest.mark.parametrize("chunk", [1, 20, 40, 1024])
@pytest.mark.parametrize(("hard", "soft", "heat"), [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0), (0.0, 1.0, 0.7), (1.0, 0.0, 1.0)])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_equals_the_formula(chunk: int, hard: float, soft: float, heat: float, reduction: str) -> None:
    head, x, targets, teacher = case(chunk)
    counted = targets != -100
    logits = F.linear(x, head.weight)
    entropy = F.cross_entropy(logits, targets, reduction=reduction)
    each = F.kl_div((logits / heat).log_softmax(-1), (teacher / heat).softmax(-1), reduction="none").sum(-1)
    divergence = heat**2 * (each[counted].sum() if reduction == "sum" else each[counted].mean())
    expected = hard * entropy + soft * divergence
    grads = torch.autograd.grad(1.5 * expected, (x, head.weight))

    asked: list[tuple[int, int]] = []

    def of_teacher(start: int, stop: int) -> torch.Tensor:
        asked.append((start, stop))
        return teacher[start:stop]

    given = SoftTargets(logits=of_teacher, hard_weight=hard, soft_weight=soft, temperature=heat)
    total, told_entropy, told_divergence = head(x, targets, reduction, given)
    (1.5 * total).backward()
    for found, wanted in ((total, expected), (told_entropy, entropy), (told_divergence, divergence)):
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, grads[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(head.weight.grad, grads[1], rtol=1e-10, atol=1e-12)
    width = max(1, chunk // 4)
    assert asked == [(start, min(start + width, TOKENS)) for start in range(0, TOKENS, width)]


def test_a_teacher_that_agrees_adds_nothing() -> None:
    head, x, targets, _ = case()
    soft = SoftTargets(logits=lambda start, stop: F.linear(x[start:stop], head.weight).detach(), temperature=2.0)
    total, entropy, divergence = head(x, targets, "sum", soft).detach()
    assert divergence.abs() < 1e-12 and torch.allclose(total, entropy)


def test_without_gradients_none_is_kept_and_each_token_alone_is_refused() -> None:
    head, x, targets, teacher = case()
    soft = SoftTargets(logits=lambda start, stop: teacher[start:stop])
    with torch.no_grad():
        assert not head(x, targets, "sum", soft).requires_grad
    with pytest.raises(ConfigError, match="reduction='none' with a teacher"):
        head(x, targets, "none", soft)


def test_a_second_backward_is_refused() -> None:
    head, x, targets, teacher = case()
    total = head(x, targets, "sum", SoftTargets(logits=lambda start, stop: teacher[start:stop]))[0]
    total.backward(retain_graph=True)
    with pytest.raises(ConfigError, match="for one backward"):
        total.backward()


def test_half_precision_stays_near() -> None:
    head, x, targets, teacher = case(8)
    soft = SoftTargets(logits=lambda start, stop: teacher[start:stop])
    exact = head(x, targets, "sum", soft).detach()
    head.to(torch.bfloat16)
    short = x.detach().bfloat16().requires_grad_()
    found = head(short, targets, "sum", soft)
    found[0].backward()
    assert found.dtype == torch.float32 and short.grad is not None
    torch.testing.assert_close(found.detach().double(), exact, rtol=2e-2, atol=0.0)
