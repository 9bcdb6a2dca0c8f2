"""``trivium bench quality``: its runs are paired and kept, its statistics are right, its report says what they show."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from trivium.base import config as configs
from trivium.base.errors import ConfigError, DataError, TriviumError
from trivium.bench import quality_runs
from trivium.bench.quality import lines, paired, reached, report
from trivium.bench.quality_plot import plot
from trivium.bench.quality_runs import ARMS, CLAIMS, QualityBench, finished, train_all
from trivium.cli.main import run as command_line

CONFIGS = Path(__file__).parents[2] / "configs" / "quality"
TINY = (
    "train.steps=3", "train.validate_every=2", "train.validation_batches=2", "train.micro_batch=2",
    "schedule.warmup_steps=1", "model.dim=16", "model.heads=2", "model.ffn_dim=16", "data.limit_bytes=60000",
    "data.vocabulary=300", "data.sequence=16",
)  # fmt: skip


def bench(folder: Path, **more: Any) -> QualityBench:
    return QualityBench(configs=CONFIGS, folder=folder, **{"seeds": 1, "overrides": TINY, **more})


def curve(*losses: float) -> dict[str, Any]:
    return {
        "parameters": 100, "activated": 50, "config": {}, "command": "trivium train", "text": "one file",
        "unigram": 6.0, "bigram": 4.0, "cpu_s": 1.0, "wall_s": 2.0, "lives": 1, "distilled": [], "skipped": 0,
        "validation": [[50 * index, loss] for index, loss in enumerate(losses)],
    }  # fmt: skip


def test_the_studys_models_are_what_the_claims_compare() -> None:
    shapes = {arm: bench(Path("x"), overrides=()).config(arm, 0).model.decoder(2048) for arm in ARMS}
    activated = {arm: shape.num_activated_parameters() for arm, shape in shapes.items()}
    routers = 2 * 128 * 16
    assert activated["moe"] == activated["dense"] + routers
    assert activated["pr-moe-narrow"] == activated["dense"] + 128 * (4 + 8)
    assert activated["pr-moe"] == activated["pr-moe-narrow"] + 2 * 3 * 128 * 352  # the whole MLP beside whole experts
    assert shapes["moe"].num_experts == (0, 16, 0, 16) and shapes["pr-moe"].num_experts == (0, 4, 0, 8)
    for name in ("student-staged", "student-alone", "student-full"):
        assert shapes[name] == shapes["student-staged"] and shapes[name].layers == shapes["pr-moe"].layers - 1


def test_arms_differ_in_nothing_but_their_claim() -> None:
    whole = bench(Path("runs/quality"), overrides=())
    base = whole.config("dense", 1)
    for arm in ARMS:
        changed = configs.diff(base, whole.config(arm, 1))
        assert {key for key in changed if key.split(".")[0] not in ("model", "distill")} <= {"run"}
        if ARMS[arm].teacher is None:
            assert {key for key in changed if key.startswith("model.")} <= {
                key for key in changed if key.startswith("model.moe")
            }
    stops = [whole.config(arm, 1).distill for arm in CLAIMS["c"][1:]]
    assert [one and one.stop for one in stops] == [0.7, 0, "never"]
    assert all(one and one.teacher == "runs/quality/pr-moe-seed1" and one.init == "fresh" for one in stops)


def test_runs_of_a_seed_begin_with_the_same_weights(world: Any) -> None:
    shapes = {arm: bench(Path("x")).config(arm, 0).model.decoder(300) for arm in ("dense", "moe", "pr-moe")}
    found = world(1).run("tests.bench.quality_cases", "beginnings", shapes, 5)[0]
    other = world(1).run("tests.bench.quality_cases", "beginnings", {"moe": shapes["moe"]}, 6)[0]
    assert not found["moe"]["embed.weight"].equal(other["moe"]["embed.weight"])
    for arm in ("moe", "pr-moe"):
        shared = [name for name in found["dense"] if name in found[arm]]
        assert len(shared) > 30 and all(found["dense"][name].equal(found[arm][name]) for name in shared)


def test_runs_follow_their_teacher_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_runs, "CLAIMS", {"c": ("pr-moe", "student-staged")})
    said: list[str] = []
    made = train_all(bench(tmp_path, claims=("c",), jobs=2), said.append)
    assert sorted(said) == ["pr-moe, seed 0", "student-staged, seed 0"]
    teacher, student = made["pr-moe"][0], made["student-staged"][0]
    assert teacher["distilled"] == [] and student["distilled"] == [2]
    assert student["parameters"] < teacher["parameters"]
    for one in (teacher, student):
        assert [step for step, _ in one["validation"]] == [0, 2, 3] and one["cpu_s"] > 0 and one["lives"] == 1
        assert one["validation"][0][1] == pytest.approx(math.log(300), rel=0.05)
        assert one["validation"][-1][1] < one["validation"][0][1]

    again: list[str] = []
    assert train_all(bench(tmp_path, claims=("c",)), again.append) == made and again == []
    with pytest.raises(ConfigError, match=r"train.steps: 3 there, 4 now.*another --folder"):
        finished(bench(tmp_path, claims=("c",), overrides=(*TINY, "train.steps=4")), "pr-moe", 0)
    for text in ("{", "[]", '{"schema": 0}'):
        (tmp_path / "pr-moe-seed0.json").write_text(text)
        with pytest.raises(DataError, match="remove it"):
            finished(bench(tmp_path, claims=("c",)), "pr-moe", 0)


def test_a_run_that_fails_is_named_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_runs, "CLAIMS", {"a": ("dense",)})
    (tmp_path / "dense-seed0").write_text("in the way")
    with pytest.raises(TriviumError, match=r"the run dense of seed 0 ended with code [1-9]") as caught:
        train_all(bench(tmp_path, claims=("a",)), lambda line: None)
    assert "dense-seed0.log:\n" in str(caught.value) and "Traceback" not in str(caught.value)
    assert not (tmp_path / "dense-seed0.json").exists()


def test_a_mean_is_resolved_when_its_interval_leaves_zero_out() -> None:
    one = paired([0.1, 0.2, 0.3])
    assert one["mean"] == pytest.approx(0.2) and one["deviation"] == pytest.approx(0.1)
    assert one["interval"] == pytest.approx([0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5], abs=1e-5)
    assert not one["resolved"]  # all of one sign, and yet too far apart for three
    assert paired([0.19, 0.2, 0.21])["resolved"] and paired([-0.19, -0.2, -0.21])["resolved"]
    assert not paired([5.0])["resolved"] and paired([5.0])["interval"] is None
    for count in (0, 12):
        with pytest.raises(ConfigError, match=f"{count} seeds"):
            paired([1.0] * count)


def test_when_a_curve_reaches_a_loss() -> None:
    falling = [[0, 8.0], [50, 6.0], [100, 5.0], [150, 5.5], [200, 4.0]]
    assert reached(falling, 7.0) == 25.0 and reached(falling, 5.0) == 100.0 and reached(falling, 9.0) == 0.0
    assert reached(falling, 4.5) == pytest.approx(150 + 50 / 1.5) and reached(falling, 3.0) is None
    assert reached([], 1.0) is None


def test_the_report_tells_steps_gaps_and_verdicts(tmp_path: Path) -> None:
    found = {
        "dense": {0: curve(8, 6, 5), 1: curve(8, 6, 5.1), 2: curve(8, 6, 4.9)},
        "moe": {0: curve(8, 5, 4), 1: curve(8, 5.1, 4.1), 2: curve(8, 4.9, 3.9)},
        "pr-moe": {0: curve(8, 6, 4.1), 1: curve(8, 6, 3.9), 2: curve(8, 6, 4.05)},
        "pr-moe-narrow": {0: curve(8, 6, 4.5), 1: curve(8, 6, 4.6), 2: curve(8, 6, 4.4)},
    }
    made = report(QualityBench(claims=("a", "b"), seeds=3), found, "trivium bench quality", {})
    json.dumps(made, allow_nan=False)
    a, b = made["claims"]["a"], made["claims"]["b"]
    assert [one["moe"] for one in a["steps"].values()] == [50.0, 50.0, 50.0] and a["fewer_steps"]["mean"] == 2.0
    assert a["gaps"]["moe - dense"]["mean"] == pytest.approx(-1.0) and a["gaps"]["moe - dense"]["resolved"]
    assert not b["gaps"]["pr-moe - moe"]["resolved"] and b["gaps"]["pr-moe-narrow - moe"]["resolved"]
    told = "\n".join(lines(made))
    assert "2.00 times fewer" in told and "not resolved at this scale" in told and "moe - dense: -1.0000" in told
    found["moe"][1] = curve(8, 7, 6)
    late = report(QualityBench(claims=("a",), seeds=3), found, "", {})
    assert late["claims"]["a"]["fewer_steps"] is None and late["claims"]["a"]["steps"]["1"]["moe"] is None
    for ending in ("svg", "png"):
        plot(made, tmp_path / f"x.{ending}")
        assert (tmp_path / f"x.{ending}").stat().st_size > 1000
    with pytest.raises(ConfigError, match=r"\.svg, \.png or \.pdf"):
        plot(made, tmp_path / "x.txt")
    assert "not for every seed" in "\n".join(lines(late)) and "not within of 100" in "\n".join(lines(late))


def test_students_are_held_against_each_other_and_their_teacher(tmp_path: Path) -> None:
    losses = {"pr-moe": 4.0, "student-staged": 4.2, "student-alone": 4.5, "student-full": 4.3}
    found = {arm: {seed: curve(8, loss + seed / 100) for seed in range(3)} for arm, loss in losses.items()}
    made = report(QualityBench(claims=("c",), seeds=3), found, "", {})
    gaps = {name: gap["mean"] for name, gap in made["claims"]["c"]["gaps"].items()}
    assert gaps == pytest.approx(
        {
            "student-staged - student-alone": -0.3,
            "student-staged - student-full": -0.1,
            "student-full - student-alone": -0.2,
            "student-staged - pr-moe": 0.2,
        }
    )
    plot(made, tmp_path / "x.svg")
    one = report(QualityBench(claims=("c",), seeds=1), {arm: {0: by[0]} for arm, by in found.items()}, "", {})
    assert not any(gap["resolved"] for gap in one["claims"]["c"]["gaps"].values())  # one seed has no spread
    assert "±" not in "".join(lines(one)) and "±" in "".join(lines(made))


def test_teachers_come_before_students_and_claims_share_runs() -> None:
    arms = list(ARMS)
    assert all(arms.index(one.teacher) < arms.index(arm) for arm, one in ARMS.items() if one.teacher)
    assert QualityBench(claims=("a", "b")).arms == ("dense", "moe", "pr-moe", "pr-moe-narrow")
    assert set(QualityBench().arms) == set(arms) == {arm for group in CLAIMS.values() for arm in group}
    assert {quality_runs.ARMS[arm].config for arm in arms} == {path.name for path in CONFIGS.glob("*.toml")}


def test_settings_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        ({"claims": ("d",)}, "claim 'd'"),
        ({"claims": ()}, "no claim"),
        ({"seeds": 0}, "seeds=0"),
        ({"seeds": 11}, "seeds=11: expected 1 to 10"),
        ({"jobs": 0}, "jobs=0"),
    ):
        with pytest.raises(ConfigError, match=words):
            QualityBench(**options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"dense.toml does not exist.*--configs"):
        QualityBench(configs=tmp_path).config("dense", 0)
    assert command_line(["bench", "quality", "--claim", "z"]) == 2
    assert command_line(["bench", "quality", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert "does not exist" in capsys.readouterr().err
