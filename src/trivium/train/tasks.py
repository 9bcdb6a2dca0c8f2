"""Generated tasks whose answers can be checked: add, reverse, sort, max over a small alphabet of characters.

A prompt ends with ``>`` and the answer follows in plain form: ``add 12+35>47``, ``reverse qzkab>bakzq``,
``sort qzkab>abkqz``, ``max 31 7 92>92``. Which prompts are held out is decided by their hash, so training and held-out
prompts never meet.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

from trivium.base.errors import ConfigError, DataError
from trivium.train.data.corpus import Corpus
from trivium.train.data.sources import stable_hash
from trivium.train.data.tokenizer import Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = " +>0123456789" + LETTERS
# In a chat every message is a question of its own; whoever leaves out the last ">" is understood too.
CHAT_TEMPLATE = (
    "{% set asked = messages[-1].content | trim %}{{ asked }}{% if not asked.endswith('>') %}{{ '>' }}{% endif %}"
)
Evaluate = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which tasks, how large their inputs are and how many examples.

    The defaults are sized for a demonstration: a decoder of 0.8M parameters (width 128, 4 layers) answered 97 to 100 %
    of each task's held-out prompts after 700 steps of 32 sequences of 64 tokens (AdamW, rate 3e-3, falling over the
    last half).

    ``digits``: of each number in add and max. ``letters``: shortest and longest word of reverse and sort. ``numbers``:
    how few and how many max compares. ``held_out``: the share of prompts, by hash, that training never sees.
    """

    names: tuple[str, ...] = ("add", "reverse", "sort", "max")
    digits: int = 2
    letters: tuple[int, int] = (3, 5)
    numbers: tuple[int, int] = (2, 3)
    examples: int = 60_000
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every value."""
        unknown = [name for name in self.names if name not in _MAKERS]
        if unknown or not self.names or len(set(self.names)) < len(self.names):
            raise ConfigError(f"tasks.names={list(self.names)}: expected each at most once of {', '.join(_MAKERS)}")
        for key, (low, high) in (("letters", self.letters), ("numbers", self.numbers)):
            if not 1 <= low <= high <= 64:
                raise ConfigError(f"tasks.{key}={[low, high]}: expected 1 <= shortest <= longest <= 64")
        if not 1 <= self.digits <= 18:
            raise ConfigError(f"tasks.digits={self.digits}: expected 1 to 18")
        if self.examples < len(self.names):
            raise ConfigError(
                f"tasks.examples={self.examples}: expected at least one for each of {len(self.names)} tasks"
            )
        if not 0.0 < self.held_out < 1.0:
            raise ConfigError(f"tasks.held_out={self.held_out}: expected a share between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt that ends with ``>``, and its one right answer."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Score:
    """How many of a task's held-out prompts were answered exactly, and some that were not: (prompt, right, given)."""

    task: str
    right: int
    total: int
    wrong: tuple[tuple[str, str, str], ...] = field(default=())

    @property
    def share(self) -> float:
        """Exact answers among all, 0 to 1."""
        return self.right / self.total


def train_examples(config: TaskConfig) -> list[Example]:
    """``config.examples`` examples, hard tasks more often, none held out; may repeat. Equal seeds, equal lists."""
    return [_draw(config, name, False, source) for name, source in _turns(config, "train", config.examples)]


def held_out_examples(config: TaskConfig, count: int) -> list[Example]:
    """``count`` different held-out examples of each task. Raises DataError when a task has not as many."""
    examples: list[Example] = []
    for name in config.names:
        source = random.Random(f"{config.seed}/held out/{name}")
        seen: dict[str, Example] = {}
        tries = 0
        while len(seen) < count:
            example = _draw(config, name, True, source)
            tries = 0 if example.prompt not in seen else tries + 1
            seen[example.prompt] = example
            if tries > 1000:
                raise DataError(
                    f"task {name} has about {len(seen)} held-out prompts, {count} were asked for; "
                    "raise tasks.held_out or the inputs' size"
                )
        examples += seen.values()
    return examples


def is_held_out(prompt: str, share: float) -> bool:
    """Whether training must not see this prompt."""
    return stable_hash(prompt) < int(share * 2**64)


def tokenizer() -> Tokenizer:
    """One token per character of the tasks' alphabet, and one for each task's name with the space after it."""
    return Tokenizer.of_characters(CHARACTERS, [f"{name} " for name in _MAKERS], template=CHAT_TEMPLATE)


def corpus(examples: Sequence[Example], using: Tokenizer) -> Corpus:
    """One document per example, ended by the end token; only the answer and the end carry loss."""
    prompts = using.encode_batch([example.prompt for example in examples])
    answers = using.encode_batch([example.answer for example in examples])
    rows = [
        ([*prompt, *answer, using.end_id], [False] * len(prompt) + [True] * (len(answer) + 1))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return Corpus.of(rows, vocabulary=using.vocabulary, pad_id=using.pad_id, source="tasks")


def exact_match(evaluate: Evaluate, config: TaskConfig, *, count: int = 200, batch: int = 64) -> dict[str, Score]:
    """Give ``evaluate`` the held-out prompts (some at a time) and compare its answers, character by character."""
    scores = {}
    examples = held_out_examples(config, count)
    for name in config.names:
        mine = sorted(
            (example for example in examples if example.task == name), key=lambda example: len(example.prompt)
        )
        given: list[str] = []
        for start in range(0, len(mine), batch):
            part = mine[start : start + batch]
            answers = list(evaluate([example.prompt for example in part]))
            if len(answers) != len(part):
                raise DataError(f"task {name}: {len(answers)} answers to {len(part)} prompts")
            given += answers
        wrong = [
            (example.prompt, example.answer, answer)
            for example, answer in zip(mine, given, strict=True)
            if example.answer != answer
        ]
        scores[name] = Score(task=name, right=len(mine) - len(wrong), total=len(mine), wrong=tuple(wrong[:5]))
    return scores


def _turns(config: TaskConfig, label: str, count: int) -> list[tuple[str, random.Random]]:
    sources = {name: random.Random(f"{config.seed}/{label}/{name}") for name in config.names}
    cycle = [name for name in config.names for _ in range(_MAKERS[name].weight)]
    return [(name, sources[name]) for name in (cycle[i % len(cycle)] for i in range(count))]


def _draw(config: TaskConfig, name: str, held: bool, source: random.Random) -> Example:
    for _ in range(100_000):
        question, answer = _MAKERS[name].draw(config, source)
        prompt = f"{name} {question}>"
        if is_held_out(prompt, config.held_out) == held:
            return Example(task=name, prompt=prompt, answer=answer)
    raise DataError(
        f"task {name} has no {'held-out' if held else 'training'} prompts; change tasks.held_out or the inputs' size"
    )


def _number(config: TaskConfig, source: random.Random) -> int:
    """Every length is equally likely: drawn evenly, short numbers would be too rare to learn from."""
    return source.randrange(10 ** source.randint(1, config.digits))


def _add(config: TaskConfig, source: random.Random) -> tuple[str, str]:
    first, second = _number(config, source), _number(config, source)
    return f"{first}+{second}", str(first + second)


def _word(config: TaskConfig, source: random.Random) -> str:
    return "".join(source.choice(LETTERS) for _ in range(source.randint(*config.letters)))


def _reverse(config: TaskConfig, source: random.Random) -> tuple[str, str]:
    word = _word(config, source)
    return word, word[::-1]


def _sort(config: TaskConfig, source: random.Random) -> tuple[str, str]:
    word = _word(config, source)
    return word, "".join(sorted(word))


def _max(config: TaskConfig, source: random.Random) -> tuple[str, str]:
    numbers = [_number(config, source) for _ in range(source.randint(*config.numbers))]
    return " ".join(map(str, numbers)), str(max(numbers))


class _Maker(NamedTuple):
    """How to draw (question, answer), and how often: what takes longer to learn comes more often."""

    draw: Callable[[TaskConfig, random.Random], tuple[str, str]]
    weight: int


_MAKERS = MappingProxyType(
    {
        "add": _Maker(_add, 7),
        "reverse": _Maker(_reverse, 1),
        "sort": _Maker(_sort, 3),
        "max": _Maker(_max, 3),
    }
)
