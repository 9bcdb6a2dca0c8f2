"""Distillation: when its stage ends, whose layers a student begins as, the rule's cosine, resume, what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train import cases, distill_cases
from tests.worlds import Worlds
from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig, MoEConfig
from trivium.moe import GateConfig
from trivium.train.config import DistillConfig
from trivium.train.distill import Stage
from trivium.train.layers import pair_layers

SHAPE = DecoderConfig(vocabulary=50, dim=8, layers=4, heads=2, ffn_dim=12)


def stage(steps: int = 100, **options: Any) -> Stage:
    return Stage(config=DistillConfig(teacher="t", **options), steps=steps)


@pytest.mark.parametrize(("stop", "last"), [(30, 30), (0.4, 40), ("never", None), (0, 0), (0.0, 0), (200, 200)])
def test_a_given_end_is_kept(stop: Any, last: int | None) -> None:
    one = stage(stop=stop)
    assert one.last == last and not one.checks(50)
    ended = [done for done in range(1, 101) if one.after(done)]
    expected = [] if last is None or last > 100 else [max(last, 1)]
    assert ended == expected[:1] and one.stopped == (expected[0] if expected else None)


def test_auto_waits_for_a_conflict_that_stays() -> None:
    one = stage(stop="auto", check_every=10, patience=2, conflict=0.1)
    assert [done for done in range(1, 31) if one.checks(done)] == [10, 20, 30]
    seen = [one.after(10 * number, cosine) for number, cosine in enumerate((0.5, 0.1, 0.2, 0.0, -0.3, 0.9), 1)]
    assert seen == [False, False, False, False, True, False]
    assert one.stopped == 50 and not one.checks(60)
    assert not any(one.after(done) for done in range(51, 60))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": 1.0}, "distill.stop=1.0"),
        ({"stop": -1}, "distill.stop=-1"),
        ({"stop": "later"}, "distill.stop='later': expected auto, never"),
        ({"alpha": -1.0}, "distill.alpha=-1.0"),
        ({"temperature": 0.0}, "distill.temperature=0.0"),
        ({"patience": 0}, "distill.patience=0"),
        ({"conflict": 1.0}, "distill.conflict=1.0"),
        ({"init": "fresh", "layers": (0,)}, "leave one out"),
        ({"teacher": ""}, "distill.teacher is empty"),
    ],
)
def test_tables_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{"teacher": "t", **options})


def shaped(experts: tuple[int, ...]) -> DecoderConfig:
    places = tuple(place for place, count in enumerate(experts) if count)
    moe = MoEConfig(experts=tuple(count for count in experts if count), layers=places) if places else None
    return replace(SHAPE, layers=len(experts), moe=moe)


@pytest.mark.parametrize(
    ("given", "wanted", "chosen"),
    [
        ((0,) * 4, (0,) * 2, (0, 3)),
        ((0,) * 6, (0,) * 3, (0, 2, 5)),
        ((0, 2, 0, 2), (0, 2), (0, 3)),
        ((0, 2, 0, 4), (0, 4), (0, 3)),
        ((0, 32) * 10 + (0, 64) * 2, (0, 32) * 8 + (0, 64) * 2 + (0,), None),
        ((0, 2), (0, 2), (0, 1)),
        ((0, 2, 0, 2), (0,), (0,)),
    ],
)
def test_layers_are_spread_over_those_that_fit(given: Any, wanted: Any, chosen: Any) -> None:
    if chosen is None:
        with pytest.raises(ConfigError, match="no ascending choice"):
            pair_layers(shaped(given), shaped(wanted))
        return
    assert pair_layers(shaped(given), shaped(wanted)) == chosen


def test_the_papers_student_finds_its_layers() -> None:
    from trivium.models import preset

    teacher, student = preset("pr-moe-350m-32/64"), preset("mos-350m-32/64")
    found = pair_layers(teacher, student)
    assert len(found) == 21 and found[0] == 0 and found[-1] == 23 and list(found) == sorted(set(found))
    assert [teacher.num_experts[layer] for layer in found] == list(student.num_experts)


@pytest.mark.parametrize(
    ("layers", "message"),
    [((0,), "expected one of the teacher's layers 0 to 3 for each"), ((0, 4), "0 to 3"), ((0, 2), "has 2 experts")],
)
def test_chosen_layers_must_exist_and_fit(layers: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pair_layers(shaped((0, 2, 0, 2)), shaped((0, 2)), layers)
    assert pair_layers(shaped((0, 2, 0, 2)), shaped((0, 2)), (2, 1)) == (2, 1)


def test_widths_must_be_equal_to_begin_as_layers() -> None:
    with pytest.raises(ConfigError, match="the teacher has dim=8, the student 16"):
        pair_layers(SHAPE, replace(SHAPE, dim=16))
    with pytest.raises(ConfigError, match=r"moe\.residual=none, the student add"):
        pair_layers(shaped((0, 2)), replace(SHAPE, layers=2, moe=MoEConfig(experts=2, residual="add")))


@pytest.mark.parametrize(
    "gate", [GateConfig(score="sigmoid"), GateConfig(scale=2.5), GateConfig(num_groups=1, top_groups=1)]
)
def test_gates_must_weigh_alike_to_begin_as_layers(gate: GateConfig) -> None:
    theirs, ours = (replace(SHAPE, moe=MoEConfig(experts=4, gate=one)) for one in (GateConfig(), gate))
    with pytest.raises(ConfigError, match=r"the teacher has moe\.gate\."):
        pair_layers(theirs, ours)
    said = replace(SHAPE, moe=MoEConfig(experts=4, top_k=2, gate=GateConfig(renormalize=True)))
    assert pair_layers(replace(SHAPE, moe=MoEConfig(experts=4, top_k=2)), said) == (0, 1, 2, 3)
    with pytest.raises(ConfigError, match=r"moe\.gate\.renormalize=False, the student True"):
        pair_layers(theirs, replace(SHAPE, moe=MoEConfig(experts=4, top_k=2)))
    noisy = replace(SHAPE, moe=MoEConfig(experts=4, gate=GateConfig(jitter=0.1, bias_rate=0.01)))
    assert pair_layers(theirs, noisy) == (0, 1, 2, 3)  # what it draws and learns in training is its own


MOE = {"experts": 4, "top_k": 1, "ffn_dim": 24, "residual": "add"}


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, world: Worlds) -> Path:
    """A folder with text and two teachers: one that has learnt, and one that has only begun."""
    folder = tmp_path_factory.mktemp("school")
    cases.words(folder)
    for name, steps in (("teacher", 25), ("beginner", 2)):
        world(1).run(distill_cases.teach, table(folder, name, steps, layers=4))
    return folder


def table(folder: Path, run: str, steps: int, layers: int = 2, **changed: Any) -> dict[str, Any]:
    return cases.table(
        folder, run=str(folder / run), train__steps=steps, model__layers=layers, model__moe=MOE,
        train__validate_every=steps, checkpoint__every=0, optimizer__lr=1e-2, **changed,
    )  # fmt: skip


def student(folder: Path, run: str, steps: int, teacher: str = "teacher", **changed: Any) -> dict[str, Any]:
    distill = {"teacher": str(folder / teacher), **changed.pop("distill", {})}
    return table(folder, run, steps, distill=distill, **changed)


def test_a_student_distils_then_goes_on_alone(world: Worlds, school: Path) -> None:
    values = student(school, "staged", 6, distill={"stop": 4}, zero__stage=3)
    result = world(2).run(distill_cases.study, values)[0]
    steps = [row for row in result["rows"] if row["kind"] == "step"]
    assert [("divergence" in row) for row in steps] == [True] * 4 + [False] * 2
    assert all(row["divergence"] > 0 and row["aux_loss"] > 0 for row in steps[:4])
    told = [row for row in result["rows"] if row["kind"] == "objective"]
    assert [(row["step"], row["ended"], row["agreement"]) for row in told] == [(4, True, None)]
    told_in_html = {**values, "run": str(school / "staged-one"), "report": {"html": True}}
    one = world(1).run(distill_cases.study, told_in_html)[0]
    assert one["digest"] == result["digest"]
    page = (school / "staged-one" / "report.html").read_text()
    assert "Distillation" in page and "ended after step 4" in page


def test_the_teacher_s_memory_is_given_back(world: Worlds, school: Path) -> None:
    values = student(school, "freed", 6, distill={"stop": 2}, zero__stage=3)
    for told, before, after in world(2).run(distill_cases.let_go, values):
        assert told == [None, {"agreement": None, "ended": True}, None]
        assert before and not after


def test_a_teacher_that_only_lends_its_layers_is_let_go_at_once(world: Worlds, school: Path) -> None:
    values = student(school, "lent", 6, distill={"stop": 0}, zero__stage=3)
    assert world(2).run(distill_cases.decoders_left, values) == [(1, 0)] * 2


def test_resume_keeps_the_stage(world: Worlds, school: Path) -> None:
    options = {"distill": {"stop": "auto", "check_every": 2, "conflict": 0.999, "patience": 2}, "zero__stage": 3}
    whole = world(1).run(distill_cases.study, student(school, "whole", 8, **options))[0]
    ended = [row["step"] for row in whole["rows"] if row["kind"] == "objective" and row["ended"]]
    assert ended == [4]  # no two gradients are that much alike: both checks find a conflict
    for after in (3, 6):
        values = student(school, f"cut-{after}", 8, **options)
        assert world(2).run(distill_cases.interrupted, values, after) == [after] * 2
        resumed = world(1).run(distill_cases.study, values)[0]
        assert resumed["digest"] == whole["digest"]
        steps = [row for row in resumed["rows"] if row["kind"] == "step"]
        assert [("divergence" in row) for row in steps] == [True] * 4 + [False] * 4


def test_the_rule_measures_the_cosine_of_the_gradients(world: Worlds, school: Path) -> None:
    settings = {"check_batches": 2, "temperature": 2.0}
    values = student(school, "cosine", 4, distill=settings, zero__stage=3)
    for measured, expected, clean in world(2).run(distill_cases.agreement, values):
        assert measured == pytest.approx(expected, abs=1e-3) and clean


def test_the_cosine_tells_a_help_from_a_hindrance(world: Worlds, school: Path) -> None:
    """Who follows one that has learnt lowers its loss; one that has learnt and follows a beginner does not."""
    helped = student(school, "helped", 4, distill={"init": "fresh"})
    hindered = student(school, "teacher", 25, teacher="beginner", layers=4, distill={"init": "fresh"})
    (forward,) = world(1).run(distill_cases.agreement, helped)
    (backward,) = world(1).run(distill_cases.resumed_agreement, hindered)
    assert forward[0] > 0.3 and backward < 0


def test_a_teacher_and_a_student_with_their_experts_apart(world: Worlds, school: Path) -> None:
    values = student(school, "near", 3, distill={"stop": 2}, zero__stage=3)
    near = world(1).run(distill_cases.study, values)[0]
    apart = world(2).run(distill_cases.study, {**values, "run": str(school / "apart"), "mesh": {"ep": 2}})[0]
    for key in ("loss", "divergence"):
        told = [[row[key] for row in one["rows"] if row["kind"] == "step" and key in row] for one in (near, apart)]
        assert told[1] == pytest.approx(told[0], rel=1e-5) and told[0]


def test_all_of_the_teachers_layers_make_the_teacher(world: Worlds, school: Path) -> None:
    values = student(school, "equal", 4, layers=4, zero__stage=3)
    assert world(2).run(distill_cases.same_as_teacher, values) == [True, True]


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_a_gate_s_bias_begins_as_the_teacher_s_or_stays(world: Worlds, rate: float) -> None:
    (found,) = world(1).run(distill_cases.biases, (rate, 0.25))
    assert found == (True, [0.5, 0.5, -0.5, -0.5] if rate else [0.25, 0.25, -0.25, -0.25])


@pytest.fixture(scope="module")
def stranger(school: Path) -> dict[str, Any]:
    """A student of another text, whose tokenizer has as many entries."""
    folder = school / "strange"
    folder.mkdir()
    text = cases.words(folder)
    for file in text.iterdir():
        file.write_text(file.read_text().replace("function", "zebra").replace("return value", "plumbus quux wxyz"))
    changed = {"data__paths": [str(text)], "data__cache": str(folder / "cache")}
    return student(school, "strange-student", 2, distill={"stop": 1}, **changed)


def test_a_teacher_of_other_tokens_is_refused(world: Worlds, school: Path, stranger: dict[str, Any]) -> None:
    for words in world(2).run(distill_cases.refusal, stranger):
        assert "the teacher's tokenizer" in words and "differs from the student's in its model" in words
    words = world(2).run(distill_cases.refusal, stranger)[0]
    assert (
        words.startswith("ConfigError") and f"data.tokenizer = {str(school / 'teacher' / 'tokenizer.json')!r}" in words
    )


def test_a_teacher_without_a_tokenizer_is_taken_with_a_warning(
    world: Worlds, school: Path, stranger: dict[str, Any]
) -> None:
    shutil.copytree(school / "teacher", school / "mute")
    (school / "mute" / "tokenizer.json").unlink()
    ((words, warned),) = world(1).run(
        distill_cases.warned, {**stranger, "distill": {"teacher": str(school / "mute"), "stop": 1}}
    )
    assert words == "" and [line for line in warned if "mute holds no tokenizer.json" in line]
    (found,) = world(1).run(distill_cases.warned, student(school, "fine", 2))
    assert found == ("", [])


def test_teachers_that_do_not_fit_are_refused(world: Worlds, school: Path) -> None:
    (words,) = world(1).run(distill_cases.refusal, student(school, "none", 4, teacher="nobody"))
    assert words.startswith("CheckpointError: distill.teacher=") and "holds no complete checkpoint" in words
    (words,) = world(1).run(distill_cases.refusal, student(school, "wide", 4, model__vocabulary=400))
    assert "the teacher has a vocabulary of" in words and "the student of 400" in words
    (words,) = world(1).run(
        distill_cases.refusal, student(school, "long", 4, data__sequence=4096, model__max_positions=4096)
    )
    assert "data.sequence=4096" in words
