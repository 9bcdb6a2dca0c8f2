"""``trivium plan`` as it is typed; row C11 of the fault matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.plan.terminal import trivium, trivium_json
from trivium.base.config import load
from trivium.models import preset
from trivium.plan import Batch, Setting, forecast, inventory_of
from trivium.plan.configured import decoder_of, plan_run
from trivium.train.config import TrainConfig
from trivium.zero import ZeroConfig

CONFIG = """
[model]
preset = "1m"

[data]
vocabulary = 2048
sequence = 64

[zero]
stage = 2

[train]
micro_batch = 4
batch = 16
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "a run.toml"
    path.write_text(CONFIG)
    return str(path)


def test_a_preset_shows_all_stages(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = trivium(capsys, "plan", "--preset", "7.5b", "--ranks", "64")
    assert code == 0
    states = next(line for line in out.splitlines() if "model states" in line)
    assert states.replace(" ", "") == "│=modelstates│120.02GB│31.41GB│16.64GB│1.88GB│"
    assert "2.00 Ψ" in out and "2.98 Ψ" in out
    assert max(map(len, out.splitlines())) <= 120


def test_json_is_the_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    code, data = trivium_json(capsys, "plan", "--preset", "34m", "--ranks", "4", "--stage", "1", "--dtype", "float32")
    assert code == 0
    (found,) = data["plans"]
    plan = forecast(inventory_of(preset("34m")), Setting(ranks=4, zero=ZeroConfig(stage=1)), preset("34m"))
    assert found == {**plan.to_dict(), "fits": True}


def test_a_configuration_is_planned_as_it_will_run(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, data = trivium_json(capsys, "plan", config, "--ranks", "2")
    assert code == 0
    (found,) = data["plans"]
    assert (found["stage"], found["ranks"], found["micro_batch"], found["accumulation"]) == (2, 2, 4, 2)
    assert (found["sequence"], found["dtype"], found["parameters"]) == (64, "float32", preset("1m").num_parameters())
    assert found["memory_bytes"]["sums"] == 0  # the trainer sums: it never averages


def test_options_are_the_configuration_s_own_keys(capsys: pytest.CaptureFixture[str], config: str) -> None:
    arguments = ("--stage", "3", "--micro-batch", "2", "--set", "zero.bucket_bytes=65536", "--dtype", "bfloat16")
    code, data = trivium_json(capsys, "plan", config, "--ranks", "2", *arguments, "--recompute")
    (found,) = data["plans"]
    assert code == 0
    assert (found["stage"], found["micro_batch"], found["accumulation"]) == (3, 2, 4)
    assert found["dtype"] == "bfloat16" and found["recompute"]
    assert 0 < found["memory_bytes"]["buffers"] <= 2 * 65536
    code, _, err = trivium(capsys, "plan", config, "--ranks", "3")
    assert code == 2 and "nearest" in err


def test_too_big_is_exit_4_with_the_largest_that_fits_and_three_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = trivium(capsys, "plan", "--preset", "13b", "--ranks", "8", "--memory", "16GB")
    assert code == 4
    assert "│ fits 16.00 GB" in out
    lines = err.splitlines()
    assert lines[0].startswith("error: does not fit: ") and "16.00 GB" in lines[0]
    assert sum(line.startswith("  option: ") and " GB" in line for line in lines) == 3
    assert any(line.startswith("  largest preset that fits with this setting: 1.3b") for line in lines)


def test_json_says_that_it_does_not_fit(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, data = trivium_json(capsys, "plan", config, "--memory", "1MiB")
    assert code == 4
    assert not data["plans"][0]["fits"] and data["memory_bytes"] == 2**20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to plan"),
        (("--preset", "7.5"), "did you mean"),
        (("--preset", "1m", "--stage", "4"), "zero.stage=4: expected 0 to 3"),
        (("--preset", "1m", "--ranks", "0"), "ranks=0: expected at least 1"),
        (("--preset", "1m", "--memory", "80XB"), "80GB"),
        (("--preset", "1m", "--dtype", "int8"), "float32, bfloat16, float16"),
        (("--preset", "1m", "--sequence", "4096"), "max_positions=2048"),
        (("--preset", "1m", "--set", "zero.stage=1"), "no effect"),
        (("--preset", "1m", "--quantize", "int8"), "--quantize: no effect"),
        (("--preset", "1m", "--cache-dtype", "int8"), "--cache-dtype: no effect"),
        (("--paper", "--stage", "0"), "--stage: no effect with --paper"),
        (("--serve", "x", "--ranks", "4", "--micro-batch", "2", "--recompute"), "--ranks, --micro-batch, --recompute:"),
        (("--serve", "x", "--set", "zero.stage=1"), "--set: no effect with --serve"),
        (("missing.toml",), "missing.toml"),
    ],
)
def test_wrong_usage_is_exit_2(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    code, out, err = trivium(capsys, "plan", *arguments)
    assert code == 2
    assert said in err and out == ""


def test_both_a_configuration_and_a_preset(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, _, err = trivium(capsys, "plan", config, "--preset", "1m")
    assert code == 2 and "say what to plan" in err
    code, _, err = trivium(capsys, "plan", config, "--set", "zero.stge=1")
    assert code == 2 and "did you mean" in err


def test_a_teacher_is_not_planned_and_the_plan_says_so(capsys: pytest.CaptureFixture[str], config: str) -> None:
    code, _, err = trivium(capsys, "plan", config, "--json")
    assert code == 0 and "teacher" not in err
    code, out, err = trivium(capsys, "plan", config, "--json", "--set", "distill.teacher=runs/teacher")
    assert code == 0 and "the plan is of the student alone" in err and out.startswith("{")


def test_the_trainer_plans_itself_with_the_model_it_built(config: str) -> None:
    settings = load(TrainConfig, config)
    shape = replace(decoder_of(settings), vocabulary=1000)
    plan = plan_run(settings, shape, ranks=2, rank=1)
    assert plan.num_parameters == shape.num_parameters()
    assert (plan.setting.rank, plan.setting.accumulation, plan.setting.zero.average) == (1, 2, False)
    assert plan.setting.batch == Batch(rows=4, sequence=64, documents=True)


@pytest.mark.parametrize(
    ("name", "billions"), [("pr-moe-350m-32/64", 4.12), ("mos-350m-32/64", 3.54), ("moe-1.3b-128", 52.47)]
)
def test_the_papers_moe_models_are_planned(name: str, billions: float, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ("plan", "--preset", name, "--ranks", "64", "--ep", "32", "--stage", "1")
    code, data = trivium_json(capsys, *wanted)
    (plan,) = data["plans"]
    assert plan["parameters"] / 1e9 == pytest.approx(billions, rel=0.005)
    assert plan["ep"] == 32 and plan["sent_bytes"]["by_phase"]["dispatch"] > 0
    again, told, _ = trivium(capsys, *wanted)
    assert code == again == 0 and "rows to experts" in told and "for each token, ep 32" in told
