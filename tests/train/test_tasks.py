"""Generated tasks: right answers, disjoint held-out prompts, equal seeds equal data, loss on answers only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from trivium.base.errors import ConfigError, DataError
from trivium.train.data import Loader, Tokenizer
from trivium.train.data.pack import IGNORE
from trivium.train.tasks import (
    TaskConfig,
    corpus,
    exact_match,
    held_out_examples,
    is_held_out,
    tokenizer,
    train_examples,
)

CONFIG = TaskConfig(examples=4000)


def solve(prompt: str) -> str:
    task, question = prompt[:-1].split(" ", 1)
    if task == "add":
        return str(sum(map(int, question.split("+"))))
    if task == "max":
        return str(max(map(int, question.split())))
    return question[::-1] if task == "reverse" else "".join(sorted(question))


def test_answers_are_right_and_prompts_disjoint() -> None:
    train, held = train_examples(CONFIG), held_out_examples(CONFIG, 200)
    assert all(example.answer == solve(example.prompt) for example in train + held)
    assert {example.task for example in train} == set(CONFIG.names)
    assert not {example.prompt for example in train} & {example.prompt for example in held}
    assert all(is_held_out(example.prompt, CONFIG.held_out) for example in held)
    assert len({example.prompt for example in held}) == len(held) == 800
    assert all(sum(example.task == name for example in held) == 200 for name in CONFIG.names)


def test_seed_decides() -> None:
    assert train_examples(CONFIG) == train_examples(TaskConfig(examples=4000))
    assert train_examples(CONFIG) != train_examples(TaskConfig(examples=4000, seed=1))
    assert held_out_examples(CONFIG, 5) == held_out_examples(TaskConfig(examples=10), 5)
    assert not {e.prompt for e in train_examples(CONFIG)} & {
        e.prompt for e in held_out_examples(TaskConfig(seed=1), 200)
    }


def test_loss_is_on_the_answer_and_the_end() -> None:
    using = tokenizer()
    examples = train_examples(CONFIG)[:200]
    made = corpus(examples, using)
    loader = Loader(made, sequence=made.num_tokens, batch_size=1)
    batch = next(loader)
    for index, example in enumerate(examples):
        here = batch.documents[0] == index
        learned = [token for token in batch.targets[0][here].tolist() if token != IGNORE]
        assert learned == [*using.encode(example.answer), using.end_id]
        assert using.decode(batch.tokens[0][here].tolist()) == example.prompt + example.answer
    assert batch.num_tokens == sum(len(example.answer) + 1 for example in examples)


def test_tokenizer_is_a_file_like_any_other(tmp_path: Path) -> None:
    tokenizer().save(tmp_path)
    back = Tokenizer.load(tmp_path)
    for example in train_examples(CONFIG)[:50]:
        assert back.decode(back.encode(example.prompt)) == example.prompt
        assert back.encode(example.prompt) == tokenizer().encode(example.prompt)
    with pytest.raises(DataError, match="character 'A'"):
        back.encode("add A>")


def test_exact_match_counts_and_shows_what_was_wrong() -> None:
    def evaluate(prompts: Sequence[str]) -> list[str]:
        return [solve(prompt) if not prompt.startswith("sort") else "no" for prompt in prompts]

    scores = exact_match(evaluate, CONFIG, count=50, batch=16)
    assert {name: score.share for name, score in scores.items()} == {
        "add": 1.0,
        "reverse": 1.0,
        "sort": 0.0,
        "max": 1.0,
    }
    prompt, right, given = scores["sort"].wrong[0]
    assert (right, given) == (solve(prompt), "no") and len(scores["sort"].wrong) == 5
    with pytest.raises(DataError, match="1 answers to 16 prompts"):
        exact_match(lambda prompts: ["x"], CONFIG, count=16, batch=16)


def test_too_many_held_out_and_bad_settings() -> None:
    with pytest.raises(DataError, match=r"task add has about \d+ held-out prompts, 100 were asked for"):
        held_out_examples(TaskConfig(names=("add",), digits=1), 100)
    for key, value in {
        "names": ("add", "divide"), "letters": (4, 3), "numbers": (0, 3), "digits": 0, "examples": 1, "held_out": 0.0,
    }.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"tasks.{key}="):
            TaskConfig(**{key: value})  # type: ignore[arg-type]
