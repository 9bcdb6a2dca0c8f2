"""The demo's parts, small: its configurations are what they say, one hash at every stage, pictures of routers."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.cli import demo_cases
from tests.train import cases
from tests.worlds import Worlds
from trivium.base import config as configs
from trivium.base.errors import ConfigError, TriviumError
from trivium.cli import demo, demo_ask, demo_experts, demo_runs
from trivium.cli.main import run
from trivium.inference import LLM, Answer, Output, TokenLogprobs
from trivium.models import DecoderConfig
from trivium.plan.configured import decoder_of
from trivium.train.config import TrainConfig
from trivium.train.layers import pair_layers


def built(name: str, folder: Path) -> tuple[TrainConfig, DecoderConfig]:
    config = configs.build(TrainConfig, json.loads(json.dumps(getattr(demo_runs, name)(folder))))
    config.check_ranks(demo_runs.RANKS)
    return config, decoder_of(config)


@pytest.mark.parametrize("name", ["same", "text", "tasks", "student", "dense"])
def test_configurations_can_run(name: str, tmp_path: Path) -> None:
    config, decoder = built(name, tmp_path)
    assert config.folder.parent == tmp_path and decoder.num_parameters() > 0
    if name != "same":
        assert config.zero.stage == 3


def test_the_three_models_are_what_the_table_says(tmp_path: Path) -> None:
    (teaching, teacher), (learning, student), (_, dense) = (built(name, tmp_path) for name, _ in demo_experts.MODELS)
    assert teacher.num_experts == (0, 4, 0, 8) and teaching.mesh.ep == 2
    assert student.layers == teacher.layers - 1 and pair_layers(teacher, student) == (0, 1, 3)
    assert learning.distill is not None and learning.distill.stop == 0.6
    assert Path(learning.distill.teacher) == teaching.folder
    assert dense.moe is None
    assert dense.num_parameters() == pytest.approx(teacher.num_activated_parameters(), rel=0.01)
    assert teacher.num_parameters() > 1.8 * dense.num_parameters()


def test_five_runs_have_one_hash_and_the_paper_s_volume(world: Worlds, tmp_path: Path) -> None:
    cases.words(tmp_path)
    values = json.loads(json.dumps(demo_runs.same(tmp_path)))
    values["model"] |= {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "ffn_dim": 48}
    values["data"] = {
        "paths": [str(tmp_path / "text")],
        "vocabulary": 300,
        "sequence": 32,
        "cache": str(tmp_path / "c"),
    }
    values["train"] |= {"steps": 4}
    values["schedule"] = {"warmup_steps": 2}
    config = tmp_path / "same.json"
    config.write_text(json.dumps(values))
    rows = world(2).run(demo_cases.same, str(config), str(tmp_path / "same.jsonl"))[0]
    assert [row["name"] for row in rows] == ["stage 0", "stage 1", "stage 2", "stage 3", "plain torch"]
    assert len({row["sha256"] for row in rows}) == 1
    sent = [row["sent_bytes"] for row in rows]
    assert sent[0] == sent[1] == sent[2] and sent[2] < sent[3] and sent[4] == 0


def test_pictures_show_every_task_and_name_the_greatest_share() -> None:
    experts = {"add": {"1": [0, 30, 10], "3": [40, 0, 0]}, "max": {"1": [20, 19, 1], "3": [1, 1, 38]}}
    lines = demo_experts.pictures(experts)
    assert [line for line in lines if line.startswith("layer")] == [f"layer {n}: who takes which task" for n in (1, 3)]
    assert "(expert 1: 75%)" in lines[1] and "0" not in lines[1].partition("(")[0]
    assert "(expert 0: 50%)" in lines[2] and "(expert 2: 95%)" in lines[5]
    assert lines[1].count("█") == 18 + 6
    assert demo_experts.pictures({}) == []


def test_the_table_has_sizes_answers_and_losses() -> None:
    answer = {
        "parameters": 1_500_000, "activated": 820_000, "scores": {"add": 0.991, "max": 1.0}, "loss": 0.12,
        "validation": 0.34, "experts": {}, "samples": [], "distilled": 300, "steps": 450,
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=120)
    asked: list[tuple[str, str]] = []

    def run(name: str, ranks: int, *, verb: str) -> dict[str, object]:
        asked.append((name, verb))
        return answer

    demo_experts.show(console, run)
    assert asked == [("tasks", "train"), ("student", "distill"), ("dense", "train")]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in (
        "teacher",
        "student",
        "dense",
        "1.50M",
        "99.1%",
        "100.0%",
        "0.120",
        "0.340",
        "the first 300 of its 450 steps",
    ):
        assert words in shown, words
    assert max(map(len, shown.splitlines())) <= 100


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no earlier demo"):
        demo._empty(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.fixture(scope="module")
def taught(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A demo's folder with a task model of a few steps in it."""
    folder = tmp_path_factory.mktemp("taught")
    world(2).run(demo_cases.teach, str(folder))
    return folder


def test_the_checkpoint_answers_the_same_alone_and_in_a_batch(taught: Path) -> None:
    console = Console(file=io.StringIO(), width=200)
    promised: list[tuple[bool, str]] = []
    found = demo_ask.show(console, demo_runs.teacher(taught), lambda kept, words: promised.append((kept, words)))
    assert len(found.texts) == found.same == demo_ask.BATCH
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert str(taught / "task-teacher" / "step-00000006") in shown
    assert all(f"  {prompt}{text}" in shown for (prompt, _), text in zip(demo_ask.ASKED, found.texts, strict=False))
    assert "tokens/s one after the other" in shown
    if LLM(demo_runs.teacher(taught), device="cpu").engine.executor.batch_invariant:
        assert promised == [(True, "32 of 32 answers the same alone and in a batch of 32, bit for bit")]
    else:
        assert not promised and "does not promise it" in shown


def test_part_five_ends_with_how_to_talk_to_the_model(taught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--part", "5", "--folder", str(taught)]) == 0
    model = str(taught / "task-teacher")
    last = [shlex.split(line)[1:] for line in capsys.readouterr().out.rstrip().splitlines()[-3:]]
    assert last == [["chat", model], ["serve", model], ["generate", model, "--prompt", "sort qzkab>"]]
    assert run([*last[2], "--max-tokens", "3"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "sort qzkab>" and answer["token_ids"]


def test_chat_asks_as_the_model_was_taught(taught: Path) -> None:
    llm = LLM(demo_runs.teacher(taught), device="cpu")
    asked = llm.encode("sort qzkab>")
    for said in ("sort qzkab>", "sort qzkab", " sort qzkab> "):
        messages = [{"role": "user", "content": "add 1+2"}, {"role": "assistant", "content": "3"}]
        assert llm.encode_chat([*messages, {"role": "user", "content": said}]) == asked


@pytest.mark.parametrize("wrong", ["token", "bits"])
def test_an_answer_that_differs_in_a_batch_breaks_the_promise(
    wrong: str, taught: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unsteady:
        """Answers one prompt of a batch otherwise than alone."""

        def __init__(self, *_: Any, **__: Any) -> None:
            self.engine = self.executor = self
            self.name, self.batch_invariant = "unsteady", True

        def generate(self, prompts: str | list[str], _: Any) -> list[Output]:
            many = [prompts] if isinstance(prompts, str) else prompts
            return [self._output(len(many) > 1 and index == 3) for index in range(len(many))]

        @staticmethod
        def _output(other: bool) -> Output:
            token = 8 if other and wrong == "token" else 7
            told = TokenLogprobs(token_id=7, logprob=-0.5 if not other or wrong == "token" else -0.5 - 2**-53, top=())
            answer = Answer(text="a", token_ids=[token], logprobs=[told], finish_reason="stop")
            return Output(prompt_token_ids=[1], choices=[answer])

    monkeypatch.setattr("trivium.inference.LLM", Unsteady)
    assert run(["demo", "--part", "5", "--folder", str(taught)]) == 1
    told = capsys.readouterr()
    assert "✗ 31 of 32 answers the same alone and in a batch of 32" in told.out
    assert "not kept: 31 of 32 answers" in told.err


def test_an_answer_that_failed_is_not_the_same_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def generate(self, prompts: str | list[str], _: Any) -> list[Output]:
            count = 1 if isinstance(prompts, str) else len(prompts)
            answer = Answer(finish_reason="error", error="no room")
            return [Output(prompt_token_ids=[1], choices=[answer]) for _ in range(count)]

    with pytest.raises(TriviumError, match="'sort a>' was not answered: no room"):
        demo_ask.compare(Failing(), ["sort a>"])  # type: ignore[arg-type]


def test_part_five_alone_needs_what_part_four_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "same.json").write_text("{}")
    assert run(["demo", "--part", "5", "--folder", str(tmp_path)]) == 2
    assert "run the demo's part 4 into this folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["same.json"]
