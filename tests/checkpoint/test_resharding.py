from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.checkpoint.ranks import Cut, all_ok, even, on_ranks, seeded
from trivium import checkpoint
from trivium.base.errors import CheckpointError, MismatchError


class Model(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.body = nn.Sequential(nn.Linear(6, 5, dtype=dtype), nn.Linear(5, 6, dtype=dtype))
        self.one = nn.Parameter(torch.ones(1, dtype=dtype))
        self.none = nn.Parameter(torch.ones(0, 3, dtype=dtype))
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor([3, 4]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    return seeded(seed, lambda: Model(dtype))


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def trained(peers: Any, cuts: dict[str, Any], optimizer: Any = adamw, dtype: torch.dtype = torch.float32) -> Cut:
    cut = Cut(make(0, dtype), peers.rank, cuts, optimizer)
    cut.step(1)
    cut.step(2)
    cut.publish()
    return cut


def whole_states(cuts: list[Cut]) -> dict[str, torch.Tensor]:
    """Every parameter and optimizer state whole, from all ranks' pieces."""
    found: dict[str, torch.Tensor] = {}
    for name, entry in cuts[0].entries.items():
        rows: dict[str, torch.Tensor] = {}
        for cut in cuts:
            piece = cut.entries[name].piece
            if piece is None:
                continue
            values = {"": piece.tensor, **(cut.optimizer.state.get(piece.tensor, {}) if cut.optimizer else {})}
            for key, value in values.items():
                if value.dim() == 0:
                    rows[key] = value
                    continue
                rows.setdefault(key, torch.full((entry.shape.numel(),), float("nan")))
                rows[key][piece.start : piece.start + piece.tensor.numel()] = value.flatten()
        found |= {f"{name}/{key}": value for key, value in rows.items()}
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.mark.parametrize(("writers", "readers"), [(1, 1), (1, 2), (2, 4), (4, 1), (3, 2), (2, 2), (4, 3)])
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    cuts = even(make(), writers)
    wrote = all_ok(on_ranks(writers, lambda peers: trained(peers, cuts)))

    def save(peers: Any) -> Any:
        cut = wrote[peers.rank]
        return checkpoint.save(
            tmp_path / "run" / "step-2", model=cut.model, optimizer=cut.optimizer, extra={"step": 2}, mesh=peers
        )

    path = all_ok(on_ranks(writers, save))[0]

    def read(peers: Any) -> Cut:
        cut = Cut(make(7), peers.rank, even(make(), readers), adamw)
        assert checkpoint.load(path, model=cut.model, optimizer=cut.optimizer, mesh=peers) == {"step": 2}
        assert cut.published == 1
        assert torch.equal(cut.model.count, torch.tensor([3, 4]))
        return cut

    got = all_ok(on_ranks(readers, read))
    assert_same(whole_states(wrote), whole_states(got))
    for cut in (*wrote, *got):
        cut.step(3)
    assert_same(whole_states(wrote), whole_states(got))


@st.composite
def _random_cuts(draw: st.DrawFn, sizes: dict[str, int]) -> tuple[int, dict[str, list[int]]]:
    ranks = draw(st.integers(1, 4))
    cuts = {}
    for name, size in sizes.items():
        inner = draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1))
        cuts[name] = [0, *sorted(inner), size]
    return ranks, cuts


SIZES = {name: parameter.numel() for name, parameter in make().named_parameters()}


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(writer=_random_cuts(SIZES), reader=_random_cuts(SIZES), unsharded=st.booleans(), seed=st.integers(0, 10**6))
def test_random_cuts(
    tmp_path_factory: pytest.TempPathFactory, writer: Any, reader: Any, unsharded: bool, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("cuts")
    wrote = all_ok(on_ranks(writer[0], lambda peers: trained(peers, writer[1])))
    all_ok(
        on_ranks(
            writer[0],
            lambda peers: checkpoint.save(
                folder / "c", model=wrote[peers.rank].model, optimizer=wrote[peers.rank].optimizer, mesh=peers
            ),
        )
    )
    expected = whole_states(wrote)
    if unsharded:
        model = make(seed)
        optimizer = adamw(model.parameters())
        checkpoint.load(folder / "c", model=model, optimizer=optimizer)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.flatten(), expected[f"{name}/"])
            assert torch.equal(optimizer.state[parameter]["exp_avg"].flatten(), expected[f"{name}/exp_avg"])
        return
    got = all_ok(on_ranks(reader[0], lambda peers: Cut(make(seed), peers.rank, reader[1], adamw)))
    all_ok(
        on_ranks(
            reader[0],
            lambda peers: checkpoint.load(
                folder / "c", model=got[peers.rank].model, optimizer=got[peers.rank].optimizer, mesh=peers
            ),
        )
    )
    assert_same(expected, whole_states(got))


def test_blocks_larger_than_one_are_cut_anywhere(tmp_path: Path) -> None:
    class Wide(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2_500_001, generator=torch.Generator().manual_seed(seed)))

    wrote = all_ok(on_ranks(2, lambda peers: Cut(Wide(1), peers.rank, {"weight": [0, 1_400_003, 2_500_001]}, None)))
    all_ok(on_ranks(2, lambda peers: checkpoint.save(tmp_path / "c", model=wrote[peers.rank].model, mesh=peers)))
    got = all_ok(on_ranks(3, lambda peers: Cut(Wide(2), peers.rank, {"weight": [0, 7, 1_400_004, 2_500_001]}, None)))
    all_ok(on_ranks(3, lambda peers: checkpoint.load(tmp_path / "c", model=got[peers.rank].model, mesh=peers)))
    assert torch.equal(torch.cat([cut.pieces["weight"] for cut in got]), Wide(1).weight.detach())


def test_master_weights_in_fp32_load_into_a_bf16_model_as_training_rounds_them(tmp_path: Path) -> None:
    cuts = even(make(), 2)
    wrote = all_ok(on_ranks(2, lambda peers: trained(peers, cuts, dtype=torch.bfloat16)))
    all_ok(on_ranks(2, lambda peers: checkpoint.save(tmp_path / "c", model=wrote[peers.rank].model, mesh=peers)))
    model = make(5, torch.bfloat16)
    checkpoint.load(tmp_path / "c", model=model)
    expected = whole_states([*wrote])
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter.flatten(), expected[f"{name}/"].bfloat16())


def test_replicas_read_but_do_not_write(tmp_path: Path) -> None:
    def save(peers: Any) -> list[str]:
        cut = Cut(make(), 0, even(make(), 1), adamw)
        for entry in cut.entries.values():
            entry.writes = peers.rank == 1
        cut.step(1)
        return [str(checkpoint.save(tmp_path / "c", model=cut.model, optimizer=cut.optimizer, mesh=peers))]

    all_ok(on_ranks(2, save))
    sizes = [(tmp_path / "c" / f"rank-0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert sizes[1] > 3 * sum(parameter.numel() * 4 for parameter in make().parameters()) > sizes[0]
    model = make(3)
    checkpoint.load(tmp_path / "c", model=model)
    reference = Cut(make(), 0, even(make(), 1), adamw)
    reference.step(1)
    assert torch.equal(model.one, reference.pieces["one"])


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "NAdam", "Adafactor", "Muon"])
def test_states_of_every_kind_come_back(tmp_path: Path, name: str) -> None:
    def build(seed: int) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Linear(4, 3, bias=False)
        options = {"SGD": {"lr": 0.1, "momentum": 0.9}}.get(name, {"lr": 0.1})
        return model, getattr(torch.optim, name)(model.parameters(), **options)

    model, optimizer = build(0)
    other, other_optimizer = build(1)
    for _ in range(3):
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizer)
    checkpoint.load(tmp_path / "c", model=other, optimizer=other_optimizer)
    for one, two in ((model, other), (other, model)):
        one.weight.grad = torch.full((3, 4), 0.5)
        assert torch.equal(one.weight, two.weight)
    optimizer.step()
    other_optimizer.step()
    assert torch.equal(model.weight, other.weight)


def test_hyper_parameters_groups_and_several_optimizers_come_back(tmp_path: Path) -> None:
    def build(lr: float) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        first = torch.optim.Adam(
            [{"params": [model[0].weight], "lr": lr, "betas": (0.5, lr)}, {"params": [model[0].bias]}], lr=lr
        )
        return model, [first, torch.optim.SGD(model[1].parameters(), lr=torch.tensor(lr), momentum=0.5)]

    model, optimizers = build(0.25)
    model(torch.ones(1, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    checkpoint.save(tmp_path / "c", model=model, optimizer=optimizers)
    other, others = build(0.5)
    group = others[0].param_groups[0]
    checkpoint.load(tmp_path / "c", model=other, optimizer=others)
    assert others[0].param_groups[0] is group
    assert (group["lr"], group["betas"]) == (0.25, (0.5, 0.25))
    assert others[1].param_groups[0]["lr"].item() == 0.25
    assert torch.equal(
        others[1].state[other[1].weight]["momentum_buffer"], optimizers[1].state[model[1].weight]["momentum_buffer"]
    )


def test_a_fresh_checkpoint_clears_the_state_of_a_used_optimizer(tmp_path: Path) -> None:
    model = make()
    checkpoint.save(tmp_path / "c", model=model, optimizer=adamw(model.parameters()))
    used = trained_plain()
    checkpoint.load(tmp_path / "c", model=used[0], optimizer=used[1])
    assert not any(used[1].state.get(parameter) for parameter in used[0].parameters())


def trained_plain() -> tuple[Model, torch.optim.Optimizer]:
    model = make(4)
    optimizer = adamw(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_extra_keeps_types(tmp_path: Path) -> None:
    extra = {
        "step": 3,
        "best": float("inf"),
        "nan": float("nan"),
        "pair": (1, [2.5, None]),
        7: "int key",
        "$odd": True,
        "rng": torch.get_rng_state(),
        "raw": b"\x00\xff",
        "deep": {"a": {"b": -0.0}},
    }
    model = nn.Linear(2, 2)
    checkpoint.save(tmp_path / "c", model=model, extra=extra)
    found = checkpoint.load(tmp_path / "c", model=model)
    assert torch.equal(found.pop("rng"), extra.pop("rng"))
    assert repr(found.pop("nan")) == repr(extra.pop("nan"))
    assert found == extra
    assert repr(found["deep"]["a"]["b"]) == "-0.0"
    with pytest.raises(CheckpointError, match=r"extra\['f'\] is a .*without pickle"):
        checkpoint.save(tmp_path / "d", model=model, extra={"f": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_strided_parameter_and_a_compiled_model(tmp_path: Path) -> None:
    model = nn.Linear(3, 5, bias=False)
    model.weight = nn.Parameter(torch.randn(3, 5).t())
    checkpoint.save(tmp_path / "c", model=torch.compile(model, backend="eager"))
    other = nn.Linear(3, 5, bias=False)
    other.weight = nn.Parameter(torch.zeros(3, 5).t())
    checkpoint.load(tmp_path / "c", model=other)
    assert torch.equal(model.weight, other.weight)


def test_only_a_part_of_the_model_is_sharded(tmp_path: Path) -> None:
    def build(peers: Any, seed: int) -> nn.Module:
        model = seeded(seed, lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}))
        Cut(model["b"], peers.rank, even(model["b"], 2), None)
        return model

    def save(peers: Any) -> None:
        checkpoint.save(tmp_path / "c", model=build(peers, 0), mesh=peers)

    all_ok(on_ranks(2, save))
    expected = seeded(0, lambda: nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)}))
    found = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    checkpoint.load(tmp_path / "c", model=found)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name])


def test_released_and_meta_parameters_are_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="weight is on the meta device"):
        checkpoint.save(tmp_path / "c", model=model)
    released = nn.Linear(2, 2)
    released.weight.data = torch.full((1,), float("nan")).expand(2, 2)
    with pytest.raises(CheckpointError, match="weight is released"):
        checkpoint.save(tmp_path / "c", model=released)


def test_pieces_with_a_hole_or_an_overlap_are_refused(tmp_path: Path) -> None:
    for cuts, words in (
        ({"weight": [[0, 3], [4, 6]]}, "leave a hole at element 3"),
        ({"weight": [[0, 4], [3, 6]]}, "overlap"),
    ):

        def save(peers: Any, cuts: Any = cuts) -> None:
            model = nn.Linear(3, 2, bias=False)
            start, end = cuts["weight"][peers.rank]
            Cut(model, 0, {"weight": [start, end]}, None)
            checkpoint.save(tmp_path / "c", model=model, mesh=peers)

        for result in on_ranks(2, save):
            assert isinstance(result, MismatchError)
            assert words in str(result)
    assert list(tmp_path.iterdir()) == []


def test_differences_are_a_table_and_strict_false_skips_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(
        tmp_path / "c", model=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3), "c": nn.Linear(1, 1)})
    )
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 4), "d": nn.Linear(1, 1)})
    before = other["b"].weight.clone()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(tmp_path / "c", model=other)
    assert caught.value.exit_code == 5
    text = str(caught.value)
    assert "2 of another shape, 2 not in the checkpoint, 2 not in the model" in text.replace("\n", " ")
    assert all(word in text for word in ("b.weight", "[4, 2]", "[3, 2]", "d.bias", "c.weight"))
    with caplog.at_level(logging.WARNING, "trivium"):
        checkpoint.load(tmp_path / "c", model=other, strict=False)
    assert "d.weight" in caplog.text and "c.bias" in caplog.text
    assert torch.equal(before, other["b"].weight)


def test_tied_here_and_separate_there(tmp_path: Path) -> None:
    separate = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    checkpoint.save(tmp_path / "c", model=separate)
    tied = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    tied["b"].weight = tied["a"].weight
    with pytest.raises(CheckpointError, match="tied here and separate there"):
        checkpoint.load(tmp_path / "c", model=tied)
    checkpoint.save(tmp_path / "d", model=tied)
    checkpoint.load(tmp_path / "d", model=separate)
    assert torch.equal(separate["b"].weight, tied["a"].weight)


def test_a_checkpoint_without_an_optimizer_says_how_to_load_it(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    checkpoint.save(tmp_path / "c", model=model)
    with pytest.raises(CheckpointError, match="saved without one: load with optimizer=None"):
        checkpoint.load(tmp_path / "c", model=other, optimizer=adamw(other.parameters()))
    checkpoint.load(tmp_path / "c", model=other)
    assert torch.equal(model.weight, other.weight)
