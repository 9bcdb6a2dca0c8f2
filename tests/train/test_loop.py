"""The training loop on real ranks: equal bits for equal batches, exact resume, validation, policies."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.train import cases
from tests.worlds import Worlds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    cases.words(tmp_path)
    return tmp_path


def test_runs_of_equal_batch_have_equal_bits_at_every_stage(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=3)
    found: list[Any] = []
    for ranks in (1, 2, 4):
        results = world(ranks).run(cases.stages, values, [0, 1, 2, 3], timeout=120)
        assert all(result == results[0] for result in results)
        found += results[0]
    assert len(found) == 12
    assert all(one == found[0] for one in found)
    assert found[0][1][-1] < found[0][1][0] and math.isfinite(found[0][2])


def test_other_batches_give_other_bits(world: Worlds, folder: Path) -> None:
    one = world(1).run(cases.stages, cases.table(folder, train__batch=8), [0])[0]
    other = world(1).run(cases.stages, cases.table(folder, train__batch=4), [0])[0]
    assert one[0][0] != other[0][0]


def test_resume_on_another_number_of_ranks_and_stage_is_exact(world: Worlds, folder: Path) -> None:
    whole = cases.table(folder, train__steps=5, run=str(folder / "whole"), checkpoint__every=0)
    expected = world(1).run(cases.run, whole)[0]
    parts = cases.table(folder, train__steps=5, checkpoint__every=3, zero__stage=3)
    stopped = world(2).run(cases.interrupted, {**parts, "train": {**parts["train"], "validate_every": 0}}, 15)
    assert [one[:2] for one in stopped] == [(15, 3)] * 2
    resumed = world(4).run(cases.run, {**parts, "zero": {"stage": 1}})[0]
    assert resumed["digest"] == expected["digest"] is not None
    assert resumed["validation"] == expected["validation"]
    kinds = [(row["kind"], row["step"]) for row in resumed["rows"] if row["kind"] == "step"]
    assert kinds == [("step", step) for step in (1, 2, 3, 4, 5)]
    losses = [row["loss"] for row in resumed["rows"] if row["kind"] == "step"]
    assert losses == [row["loss"] for row in expected["rows"] if row["kind"] == "step"]


def test_a_finished_run_has_nothing_left_to_do(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=2)
    first = world(1).run(cases.run, values)[0]
    again = world(1).run(cases.run, values)[0]
    assert (again["steps"], again["digest"], again["loss"]) == (2, first["digest"], None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_on_one_rank_stops_all_after_the_step_and_saves(
    world: Worlds, folder: Path, number: signal.Signals
) -> None:
    values = cases.table(folder, train__steps=50, checkpoint__every=0)
    for got, steps, name in world(2).run(cases.interrupted, values, int(number)):
        assert (got, steps, name) == (int(number), 3, "step-00000003")
    assert (folder / "run" / "step-00000003" / "manifest.json").exists()


def test_rows_of_metrics_hold_what_is_promised(world: Worlds, folder: Path) -> None:
    world(2).run(cases.run, cases.table(folder))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows].count("step") == 4
    assert {row["kind"] for row in rows} == {"start", "step", "validation", "save", "end"}
    start = rows[0]
    assert start["ranks"] == 2 and start["accumulation"] == 2 and start["peak_flops"] > 0
    assert start["unigram"] > start["bigram"] > 0
    step = next(row for row in rows if row["kind"] == "step" and row["step"] == 2)
    assert set(step) == {
        "kind", "time", "step", "loss", "lr", "gradient_norm", "tokens", "epoch", "step_s", "tokens_per_s",
        "flops_per_s", "flops_share", "sent_bytes", "payload_bytes", "sent_by_phase", "calls", "waited_s", "memory",
        "process", "skipped", "loss_scale", "detours",
    }  # fmt: skip
    assert [row["detours"] for row in rows if row["kind"] == "step"][1:] == [0, 0, 0]
    assert step["sent_bytes"] > step["payload_bytes"] > 0 and step["tokens_per_s"] > 0
    assert step["sent_bytes"] == sum(step["sent_by_phase"].values())
    assert {"parameters", "gradients", "optimizer", "gathered", "buffers"} <= set(step["memory"])
    assert len(step["process"]) == 2 and all(one["rss_bytes"] > 0 for one in step["process"])
    assert step["tokens"] <= 8 * 32


def test_validation_text_is_held_out_and_scored_alike_on_any_ranks(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=2, train__validation_batches=0)
    found = {ranks: world(ranks).run(cases.run, {**values, "run": str(folder / f"run{ranks}")}) for ranks in (1, 2, 4)}
    assert len({result["validation"] for results in found.values() for result in results}) == 1


def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_step_on_all(world: Worlds, folder: Path) -> None:
    for stage in (0, 3):
        results = world(2).run(cases.poisoned, cases.table(folder, zero__stage=stage))
        for result in results:
            assert result["finite"] == result["counted"] == [True, False, True]
            assert result["hashes"][0] == result["hashes"][1] != result["hashes"][2]
            assert math.isnan(result["norms"][1]) and result["in_a_row"] == 0


@pytest.mark.parametrize(("policy", "count"), [("skip", 3), ("stop", 1), ("dump", 1)])
def test_the_run_stops_with_a_report_of_each_parameter(world: Worlds, folder: Path, policy: str, count: int) -> None:
    values = cases.table(folder, train__on_nonfinite=policy, train__max_nonfinite=3)
    for text, weights in world(2).run(cases.poisoned_for_good, values):
        assert text.startswith("NonFiniteError") and f"{count} in a row" in text and weights == "same"
        assert "blocks.1.mlp.up.weight: " in text and "not finite on rank 1" in text and "rank 0\n" not in text
    dumps = list((folder / "run").glob("nonfinite-step-*/report.json"))
    assert len(dumps) == (policy == "dump")
    if dumps:
        body = json.loads(dumps[0].read_text())
        assert len(body["ranks"]) == 2 and body["ranks"][0][0]["tokens"]


def test_a_step_without_targets_is_skipped(world: Worlds, folder: Path) -> None:
    assert world(2).run(cases.silent_step, cases.table(folder)) == [(False, True, 0)] * 2


def test_recomputation_changes_no_bit(world: Worlds, folder: Path) -> None:
    one, other = world(2).run(cases.recomputing, cases.table(folder))[0]
    assert one == other


def test_half_precision_learns(world: Worlds, folder: Path) -> None:
    assert world(2).run(cases.halves, cases.table(folder, optimizer__lr=3e-3)) == [[True, True]] * 2


def test_greedy_text_is_the_same_in_a_batch_and_alone(world: Worlds, folder: Path) -> None:
    prompts = [[10, 11, 12], [20], [30, 31, 32, 33, 34], [40, 41], [50, 60]]
    values = cases.table(folder)
    everyone = world(2).run(cases.greedy, values, prompts)
    for together, apart in everyone:
        assert together == apart and all(len(ids) <= 5 for ids in together)
    alone = world(1).run(cases.greedy, values, prompts)[0][0]
    assert alone == [everyone[i % 2][0][i // 2] for i in range(5)]


def test_a_run_starts_from_a_hugging_face_folder(world: Worlds, folder: Path) -> None:
    exported = folder / "exported"
    for one, other, shape in world(2).run(cases.from_hugging_face, cases.table(folder), str(exported)):
        assert one == other and shape[:2] == [32, 2]


def test_its_tokenizer_comes_with_it(world: Worlds, folder: Path) -> None:
    ((found, told),) = world(1).run(cases.foreign_tokenizer, cases.table(folder), str(folder / "exported"))
    assert found == [True, True]
    assert "holds no tokenizer.json" in told and "set data.tokenizer" in told


def test_text_beside_tasks_is_told_to_be_without_effect(world: Worlds, tmp_path: Path) -> None:
    values = cases.table(tmp_path, tasks={"names": ["max"], "examples": 100, "digits": 1})
    values["data"] = {"sequence": 32, "paths": ["/no/such"], "tokenizer": "/no/such"}
    (said,) = world(1).run(cases.ignored, values)
    assert "data.paths, data.tokenizer: without effect" in said


@pytest.mark.parametrize(
    ("prompt", "told"),
    [("Hello!", "'H' is not in the vocabulary"), ("max " + "1 " * 2000, "expected 1 to max_positions")],
)
def test_a_prompt_that_cannot_be_asked_is_refused_before_the_first_step(
    world: Worlds, tmp_path: Path, prompt: str, told: str
) -> None:
    values = cases.table(tmp_path, tasks={"names": ["max"], "examples": 200, "digits": 1}, data={"sequence": 32})
    values["report"] = {"html": False, "prompts": ["max 1 2>", prompt]}
    kind, code, text = world(1).run(cases.refused, values)[0]
    assert (kind, code) == ("ConfigError", 2) and "report.prompts[1]" in text and told in text
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_tasks_are_learned_from_and_scored(world: Worlds, tmp_path: Path) -> None:
    values = cases.table(
        tmp_path,
        tasks={"names": ["max"], "examples": 400, "digits": 1},
        data={"sequence": 32},
        train__steps=2,
        train__validate_every=0,
        report={"html": False, "task_prompts": 4, "prompts": ["max 1 2>"]},
    )
    result = world(2).run(cases.run, values)[0]
    assert set(result["scores"]) == {"max"} and 0 <= result["scores"]["max"] <= 1
    assert result["samples"][0][0] == "max 1 2>" and isinstance(result["samples"][0][1], str)


def test_resume_must_never_starts_from_scratch(world: Worlds, folder: Path) -> None:
    for kind, code, text in world(2).run(cases.refused, cases.table(folder, checkpoint__resume="must")):
        assert code in (5, 1), (kind, text)
        assert "resume=must, but there is no complete checkpoint" in text


def test_resume_never_refuses_a_folder_with_a_run(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=2)
    world(1).run(cases.run, values)
    kind, code, text = world(1).run(cases.refused, {**values, "checkpoint": {"resume": "never"}})[0]
    assert (kind, code) == ("ConfigError", 2) and "step-00000002" in text and "--run" in text


@pytest.mark.parametrize(
    ("change", "named"),
    [({"model__dim": 64}, "model.dim"), ({"train__micro_batch": 4}, "train.micro_batch"), ({"train__seed": 5}, "seed")],
)
def test_a_resumed_run_may_not_be_another(world: Worlds, folder: Path, change: dict[str, Any], named: str) -> None:
    world(1).run(cases.run, cases.table(folder, train__steps=2))
    kind, code, text = world(1).run(cases.refused, cases.table(folder, train__steps=3, **change))[0]
    assert (kind, code) == ("CheckpointError", 5) and named in text and "→" in text


def test_a_resumed_run_may_learn_at_another_rate(world: Worlds, folder: Path) -> None:
    world(1).run(cases.run, cases.table(folder, train__steps=2))
    result = world(1).run(
        cases.run, cases.table(folder, train__steps=3, optimizer__lr=0.5, schedule={"kind": "constant"})
    )[0]
    assert [row["lr"] for row in result["rows"] if row["kind"] == "step"][-1] == 0.5


def test_a_damaged_checkpoint_is_passed_over(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=4)
    world(1).run(cases.run, values)
    shard = folder / "run" / "step-00000004" / "rank-00000.safetensors"
    if not shard.exists():
        shard = next((folder / "run" / "step-00000004").glob("rank-*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data))
    result = world(1).run(cases.run, values)[0]
    assert result["steps"] == 4 and result["loss"] is not None


def test_when_all_are_damaged_the_way_out_is_one_that_works(world: Worlds, folder: Path) -> None:
    values = cases.table(folder, train__steps=2)
    world(1).run(cases.run, values)
    for shard in (folder / "run").glob("step-*/rank-*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-5] ^= 1
        shard.write_bytes(bytes(data))
    kind, _, text = world(1).run(cases.refused, cases.table(folder, train__steps=3))[0]
    assert kind == "CheckpointError" and "are damaged" in text and "another folder (trivium train: --run)" in text
    assert "resume=never" not in text


def test_a_folder_that_cannot_be_written_is_refused_before_the_first_step(world: Worlds, folder: Path) -> None:
    (folder / "file").write_text("")
    kind, code, text = world(1).run(cases.refused, cases.table(folder, run=str(folder / "file")))[0]
    assert (kind, code) == ("ConfigError", 2) and "file" in text
