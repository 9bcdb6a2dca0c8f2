"""Training with experts: equal bits on any ranks, what is told of the routers, resume, recomputation, tasks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train import cases
from tests.worlds import Worlds
from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig, MoEBlock, MoEConfig, build
from trivium.train.objective import recomputed

MOE = {"experts": 4, "top_k": 2, "ffn_dim": 24, "residual": "add", "capacity": {"factor": 1.0}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cases.words(tmp_path)
    return tmp_path


def table(folder: Path, moe: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    return cases.table(folder, model__moe={**MOE, **(moe or {})}, **changed)


def test_runs_of_equal_batch_have_equal_bits_at_every_stage(world: Worlds, folder: Path) -> None:
    values = table(folder, {"gate": {"jitter": 0.1, "bias_rate": 0.01}}, train__steps=3)
    found: list[Any] = []
    for ranks, stages in ((1, [0]), (2, [0, 1, 2, 3])):
        results = world(ranks).run(cases.stages, values, stages, timeout=120)
        assert all(result == results[0] for result in results)
        found += results[0]
    assert len(found) == 5 and all(one == found[0] for one in found)
    assert found[0][1][-1] < found[0][1][0]


def test_rows_tell_the_routers_load_over_all_ranks(world: Worlds, folder: Path) -> None:
    result = world(2).run(cases.run, table(folder, model__layers=4, train__log_every=2))[0]
    rows = [row for row in result["rows"] if row["kind"] == "step"]
    assert all(row["aux_loss"] > 0.015 for row in rows)  # two layers, weight 0.01, at least 1 but for unevenness
    told = {row["step"]: row["router"] for row in rows if "router" in row}
    assert list(told) == [1, 2, 4]
    for step, layers in told.items():
        assert [layer["layer"] for layer in layers] == [1, 3]
        for layer in layers:
            steps = 2 if step == 4 else 1
            assert sum(layer["load"]) == 8 * 32 * 2 * steps and len(layer["load"]) == 4
            assert 0 < layer["entropy"] <= 1.3863 and 0 <= layer["drop_rate"] < 0.5
            assert layer["dead"] == [number for number, count in enumerate(layer["load"]) if not count]
    start = result["rows"][0]
    assert start["model"]["moe"]["experts"] == 4
    assert start["activated"] < start["parameters"]


def test_the_reported_loss_is_the_cross_entropy_alone(world: Worlds, folder: Path) -> None:
    free = table(folder, {"balance_weight": 0.0}, train__steps=1, schedule__warmup_steps=1)
    heavy = table(folder, {"balance_weight": 5.0}, train__steps=1, schedule__warmup_steps=1, run=str(folder / "heavy"))
    (light,), (weighed,) = (world(1).run(cases.run, values) for values in (free, heavy))
    first, second = (next(row for row in one["rows"] if row["kind"] == "step") for one in (light, weighed))
    assert first["loss"] == second["loss"] and light["digest"] != weighed["digest"]
    assert first["aux_loss"] == 0 and second["aux_loss"] > 4
    start = [next(row["loss"] for row in one["rows"] if row["kind"] == "validation") for one in (light, weighed)]
    assert start[0] == start[1]


def test_resume_is_exact(world: Worlds, folder: Path) -> None:
    moe = {"gate": {"jitter": 0.1, "bias_rate": 0.01}}
    whole = table(folder, moe, train__steps=5, run=str(folder / "whole"), checkpoint__every=0)
    expected = world(1).run(cases.run, whole)[0]
    parts = table(folder, moe, train__steps=5, train__validate_every=0, checkpoint__every=3, zero__stage=3)
    assert [one[:2] for one in world(2).run(cases.interrupted, parts, 15)] == [(15, 3)] * 2
    resumed = world(1).run(cases.run, {**parts, "zero": {"stage": 1}})[0]
    assert resumed["digest"] == expected["digest"] is not None


def test_a_run_never_goes_on_with_a_gate_that_weighs_otherwise(world: Worlds, folder: Path) -> None:
    values = table(folder, train__steps=2, train__validate_every=0)
    world(1).run(cases.run, values)
    (told,) = world(1).run(cases.shape_changed, values)
    assert "model.moe.gate.score cannot change on resume" in told[0] and "'softmax' → 'sigmoid'" in told[0]
    assert "model.norm_eps cannot change on resume" in told[1]
    assert told[2] == ""


def test_padding_takes_no_place_at_an_expert(world: Worlds, folder: Path) -> None:
    """Long and short prompts side by side go on as each does alone, whatever an expert's capacity."""
    moe = {"capacity": {"factor": 0.25, "minimum": 1}, "residual": "none"}
    values = table(folder, moe, zero__stage=3, model__init_std=0.7)
    prompts = [[5], list(range(20, 44)), [7, 8], [9], list(range(30, 48)), [60, 61, 62]]
    for together, apart in world(2).run(cases.greedy, values, prompts):
        assert together == apart and any(apart)


def test_recomputation_replays_the_routing(world: Worlds, folder: Path) -> None:
    for first, second in world(2).run(cases.recomputing, table(folder, zero__stage=3)):
        assert first == second


class Fickle(nn.Module):
    """A gate that changes its mind: another choice at every call that does not say which."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate, self.calls = gate, 0

    def forward(self, x_TC: torch.Tensor, *, experts_TK: torch.Tensor | None = None, step: int | None = None) -> Any:
        if experts_TK is None:
            self.calls += 1
            experts_TK = (torch.arange(2).expand(len(x_TC), 2) + self.calls).remainder(4)
        return self.gate(x_TC, experts_TK=experts_TK, step=step)


def test_recomputation_replays_what_a_gate_would_not_choose_again() -> None:
    shape = DecoderConfig(
        vocabulary=31, dim=8, layers=2, heads=2, ffn_dim=12, init_std=0.3, moe=MoEConfig(experts=4, top_k=2)
    )
    ids = torch.randint(31, (2, 9), generator=torch.Generator().manual_seed(0))
    found: list[dict[str, torch.Tensor]] = []
    for run_block in (None, recomputed):
        model = build(shape, seed=0)
        layer = next(block.moe for block in model.blocks if isinstance(block, MoEBlock))
        layer.gate = gate = Fickle(layer.gate)
        model(ids, ids, run_block=run_block).backward()
        assert gate.calls == 1
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and any(".experts." in name for name in plain)
    for name, gradient in plain.items():
        assert torch.equal(gradient, again[name]), name


def test_tasks_are_scored_on_the_way_and_experts_told(world: Worlds, folder: Path) -> None:
    values = table(
        folder, {"gate": {"jitter": 0.1}}, tasks={"examples": 400, "names": ["add", "max"]}, data={"sequence": 32},
        report__task_prompts=4,
        report__score_every=2, report__score_prompts=2, report__html=True, train__validate_every=0,
    )  # fmt: skip
    result = world(2).run(cases.run, values, timeout=60)[0]
    scored = [row for row in result["rows"] if row["kind"] == "scores"]
    assert [row["step"] for row in scored] == [2]
    assert set(scored[0]["scores"]) == {"add", "max"}
    for found in (scored[0]["experts"], result["rows"][-1]["experts"]):
        assert {task: set(layers) for task, layers in found.items()} == {"add": {"1"}, "max": {"1"}}
        assert len(found["add"]["1"]) == 4 and sum(found["add"]["1"]) > 32 * 2
    assert sum(scored[0]["experts"]["max"]["1"]) == sum(result["rows"][-1]["experts"]["max"]["1"])
    page = (folder / "run" / "report.html").read_text()
    assert "Routers" in page and "Which expert takes which task" in page
    assert json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])["kind"] == "end"


@pytest.mark.parametrize(
    ("changed", "ranks", "message"),
    [
        ({"mesh__ep": 2}, 3, "mesh.ep=2 does not divide 3 ranks"),
        ({"mesh__ep": 8}, 8, "mesh.ep=8 ranks for 4 experts"),
        ({"mesh__ep": [2, 2]}, 2, "mesh.ep lists 2 degrees: expected one for each of 1 layers"),
    ],
)
def test_degrees_that_do_not_fit_are_refused(folder: Path, changed: dict[str, Any], ranks: int, message: str) -> None:
    config = cases.config_of(table(folder, train__batch=2 * ranks, **changed))
    with pytest.raises(ConfigError, match=message):
        config.check_ranks(ranks)


def test_degrees_without_experts_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="the model has no experts"):
        cases.config_of(cases.table(folder, mesh__ep=2)).check_ranks(2)
    with pytest.raises(ConfigError, match=r"mesh\.ep=0: expected 1 or more"):
        cases.config_of(cases.table(folder, mesh__ep=0))


def test_experts_on_two_ranks_are_the_maths_of_one(world: Worlds, folder: Path) -> None:
    values = table(folder, {"gate": {"jitter": 0.1, "bias_rate": 0.01}}, train__steps=4, model__layers=4)
    whole = world(1).run(cases.run, values)[0]
    expected = [row for row in whole["rows"] if row["kind"] == "step"]
    for stage in (0, 3):
        apart = {**values, "run": str(folder / f"apart{stage}"), "mesh": {"ep": 2}, "zero": {"stage": stage}}
        result = world(2).run(cases.run, apart)[0]
        found = [row for row in result["rows"] if row["kind"] == "step"]
        for key, tolerance in (("loss", 1e-6), ("gradient_norm", 1e-4), ("aux_loss", 1e-4)):
            assert [row[key] for row in found] == pytest.approx([row[key] for row in expected], rel=tolerance), key
        assert [row["tokens"] for row in found] == [row["tokens"] for row in expected]
        assert found[0]["sent_by_phase"]["dispatch"] > 0 and "router" in found[-1]


def test_a_run_goes_on_with_its_experts_elsewhere(world: Worlds, folder: Path) -> None:
    values = table(folder, train__steps=5, run=str(folder / "whole"), checkpoint__every=0, train__validate_every=0)
    whole = world(1).run(cases.run, values)[0]
    parts = table(folder, train__steps=5, train__validate_every=0, checkpoint__every=3, zero__stage=3, mesh__ep=2)
    assert [one[:2] for one in world(2).run(cases.interrupted, parts, 15)] == [(15, 3)] * 2
    resumed = world(1).run(cases.run, {**parts, "mesh": {"ep": 1}, "zero": {"stage": 1}})[0]
    losses = [[row["loss"] for row in one["rows"] if row["kind"] == "step"] for one in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
