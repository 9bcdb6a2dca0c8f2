"""Rotary positions, document masks and the attention module, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from trivium.nn import Attention, causal, document_mask, restarting_positions, rotary, rotate


def test_rotate_turns_pairs_half_a_head_apart():
    positions = torch.tensor([[0, 3]])
    cos, sin = rotary(positions, 4, 100.0)
    turned = rotate(torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 1, 2, 4), cos, sin)
    assert torch.equal(turned[0, 0, 0], torch.tensor([1.0, 0.0, 0.0, 2.0]))
    fast, slow = 3.0, 3.0 / 10.0
    expected = torch.tensor([math.cos(fast), -2 * math.sin(slow), math.sin(fast), 2 * math.cos(slow)])
    torch.testing.assert_close(turned[0, 0, 1], expected)


def test_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8).unbind(0)

    def score(at_q: int, at_k: int) -> torch.Tensor:
        turned_q = rotate(q, *rotary(torch.tensor([[at_q]]), 8, 10000.0))
        turned_k = rotate(k, *rotary(torch.tensor([[at_k]]), 8, 10000.0))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 2), score(105, 100), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(7, 2), score(7, 3), rtol=1e-4, atol=1e-4)


def test_rotate_keeps_the_dtype():
    x = torch.randn(1, 2, 3, 4, dtype=torch.bfloat16)
    assert rotate(x, *rotary(torch.arange(3)[None], 4, 10000.0)).dtype == torch.bfloat16


def test_positions_restart_at_each_run_of_ids():
    documents = torch.tensor([[5, 5, 5, 2, 2, 5], [0, 1, 1, 1, 1, 1]])
    assert restarting_positions(documents).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_document_mask_separates_runs_even_of_the_same_id():
    mask = document_mask(torch.tensor([[5, 5, 2, 5]]))
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask[0, 0].int().tolist() == expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_equals_the_definition(kv_heads, masked):
    q, k, v = torch.randn(2, 4, 7, 6), torch.randn(2, kv_heads, 7, 6), torch.randn(2, kv_heads, 7, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [3, 3, 3, 3, 3, 3, 4]]) if masked else torch.zeros(2, 7).long()
    visible = torch.tensor(
        [[[row >= col and d[row] == d[col] for col in range(7)] for row in range(7)] for d in documents.tolist()]
    )
    whole_k, whole_v = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
    scores = (q @ whole_k.mT / math.sqrt(6)).masked_fill(~visible[:, None], -math.inf)
    out = causal(documents if masked else None)(q, k, v, layer=0)
    torch.testing.assert_close(out, scores.softmax(-1) @ whole_v)


def test_attend_is_called_with_rotated_heads_and_the_layer():
    seen = {}

    def attend(q, k, v, *, layer):
        seen.update(q=q.shape, k=k.shape, v=v.shape, layer=layer)
        return q

    attention = Attention(12, 3, 1, 6, layer=5)
    out = attention(torch.randn(2, 4, 12), rotary(torch.arange(4)[None], 6, 10000.0), attend)
    assert out.shape == (2, 4, 12)
    assert seen == {"q": (2, 3, 4, 6), "k": (2, 1, 4, 6), "v": (2, 1, 4, 6), "layer": 5}
    assert attention.cache.kind == "paged" and attention.cache.elements_per_token == 12
