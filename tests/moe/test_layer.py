"""The layer against the one-hot oracle, at its edges, and inside a sharded model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trivium as tv
from tests.moe import cases
from trivium.base.errors import ConfigError, NonFiniteError, TriviumError
from trivium.moe import CapacityConfig, Gate, GateConfig, Gating, MoE, Routing, Tally

OPTIONS: list[dict[str, Any]] = [
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 8},
    {"top_k": 1, "gate": GateConfig(score="sigmoid")},
    {"top_k": 2, "gate": GateConfig(renormalize=False)},
    {"top_k": 3, "gate": GateConfig(score="sigmoid", renormalize=True), "z_weight": 0.1},
    {"top_k": 1, "capacity_factor": 0.25},
    {"top_k": 2, "capacity_factor": CapacityConfig(factor=0.5, minimum=1, policy="score")},
    {"top_k": 2, "expert": "gelu"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_values_and_gradients_are_the_one_hot_einsums(options: dict[str, Any], count: int) -> None:
    ours, theirs = cases.make(**options), cases.make(**options)
    x, x_too = (cases.tokens(0, count).requires_grad_() for _ in range(2))
    y, aux = ours(x)
    _, aux_too = theirs(x_too)
    expected = cases.oracle(theirs, x_too, aux_too.routing)
    weight = torch.randn(count, cases.DIM, dtype=torch.float64)
    (y * weight).sum().add(aux.loss).backward()
    (expected * weight).sum().add(aux_too.loss).backward()
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    assert cases.far(x.grad, x_too.grad) < 1e-12  # type: ignore[arg-type]
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        grads = [torch.zeros_like(a) if p.grad is None else p.grad for p in (a, b)]
        assert cases.far(*grads) < 1e-12, name


def test_gradients_are_those_of_finite_differences() -> None:
    layer = cases.make(top_k=2, capacity_factor=0.5)
    x = cases.tokens(0, 9).requires_grad_()
    routing = layer(x)[1].routing.detach()
    assert not routing.kept_TK.all()
    assert torch.autograd.gradcheck(lambda x: layer(x, routing)[0], (x,))


def test_residual_adds_or_mixes_the_dense_mlp() -> None:
    x = cases.tokens(0, 5)
    for residual in (True, "add", "mix"):
        layer = cases.make(top_k=1, residual=residual)
        y, aux = layer(x)
        routed, dense = cases.oracle(layer, x, aux.routing), layer.dense(x)  # type: ignore[misc]
        if residual == "mix":
            parts = layer.mix(x).softmax(-1)  # type: ignore[misc]
            routed, dense = routed * parts[:, :1], dense * parts[:, 1:]
        assert torch.allclose(y, routed + dense, rtol=1e-6, atol=1e-7)


def test_all_tokens_to_one_expert() -> None:
    layer = cases.make(top_k=1)
    y, aux = layer(cases.tokens(0, 6), cases.force(6, 3, 1))
    assert aux.load.tolist() == [0, 0, 0, 6, 0, 0, 0, 0]
    y.sum().backward()
    hit = {name.split(".")[0] for name, p in layer.experts.named_parameters() if p.grad is not None}
    assert hit == {"3"}


def test_ties_go_to_the_lower_numbers() -> None:
    layer = cases.make(top_k=3)
    with torch.no_grad():
        layer.get_submodule("gate").get_parameter("weight").zero_()
    assert layer(cases.tokens(0, 4))[1].routing.experts_TK.tolist() == [[0, 1, 2]] * 4


def test_a_replayed_routing_keeps_choice_and_drops_and_the_scores_gradient() -> None:
    layer = cases.make(top_k=2, capacity_factor=0.5)
    x = cases.tokens(0, 12)
    y, aux = layer(x)
    again, aux_again = layer(x, aux.routing.detach())
    assert torch.equal(y, again)
    assert aux.dropped == aux_again.dropped > 0
    weight = layer.get_submodule("gate").get_parameter("weight")
    (first,) = torch.autograd.grad(y.sum(), weight)
    (second,) = torch.autograd.grad(again.sum(), weight)
    assert torch.equal(first, second) and first.abs().sum() > 0
    moved, aux_moved = layer(cases.tokens(1, 12), aux.routing)
    assert torch.equal(aux_moved.routing.experts_TK, aux.routing.experts_TK)
    assert not torch.equal(moved, y)


def test_a_token_without_a_kept_choice_gets_zeros() -> None:
    layer = cases.make(top_k=2)
    nobody = Routing(
        experts_TK=torch.zeros(3, 2, dtype=torch.int64),
        weights_TK=torch.zeros(3, 2),
        kept_TK=torch.zeros(3, 2, dtype=torch.bool),
    )
    x = cases.tokens(0, 3).requires_grad_()
    y, aux = layer(x, nobody)
    y.sum().backward()
    assert not y.any() and aux.dropped == 6 and not x.grad.any()  # type: ignore[union-attr]


def test_two_evaluations_are_bit_equal_and_jitter_is_off() -> None:
    layer = MoE(8, 16, 4, gate=GateConfig(jitter=0.5), seed=1)
    x = torch.randn(3, 5, 8)
    layer.eval()
    first, second = layer(x)[0], layer(x)[0]
    assert torch.equal(first, second)
    layer.train()
    one, same, other = (layer(x, step=step)[0] for step in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, first)
    with pytest.raises(ConfigError, match="step"):
        layer(x)


def test_a_nan_row_is_named() -> None:
    x = torch.randn(2, 3, 8)
    x[1, 1, 4] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layer 7: the logits of row 4 .*\(1 of 6 rows\), and so is its input"):
        MoE(8, 16, 4, layer=7)(x)


def test_the_router_is_fp32_in_a_16_bit_layer() -> None:
    layer = MoE(8, 16, 4, dtype=torch.bfloat16)
    x = torch.randn(10, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, aux = layer(x)
    assert layer.get_submodule("gate").get_parameter("weight").dtype == torch.float32
    assert y.dtype == torch.bfloat16 and aux.routing.weights_TK.dtype == torch.float32
    exact = x.detach().float() @ layer.get_submodule("gate").get_parameter("weight").T
    assert torch.equal(aux.routing.experts_TK, exact.topk(2).indices)
    y.sum().backward()


def test_experts_are_independent_and_the_same_wherever_they_live() -> None:
    torch.manual_seed(0)
    one, state = MoE(8, 16, 4, seed=2), torch.get_rng_state()
    torch.manual_seed(0)
    more = MoE(8, 16, 12, seed=2)
    weights = [one.experts.get_submodule(str(n)).get_parameter("up.weight") for n in range(4)]
    assert len({tuple(w.flatten().tolist()) for w in weights}) == 4
    for number, weight in enumerate(weights):
        assert torch.equal(weight, more.experts.get_submodule(str(number)).get_parameter("up.weight"))
    torch.manual_seed(0)
    MoE(8, 16, 4, seed=3)
    assert torch.equal(torch.get_rng_state(), state), "building experts moved torch's default generator"


def test_user_experts_and_gates() -> None:
    layer = MoE(8, 16, 4, 1, expert=lambda number: nn.Linear(8, 8), gate=PlainGate(), residual=True)
    y, aux = layer(torch.randn(2, 3, 8))
    assert y.shape == (2, 3, 8) and aux.routing.experts_TK.shape == (6, 1)
    with pytest.raises(ConfigError, match="expert 0 made"):
        MoE(8, 16, 1, 1, expert=lambda number: nn.Linear(8, 9))(torch.randn(3, 8))
    with pytest.raises(ConfigError, match=r"expert\(0\) returned a int"):
        MoE(8, 16, 4, expert=lambda number: number)  # type: ignore[arg-type,return-value]


class PlainGate(nn.Module):
    """A user's: token t goes to expert t modulo 4, all with one learned weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x_TC: torch.Tensor, *, experts_TK: torch.Tensor | None = None, step: int | None = None) -> Gating:
        if experts_TK is None:
            experts_TK = torch.arange(len(x_TC)).remainder(4)[:, None]
        logits_TE = torch.zeros(len(x_TC), 4)
        weights_TK = self.weight.expand(experts_TK.shape)
        return Gating(
            logits_TE=logits_TE, probabilities_TE=logits_TE.softmax(-1), experts_TK=experts_TK, weights_TK=weights_TK
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5}, "expected 1 to num_experts=4"),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0"),
        ({"residual": "sum"}, "residual='sum'"),
        ({"ep": 2}, "needs mesh="),
        ({"expert": "relu"}, "expert='relu'"),
        ({"top_k": 1, "gate": GateConfig(renormalize=True)}, "learn nothing"),
        ({"top_k": 2.0}, "top_k=2.0: expected a whole number"),
        ({"capacity_factor": "1.25"}, "capacity_factor='1.25': expected a number"),
        ({"capacity_factor": True}, "capacity_factor=True"),
        ({"gate": {"jitter": 0.1}}, r"gate=\{'jitter': 0.1\}: expected a GateConfig"),
        ({"gate": Gate}, "gate=<class .*: expected a GateConfig"),
        ({"gate": Gate(8, 6, 2)}, "gate= is for 6 experts, dim 8 and top_k=2; the layer has 4, 8 and 2"),
        ({"gate": Gate(8, 4, 1)}, "top_k=1; the layer has 4, 8 and 2"),
        ({"expert": nn.Linear(8, 8)}, "makes a module of its own"),
        ({"expert": 3}, "expert=3: expected 'swiglu'"),
        ({"exchange": "coordinated"}, "exchange='coordinated' has no effect without mesh="),
        ({"exchange": "hierarchical"}, "exchange='hierarchical' has no effect without mesh="),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        MoE(8, 16, 4, **options)


def at_row_2(value: torch.Tensor, number: float) -> torch.Tensor:
    value = value.clone()
    value[2] = number
    return value


WRONG: list[tuple[Any, type[TriviumError], str]] = [
    (None, ConfigError, "returned a tuple: expected a trivium.moe.Gating"),
    ({"experts_TK": lambda e: e + 1}, ConfigError, r"experts_TK names \[4\] in row 3: expected 0 to 3"),
    ({"experts_TK": lambda e: e + 9}, ConfigError, r"experts_TK names \[9\] in row 0"),
    ({"experts_TK": lambda e: e - 1}, ConfigError, r"experts_TK names \[-1\] in row 0"),
    ({"experts_TK": lambda e: e.int()}, ConfigError, "experts_TK holds torch.int32: expected torch.int64"),
    ({"experts_TK": lambda e: e.expand(-1, 2)}, ConfigError, r"experts_TK is \[6, 2\]: expected \[6, 1\]"),
    ({"experts_TK": lambda e: e[:-1], "weights_TK": lambda w: w[:-1]}, ConfigError, r"is \[5, 1\]: expected \[6, 1\]"),
    ({"logits_TE": lambda x: x[:, :3]}, ConfigError, r"logits_TE is \[6, 3\]: expected \[6, 4\]"),
    ({"weights_TK": lambda w: w.long()}, ConfigError, "weights_TK holds torch.int64: expected floating-point"),
    ({"weights_TK": lambda w: w.tolist()}, ConfigError, r"weights_TK is \[\[1.0"),
    ({"logits_TE": lambda x: at_row_2(x, float("nan"))}, NonFiniteError, "logits_TE is NaN or infinite in row 2"),
    ({"probabilities_TE": lambda x: at_row_2(x, float("inf"))}, NonFiniteError, "probabilities_TE .* in row 2"),
    ({"weights_TK": lambda w: at_row_2(w, float("nan"))}, NonFiniteError, "weights_TK is NaN or infinite in row 2"),
]


@pytest.mark.parametrize(("wrong", "kind", "words"), WRONG)
def test_what_a_users_gate_gets_wrong_is_told(wrong: Any, kind: type[TriviumError], words: str) -> None:
    layer = MoE(8, 16, 4, 1, gate=cases.WrongGate(wrong), seed=0)
    with pytest.raises(kind, match=words):
        layer(torch.randn(6, 8))


def test_a_users_gate_that_gets_nothing_wrong_is_taken_also_without_a_token() -> None:
    layer = MoE(8, 16, 4, 1, gate=cases.WrongGate({}), seed=0)
    assert layer(torch.randn(6, 8))[1].load.tolist() == [2, 2, 1, 1]
    assert layer(torch.randn(0, 8))[1].load.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("x", [torch.ones(3, 8, dtype=torch.int64), torch.tensor(1.0), torch.ones(3, 7)], ids=str)
def test_input_that_is_not_rows_of_floats_is_refused(x: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r"expected \[\.\.\., 8\] of floats"):
        MoE(8, 16, 4)(x)


def test_a_routing_for_other_tokens_is_refused() -> None:
    layer = MoE(8, 16, 4)
    _, aux = layer(torch.randn(5, 8))
    with pytest.raises(ConfigError, match="for 6 tokens"):
        layer(torch.randn(6, 8), aux.routing)
    wrong = Routing(
        experts_TK=aux.routing.experts_TK + 4, weights_TK=aux.routing.weights_TK, kept_TK=aux.routing.kept_TK
    )
    with pytest.raises(ConfigError, match="expected 0 to 3"):
        layer(torch.randn(5, 8), wrong)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(MoE(8, 16, 4, residual=True, seed=n, init_std=0.3) for n in range(2))
        self.head = nn.Linear(8, 20)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x, extra = self.embed(tokens), torch.zeros(())
        for block in self.blocks:
            y, aux = block(x)
            x, extra = x + y, extra + aux.loss
        return nn.functional.cross_entropy(self.head(x), targets) + extra


def trained(stage: int | None) -> tuple[list[float], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model: Any = Small()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if stage is not None:
        model, optimizer = tv.zero.shard(model, optimizer, tv.init(device="cpu"), stage=stage)
    losses = []
    for step in range(4):
        drawn = torch.randint(20, (2, 3), generator=torch.Generator().manual_seed(step))
        loss = model(drawn[0], drawn[1])  # three tokens: some experts get none
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model.state_dict() if stage is None else tv.zero.full_state_dict(model)


@pytest.mark.parametrize("stage", [0, 3])
def test_inside_a_sharded_model(stage: int) -> None:
    losses, state = trained(stage)
    losses_too, state_too = trained(None)
    assert losses == losses_too
    assert state.keys() == state_too.keys()
    for name, value in state_too.items():
        assert torch.equal(state[name], value), name


def test_the_tally_counts_load_drops_and_the_dead() -> None:
    layer, tally = cases.make(top_k=1, capacity_factor=CapacityConfig(factor=1.0, minimum=4)), Tally()
    assert tally.report().drop_rate == 0.0
    x = cases.tokens(0, 1).expand(10, cases.DIM)
    for _ in range(2):
        tally.add(layer(x)[1])
    report = tally.report()
    taken = report.load.index(20)
    assert report.dropped == 12 and report.drop_rate == 0.6 and report.load_entropy == 0.0
    assert report.dead == tuple(n for n in range(8) if n != taken)
    assert 0 < report.router_entropy < 2.08


def test_recompute_gives_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        layer, x = cases.make(top_k=2, capacity_factor=0.5), cases.tokens(0, 12).requires_grad_()
        y, aux = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
        (y.square().sum() + aux.loss).backward()
        grads.append([x.grad, *(p.grad for p in layer.parameters())])
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_built_on_meta_and_filled_while_sharded() -> None:
    with torch.device("meta"):
        model: Any = Small()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = tv.zero.shard(model, optimizer, tv.init(device="cpu"), stage=3)
    drawn = torch.randint(20, (2, 3), generator=torch.Generator().manual_seed(0))
    model(drawn[0], drawn[1]).backward()
    optimizer.step()
    state = tv.zero.full_state_dict(model)
    weights = [state[f"blocks.0.experts.{number}.up.weight"] for number in range(4)]
    assert all(weight.isfinite().all() and weight.std() > 0.1 for weight in weights)
    assert not torch.equal(weights[0], weights[1])
