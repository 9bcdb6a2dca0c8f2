"""Choices, biases and draws of the gate, against definitions, plain loops and transformers' own router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.moe import cases
from trivium.base.errors import ConfigError, NonFiniteError
from trivium.moe import CapacityConfig, Gate, GateConfig, MoE
from trivium.moe.choice import choose, limit_to_groups
from trivium.moe.draw import gumbel, key, uniform
from trivium.moe.gate import Gating

RANDOM: list[dict[str, Any]] = [
    {"gate": GateConfig(jitter=0.5)},
    {"gate": GateConfig(sample_second=True)},
    {"gate": GateConfig(sample_second=True, score="sigmoid", num_groups=4, top_groups=2, bias_rate=0.1)},
    {"capacity_factor": CapacityConfig(factor=0.5, minimum=1, policy="random")},
]


def plain_uniform(seed: int, place: int) -> float:
    """splitmix64 in Python's integers."""
    mask, step = 2**64 - 1, 0x9E3779B97F4A7C15
    mixed = (seed + (place + 1) * step) & mask
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & mask
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & mask
    return ((mixed ^ (mixed >> 31)) >> 40) / 2**24 + 2.0**-25


@given(seed=st.integers(0, 2**63 - 1), first=st.integers(0, 2**40), columns=st.integers(1, 5))
def test_draws_are_splitmix64_and_the_same_alone_or_in_a_batch(seed: int, first: int, columns: int) -> None:
    drawn = uniform(seed, first, 4, columns, torch.device("cpu"))
    plain = [[plain_uniform(seed, (first + row) * columns + c) for c in range(columns)] for row in range(4)]
    assert torch.allclose(drawn.double(), torch.tensor(plain, dtype=torch.float64), rtol=0, atol=2.0**-24)
    assert torch.equal(drawn[2:3], uniform(seed, first + 2, 1, columns, torch.device("cpu")))
    assert drawn.min() > 0 and drawn.max() < 1 and gumbel(seed, first, 4, columns, drawn.device).isfinite().all()


def test_draws_are_even_and_independent() -> None:
    drawn = uniform(key(1), 0, 20000, 2, torch.device("cpu")).double()
    assert (torch.histc(drawn[:, 0].float(), 10, 0, 1) - 2000).abs().max() < 200  # 4.7 standard deviations
    assert abs(float(torch.corrcoef(drawn.T)[0, 1])) < 0.04
    assert not torch.equal(drawn, uniform(key(2), 0, 20000, 2, torch.device("cpu")).double())


@given(
    rows=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), max_size=5),
    top_k=st.integers(1, 6),
)
def test_choose_is_a_stable_sort(rows: list[list[int]], top_k: int) -> None:
    scores = torch.tensor(rows, dtype=torch.float32).view(-1, 6)
    expected = [sorted(range(6), key=lambda e, row=row: (-row[e], e))[:top_k] for row in rows]  # type: ignore[misc]
    assert choose(scores, top_k).tolist() == expected


def test_groups_are_worth_their_two_best() -> None:
    scores = torch.tensor([[9.0, 0, 0, 5, 5, 0, 3, 3], [1.0, 1, 1, 1, 1, 1, 1, 1]])
    allowed = limit_to_groups(scores, 4, 2)
    assert allowed.int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 0, 0, 0]]
    alone = limit_to_groups(scores, 8, 3)
    assert alone.int()[0].tolist() == [1, 0, 0, 1, 1, 0, 0, 0]


def test_group_limited_routing_with_a_bias_is_deepseek_v3s() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=8,
        n_routed_experts=16,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
    )
    theirs = DeepseekV3MoE(config)
    ours = Gate(16, 16, 3, GateConfig(score="sigmoid", num_groups=4, top_groups=2, scale=2.5, bias_rate=0.001))
    x = torch.randn(50, 16)
    with torch.no_grad():
        theirs.gate.weight.normal_()
        theirs.gate.e_score_correction_bias.uniform_(0, 0.5)  # theirs marks other groups by 0: no score below it
        ours.weight.copy_(theirs.gate.weight)
        ours.bias.copy_(theirs.gate.e_score_correction_bias)  # type: ignore[union-attr]
        found = theirs.gate(x)
        expected = theirs.route_tokens_to_experts(found) if isinstance(found, torch.Tensor) else found[-2:]
    experts, weights = (each for each in expected)
    if experts.is_floating_point():
        experts, weights = weights, experts
    gating = ours(x)
    order, order_too = experts.argsort(1), gating.experts_TK.argsort(1)
    assert torch.equal(experts.gather(1, order), gating.experts_TK.gather(1, order_too))
    assert torch.allclose(weights.gather(1, order), gating.weights_TK.gather(1, order_too), rtol=1e-5)
    assert torch.allclose(gating.weights_TK.sum(1), torch.tensor(2.5))


def test_the_bias_moves_the_choice_alone_and_evens_the_load() -> None:
    torch.manual_seed(0)
    gate = Gate(8, 8, 2, GateConfig(score="sigmoid", bias_rate=0.02, init_std=0.3))
    x = torch.randn(400, 8) + 0.5
    before = gate(x)
    for _ in range(200):
        gate.update_bias(torch.bincount(gate(x).experts_TK.view(-1), minlength=8))
    after = gate(x)
    loads = [torch.bincount(each.experts_TK.view(-1), minlength=8) for each in (before, after)]
    assert loads[0].max() > 150 and loads[1].max() < 125, loads  # even: 100 each
    assert torch.equal(before.logits_TE, after.logits_TE)
    forced = gate(x, experts_TK=before.experts_TK)
    assert torch.equal(forced.weights_TK, before.weights_TK)
    assert not dict(gate.named_parameters()).keys() - {"weight"} and "bias" in gate.state_dict()


def test_one_update_is_the_sign_of_what_is_missing() -> None:
    gate = Gate(4, 4, 1, GateConfig(bias_rate=0.5))
    gate.update_bias(torch.tensor([0, 4, 2, 2]))
    assert gate.bias is not None and gate.bias.tolist() == [0.5, -0.5, 0.0, 0.0]
    with pytest.raises(ConfigError, match=r"expected \[4\]"):
        gate.update_bias(torch.ones(3))
    before = gate.get_buffer("bias").clone()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match=f"load .*{bad}"):
            gate.update_bias(torch.tensor([1.0, bad, 1.0, 1.0]))
    assert torch.equal(gate.get_buffer("bias"), before)
    with pytest.raises(ConfigError, match=r"bias_rate=0\.001"):
        Gate(4, 4, 1).update_bias(torch.ones(4))


@pytest.mark.parametrize("options", RANDOM, ids=str)
def test_draws_move_training_and_never_eval(options: dict[str, Any]) -> None:
    layer, x = cases.make(top_k=2, **options), cases.tokens(0, 40)
    one, again, other = (layer(x, step=step)[0] for step in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert not torch.equal(one, cases.make(top_k=2, layer=1, **options)(x, step=3)[0])
    with pytest.raises(ConfigError, match="in training needs step="):
        layer(x)
    layer.eval()
    first, second = layer(x)[0], layer(x, step=5)[0]
    assert torch.equal(first, second) and not torch.equal(first, one)


@pytest.mark.parametrize("options", RANDOM[:3], ids=str)
def test_a_token_draws_the_same_at_any_placement(options: dict[str, Any]) -> None:
    layer, x = cases.make(top_k=2, **options), cases.tokens(0, 40)
    whole = layer(x, step=3)[1].routing.detach()
    parts = [
        layer(x[start:stop], step=3, first_token=start)[1].routing.detach() for start, stop in ((0, 7), (7, 8), (8, 40))
    ]
    assert torch.equal(whole.experts_TK, torch.cat([part.experts_TK for part in parts]))
    # A matrix product rounds by its number of rows; a draw of its own would be away by far more.
    assert cases.far(whole.weights_TK, torch.cat([part.weights_TK for part in parts])) < 1e-14


def test_the_second_expert_is_drawn_by_its_score() -> None:
    gate = Gate(3, 3, 2, GateConfig(sample_second=True))
    with torch.no_grad():
        gate.weight.copy_(torch.tensor([0.5, 0.3, 0.2]).log().diag())
    experts = gate(torch.ones(20000, 3), step=0).experts_TK
    assert (experts[:, 0] == 0).all()
    assert float((experts[:, 1] == 1).double().mean()) == pytest.approx(0.6, abs=0.014)  # 4 standard deviations
    assert (gate.eval()(torch.ones(5, 3)).experts_TK == torch.tensor([0, 1])).all()


def test_random_token_selection_drops_other_tokens_in_each_step() -> None:
    layer = cases.make(top_k=1, capacity_factor=CapacityConfig(factor=1.0, minimum=1, policy="random"))
    x = cases.tokens(0, 1).expand(400, cases.DIM)
    kept = [layer(x, step=step)[1].routing.kept_TK.view(-1) for step in range(2)]
    assert [int(each.sum()) for each in kept] == [50, 50] and not torch.equal(*kept)
    assert 10 < int(kept[0][:200].sum()) < 40, "early tokens are not preferred"
    assert layer.eval()(x)[1].routing.kept_TK.view(-1).nonzero().view(-1).tolist() == list(range(50))


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ({"num_groups": 3, "top_groups": 1}, "expected a divisor of num_experts=8"),
        ({"num_groups": 4}, "needs gate.top_groups"),
        ({"num_groups": 4, "top_groups": 5}, "expected 1 to gate.num_groups=4"),
        ({"num_groups": 8, "top_groups": 1}, "top_k=2 of 1 groups of 1"),
        ({"scale": 0.0}, "gate.scale=0.0"),
        ({"bias_rate": -1.0}, "gate.bias_rate=-1.0"),
        ({"init_std": -1.0}, "gate.init_std=-1.0"),
        ({"init_std": float("nan")}, "gate.init_std=nan"),
        ({"init_std": float("inf")}, "gate.init_std=inf"),
        ({"score": "tanh"}, "gate.score='tanh'"),
        ({"jitter": 1.0}, "gate.jitter=1.0"),
    ],
)
def test_gates_that_cannot_be_are_refused(gate: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoE(8, 16, 8, gate=GateConfig(**gate))
    with pytest.raises(ConfigError, match="draws nothing"):
        Gate(8, 8, 1, GateConfig(sample_second=True))


def choose_by(logits: list[list[float]]) -> Gating:
    logits_TE = torch.tensor(logits)
    weights_TK, experts_TK = logits_TE.topk(1)
    probabilities_TE = logits_TE.softmax(-1)
    return Gating(logits_TE=logits_TE, probabilities_TE=probabilities_TE, experts_TK=experts_TK, weights_TK=weights_TK)


def test_an_expert_is_forbidden_by_minus_infinity_and_one_at_least_is_left() -> None:
    inf = float("inf")
    choose_by([[0.0, -inf, 1.0], [-inf, -inf, 2.0]]).check(2, 3, 1)
    for row, told in (([-inf] * 3, "forbids every expert"), ([0.0, inf, -inf], "is NaN or infinite")):
        with pytest.raises(NonFiniteError, match=rf"the gate's logits_TE {told}.* in row 1"):
            choose_by([[0.0, 0.0, 1.0], row]).check(2, 3, 1)
