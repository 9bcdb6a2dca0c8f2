"""The engine on a toy model whose answers show every wrong block: faults.md rows I5 to I10, I20, I23, and the rest."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.toy import DRAWN_BY, SPEC, VOCABULARY, Answers, ToyExecutor, ask, engine, sampler
from trivium.base.errors import CapacityError
from trivium.inference import engine as engine_module
from trivium.inference.cache import PagedCache
from trivium.inference.engine import Engine, EngineConfig
from trivium.inference.request import ContextLengthError, RequestError
from trivium.kernels.draws import Draws, Tokens
from trivium.kernels.program import Batch, Cache, Output

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9], [2], list(range(1, 27)), [2, 7, 1, 8, 2, 8]]


def test_greedy_answers_are_the_models() -> None:
    toy = ToyExecutor()
    answers = Answers(engine(toy)).run(*(ask(str(i), prompt) for i, prompt in enumerate(PROMPTS)))
    for i, prompt in enumerate(PROMPTS):
        assert answers.tokens(str(i)) == toy.greedy(prompt, 8)
        assert answers.last(str(i)).finish_reason == "length"
        assert answers.last(str(i)).prompt_tokens == len(prompt)
    stats = answers.engine.stats
    assert (stats.generated_tokens, stats.prompt_tokens) == (40, sum(map(len, PROMPTS)))
    assert (stats.running, stats.waiting, stats.blocks_free) == (0, 0, stats.blocks_total)
    assert stats.finished["length"] == 5


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
@pytest.mark.parametrize("batch", [1, 2, 8, 32])
def test_i23_one_answer_whatever_the_batch(batch: int, drawn_by: str) -> None:
    """Greedy and drawn, alone or among others, in chunks, after preemption and after a prefix hit."""
    asked = {
        "greedy": {"temperature": 0.0},
        "drawn": {"temperature": 1.0, "seed": 7},
        "cut": {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 8},
        "penalised": {"temperature": 1.3, "frequency_penalty": 0.5, "repetition_penalty": 1.2, "seed": 9},
    }
    toy = ToyExecutor(sampler=sampler(drawn_by))
    for name, params in asked.items():
        prompt = [5, 6, 7, 8, 9, 10, 11]
        alone = Answers(engine(toy, prefix_cache=False)).run(ask(name, prompt, max_tokens=20, **params)).tokens(name)
        crowd = [ask(str(i), prompt[: i % 7 + 1], max_tokens=12, seed=i) for i in range(batch - 1)]
        tight = engine(toy, blocks=9 + batch // 8, step_tokens=9)
        answers = Answers(tight).run(
            *crowd[: batch // 2], ask(name, prompt, max_tokens=20, **params), *crowd[batch // 2 :]
        )
        assert answers.tokens(name) == alone
        assert answers.run(ask("again", prompt, max_tokens=20, **params)).tokens("again") == alone
        if batch >= 8:
            assert tight.stats.preemptions > 0


def test_i5_an_oversubscribed_cache_changes_no_token() -> None:
    toy = ToyExecutor()
    tight = engine(toy, blocks=10, size=4, step_tokens=12)
    answers = Answers(tight).run(*(ask(str(i), [i + 1] * 5, max_tokens=35) for i in range(6)))
    assert tight.stats.preemptions > 0
    for i in range(6):
        assert answers.tokens(str(i)) == toy.greedy([i + 1] * 5, 35)
        assert answers.last(str(i)).finish_reason == "length"


def test_i6_a_prompt_longer_than_the_context() -> None:
    small = engine(max_positions=16)
    with pytest.raises(ContextLengthError, match="17 tokens, the context holds 16: expected at most 15") as caught:
        small.add(ask("long", [1] * 17))
    assert (caught.value.given, caught.value.limit, caught.value.param) == (17, 15, "prompt")
    with pytest.raises(ContextLengthError):
        small.add(ask("full", [1] * 16))
    answers = Answers(small).run(ask("cut", list(range(1, 18)), truncate_prompt=True, max_tokens=4))
    assert answers.last("cut").prompt_tokens == 12
    assert answers.tokens("cut") == ToyExecutor().greedy(list(range(6, 18)), 4)
    assert Answers(small).run(ask("zero", [1] * 16, max_tokens=0)).last("zero").finish_reason == "length"


def test_i7_max_tokens_beyond_the_context_is_clipped() -> None:
    small = engine(max_positions=16)
    answers = Answers(small).run(ask("much", [1, 2, 3], max_tokens=1000), ask("all", [4, 5], max_tokens=None))
    assert (len(answers.tokens("much")), answers.last("much").finish_reason) == (13, "length")
    assert (len(answers.tokens("all")), answers.last("all").finish_reason) == (14, "length")
    assert engine(blocks=3, size=4).max_positions == 12  # a small cache lowers it


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [-1], [1, 2.0], [True], ["a"], [2**70]])
def test_i8_prompts_that_are_refused(prompt: list[int]) -> None:
    small = engine()
    with pytest.raises(RequestError) as caught:
        small.add(ask("bad", prompt))
    assert caught.value.param == "prompt"
    assert small.idle
    small.check()


def test_i8_one_token_and_special_tokens_only() -> None:
    toy = ToyExecutor()
    answers = Answers(engine(toy)).run(ask("one", [7]), ask("special", [0, 0, 0]))
    assert answers.tokens("one") == toy.greedy([7], 8)
    assert answers.tokens("special") == toy.greedy([0, 0, 0], 8)


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_i9_a_poisoned_request_fails_alone(drawn_by: str) -> None:
    toy = ToyExecutor(poison=frozenset({39}), sampler=sampler(drawn_by))
    poisoned = engine(toy, blocks=20)
    bad = [39, *range(1, 20)]
    answers = Answers(poisoned).run(ask("good", [1, 2, 3]), ask("bad", bad, n=2), ask("other", [4]))
    for choice in range(2):
        assert answers.last("bad", choice).finish_reason == "error"
        assert "logits are NaN" in str(answers.last("bad", choice).error)
    assert answers.tokens("good") == toy.greedy([1, 2, 3], 8)
    assert answers.tokens("other") == toy.greedy([4], 8)
    assert poisoned.stats.finished["error"] == 2
    blocks = poisoned.cache.caches[0].keys.flatten(1).tolist()
    assert [39.0, 1.0, 2.0, 3.0] not in blocks and [4.0, 5.0, 6.0, 7.0] not in blocks, "it was not wiped"
    assert Answers(poisoned).run(ask("next", bad)).last("next").cached_tokens == 0


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.0},
        {"temperature": 1e-8},
        {"temperature": 1e-300},
        {"temperature": 1e8},
        {"temperature": 1e300},
        {"top_p": 0.0},
        {"top_p": 1.0},
        {"top_p": 1e-12},
        {"top_k": 10**9},
        {"top_k": -1},
        {"min_p": 1.0},
        {"repetition_penalty": 1e-30},
        {"repetition_penalty": 1e30},
        {"frequency_penalty": 1e300, "presence_penalty": -1e300},
        {"presence_penalty": 1e38, "repetition_penalty": 1e38, "temperature": 1e-8},
        {"logit_bias": {3: 1e300, 4: -1e300}},
        {"logit_bias": {token: -1e300 for token in range(VOCABULARY)}},
        {"temperature": 1e-8, "top_k": 3, "top_p": 1e-9, "min_p": 1.0},
    ],
)
def test_i10_extremes_are_defined(params: dict[str, object], drawn_by: str) -> None:
    asked = ask("x", [1, 2], **{"temperature": 1.0, "seed": 1, "logprobs": 3, **params})
    answers = Answers(engine(ToyExecutor(sampler=sampler(drawn_by)))).run(asked)
    assert answers.last("x").finish_reason == "length"
    assert len(answers.tokens("x")) == 8
    entries = [entry for delta in answers.deltas["x", 0] for entry in delta.logprobs or []]
    assert all(entry.logprob <= 0 for entry in entries)
    likeliest = params.get("temperature") in (0.0, 1e-8, 1e-300) and len(params) == 1
    if likeliest or params.get("top_p") in (0.0, 1e-12):
        assert answers.tokens("x") == ToyExecutor().greedy([1, 2], 8)


def test_i20_cancel_at_each_state_frees_at_once() -> None:
    small = engine(blocks=12, size=4, step_tokens=9)
    answers = Answers(small)
    answers.run(ask("decode", [1, 2], max_tokens=40), steps=2)
    answers.run(ask("prefill", [3] * 25, n=2, max_tokens=2), ask("queued", [4] * 30, max_tokens=10), steps=1)
    free = small.stats.blocks_free
    assert small.cancel("prefill") and not small.cancel("prefill")
    assert small.stats.blocks_free > free
    small.check()
    assert small.cancel("queued")
    answers.run(ask("victim", [5] * 9, max_tokens=30), steps=200)
    assert answers.last("prefill", 0).finish_reason == answers.last("prefill", 1).finish_reason == "abort"
    assert answers.last("queued").finish_reason == "abort"
    assert answers.tokens("victim") == ToyExecutor().greedy([5] * 9, 30)
    assert not small.cancel("decode"), "it has ended"


@settings(max_examples=15)
@given(st.integers(0, 10**9), st.booleans())
def test_i20_any_mix_with_cancels_adds_up(seed: int, speculate: bool) -> None:
    draw = random.Random(seed)
    toy = ToyExecutor(period=draw.choice([0, 2]))
    mixed = engine(
        toy, blocks=draw.randint(6, 20), size=draw.randint(1, 5), max_positions=30, speculate=speculate,
        max_sequences=draw.randint(3, 8), step_tokens=draw.randint(9, 20), prefix_cache=draw.random() < 0.7,
    )  # fmt: skip
    answers = Answers(mixed)
    asked: dict[str, list[int]] = {}
    cancelled = set()
    for now in range(40):
        if draw.random() < 0.4:
            prompt = [draw.randint(1, 3) for _ in range(draw.randint(1, mixed.max_positions - 2))]
            asked[str(now)] = prompt
            request = ask(str(now), prompt, max_tokens=draw.randint(1, 12), n=draw.randint(1, 3))
            answers.run(request, steps=0)
        if asked and draw.random() < 0.15:
            name = draw.choice(sorted(asked))
            if mixed.cancel(name):
                cancelled.add(name)
        answers.run(steps=1)
    answers.run()
    assert mixed.stats.blocks_free == mixed.stats.blocks_total
    for name, prompt in asked.items():
        for choice in range(3):
            if (name, choice) in answers.deltas:
                tokens = answers.tokens(name, choice)
                assert tokens == toy.greedy(prompt, len(tokens))
                assert (answers.last(name, choice).finish_reason == "abort") == (name in cancelled) or (
                    name in cancelled and answers.last(name, choice).finish_reason == "length"
                )


def test_i20_what_a_cancelled_prompt_left_is_not_found() -> None:
    """Nobody has seen yet whether it is finite: with the prompt half read, and after it gave way to another."""
    toy = ToyExecutor(poison=frozenset({39}))
    small = engine(toy, blocks=16)
    shared = list(range(1, 9))
    Answers(small).run(ask("before", shared))
    kept = small.stats.blocks_remembered
    answers = Answers(small).run(ask("bad", [39] * 30), ask("longer", shared + [39] * 30), steps=1)
    assert small.stats.blocks_remembered > kept
    assert small.cancel("bad") and small.cancel("longer")
    answers.run()
    assert small.stats.blocks_remembered == kept
    assert Answers(small).run(ask("again", [39] * 30)).last("again").cached_tokens == 0
    assert Answers(small).run(ask("shared", [*shared, 7])).last("shared").cached_tokens == 8

    small = engine(toy, blocks=16, max_sequences=3, step_tokens=4)
    answers = Answers(small).run(ask("first", [5], max_tokens=60), steps=1)
    answers.run(ask("bad", [39] * 50), steps=2)
    for _ in range(60):
        if small.stats.preemptions:
            break
        answers.run(steps=1)
    assert small.stats.preemptions == 1 and small.cancel("bad")
    answers.run()
    assert Answers(small).run(ask("again", [39] * 50)).last("again").cached_tokens == 0


def test_i20_cancelling_what_only_waited_forgets_nothing() -> None:
    small = engine(blocks=16)
    shared = list(range(1, 9))
    Answers(small).run(ask("before", shared))
    answers = Answers(small).run(ask("long", [20] * 40, max_tokens=10), ask("waits", shared + [21] * 24), steps=3)
    kept = small.stats.blocks_remembered
    assert small.stats.waiting == 1 and small.cancel("waits")
    assert small.stats.blocks_remembered == kept
    answers.run(steps=0)
    assert Answers(small).run(ask("again", [*shared, 7])).last("again").cached_tokens == 8


def test_i9_what_a_poisoned_request_left_behind_its_window_is_not_found() -> None:
    class Ends(ToyExecutor):
        def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
            output = super().run(batch, caches)
            output.logits[batch.token_ids[batch.output_rows] == 39] = float("nan")
            return output

    cache = PagedCache([replace(SPEC, window=5)], num_blocks=16, block_size=4, dtype="float32")
    config = EngineConfig(max_sequences=2, step_tokens=8)
    windowed = Engine(Ends(period=4), cache, vocabulary=VOCABULARY, max_positions=200, config=config)
    bad = [*range(1, 30), 39]
    answers = Answers(windowed).run(ask("bad", bad), steps=2)
    assert windowed.stats.blocks_remembered == 4 and windowed.stats.blocks_free > 12
    answers.run()
    assert answers.last("bad").finish_reason == "error"
    assert windowed.stats.blocks_remembered == 0


def test_what_was_cancelled_before_a_step_that_raises_is_told() -> None:
    toy = ToyExecutor()
    shaken = engine(toy)
    answers = Answers(shaken).run(ask("a", [1, 2]), ask("b", [3]), steps=1)
    shaken.cancel("b")
    toy.raises = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        shaken.step()
    toy.raises = None
    answers.run()
    assert answers.last("b").finish_reason == "abort"
    assert answers.tokens("a") == toy.greedy([1, 2], 8)


def test_a_step_that_raises_can_be_tried_again() -> None:
    toy = ToyExecutor()
    shaken = engine(toy, blocks=12)
    answers = Answers(shaken).run(ask("a", [1, 2, 3, 4, 5], n=2), ask("b", [6] * 20), steps=1)
    for _ in range(3):
        toy.raises = RuntimeError("lost")
        with pytest.raises(RuntimeError, match="lost"):
            shaken.step()
        shaken.check()
        toy.raises = None
        answers.run(steps=1)
    answers.run()
    assert answers.tokens("a", 0) == answers.tokens("a", 1) == toy.greedy([1, 2, 3, 4, 5], 8)
    assert answers.tokens("b") == toy.greedy([6] * 20, 8)


class Failing:
    """A sampler without memory whenever it is asked for the ``wrong``-th time."""

    def __init__(self, wrong: int, error: Exception | None = None) -> None:
        self.asked, self.wrong, self.error = 0, wrong, error or CapacityError("no memory to draw")

    def draw(self, logits: torch.Tensor, draws: Draws) -> Tokens:
        self.asked += 1
        if self.asked == self.wrong:
            raise self.error
        best, token = logits[list(draws.rows)].max(dim=1)
        many = best.tolist()
        return Tokens(token=token.tolist(), best=many, left=many, whole=[0.0] * len(many), top=[[] for _ in many])


@pytest.mark.parametrize("wrong", [1, 2])
@pytest.mark.parametrize("error", [CapacityError, MemoryError, torch.OutOfMemoryError])
def test_a_sampler_that_raises_ends_those_who_were_to_draw(wrong: int, error: type[Exception]) -> None:
    toy = ToyExecutor()
    toy.sampler = Failing(wrong, error("no memory to draw"))
    shaken = engine(toy, blocks=12)
    answers = Answers(shaken).run(ask("a", [1, 2, 3], n=2), ask("b", [6, 5]))
    for name, choice in (("a", 0), ("a", 1), ("b", 0)):
        last = answers.last(name, choice)
        assert last.finish_reason == "error" and "no memory to draw" in str(last.error)
    shaken.check()
    after = Answers(shaken).run(ask("c", [1, 2, 3]))
    assert after.tokens("c") == toy.greedy([1, 2, 3], 8)


def test_a_sampler_that_raises_over_a_prompt_ends_its_request() -> None:
    toy = ToyExecutor()
    toy.sampler = Failing(1)
    shaken = engine(toy, blocks=12)
    answers = Answers(shaken).run(ask("a", [1, 2, 3], prompt_logprobs=0), ask("b", [6, 5]))
    assert "no memory to draw" in str(answers.last("a").error)
    assert answers.tokens("b") == toy.greedy([6, 5], 8)
    shaken.check()


def test_prefix_hits_are_told_and_can_be_forgotten() -> None:
    toy = ToyExecutor()
    small = engine(toy)
    prompt = list(range(1, 22))
    first = Answers(small).run(ask("a", prompt))
    assert first.last("a").cached_tokens == 0
    again = Answers(small).run(ask("b", prompt))
    assert again.last("b").cached_tokens == 20
    assert again.tokens("b") == first.tokens("a") == toy.greedy(prompt, 8)
    assert small.stats.cached_tokens == 20
    small.forget_prefixes()
    assert Answers(small).run(ask("c", prompt)).last("c").cached_tokens == 0
    small.add(ask("d", prompt))
    with pytest.raises(RequestError, match="1 requests are being answered"):
        small.forget_prefixes()


def test_several_choices_differ_by_their_number_alone() -> None:
    small = engine()
    answers = Answers(small).run(ask("n", [1, 2, 3, 4, 5], n=4, temperature=1.0, seed=3, max_tokens=12))
    several = [answers.tokens("n", choice) for choice in range(4)]
    assert len({tuple(tokens) for tokens in several}) > 1
    again = Answers(engine(blocks=9)).run(ask("m", [1, 2, 3, 4, 5], n=4, temperature=1.0, seed=3, max_tokens=12))
    assert [again.tokens("m", choice) for choice in range(4)] == several
    assert small.stats.prompt_tokens == 5
    without = Answers(small).run(ask("s", [1, 2, 3, 4, 5], n=4, temperature=1.0, max_tokens=12))
    assert len({tuple(without.tokens("s", choice)) for choice in range(4)}) > 1


def test_ends() -> None:
    toy = ToyExecutor()
    plain = toy.greedy([1, 2, 3], 8)
    eos = plain[3]
    at = plain.index(eos)
    answers = Answers(engine(toy, eos=(eos,))).run(
        ask("eos", [1, 2, 3]),
        ask("ignore", [1, 2, 3], ignore_eos=True),
        ask("ids", [1, 2, 3], ignore_eos=True, stop_token_ids=[plain[1]]),
        ask("shown", [1, 2, 3], include_stop=True),
        ask("least", [1, 2, 3], min_tokens=6),
    )
    assert answers.tokens("eos") == plain[: at + 1]
    assert (answers.last("eos").finish_reason, answers.last("eos").stop) == ("stop", eos)
    assert answers.tokens("ignore") == plain
    assert answers.tokens("ids")[-1] == answers.last("ids").stop == plain[1]
    assert len(answers.text("shown")) == len(answers.text("eos")) + 1
    assert len(answers.tokens("least")) >= 6
    assert eos not in answers.tokens("least")[:6]


def test_stop_strings_over_token_borders() -> None:
    toy = ToyExecutor()
    small = engine(toy)
    text = Answers(small).run(ask("plain", [9, 9], max_tokens=12)).text("plain")
    stop = text[4:7]
    cut = text.index(stop)
    answers = Answers(small).run(
        ask("stop", [9, 9], max_tokens=12, stop=[stop, "never"]),
        ask("shown", [9, 9], max_tokens=12, stop=stop, include_stop=True),
        ask("late", [9, 9], max_tokens=12, stop=stop, min_tokens=7),
        ask("begun", [9, 9], max_tokens=6, stop=text[5:9]),
    )
    assert answers.text("stop") == text[:cut]
    assert (answers.last("stop").finish_reason, answers.last("stop").stop) == ("stop", stop)
    assert answers.text("shown") == text[: cut + 3]
    assert answers.text("late") == text
    assert answers.text("begun") == text[:6]  # what was held back comes at the end
    assert "".join(delta.text for delta in answers.deltas["begun", 0][:5]) == text[:5]


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_echo_and_prompt_logprobs(drawn_by: str) -> None:
    toy = ToyExecutor(sampler=sampler(drawn_by))
    small = engine(toy)
    prompt = [3, 1, 20, 27, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    Answers(small).run(ask("fill", prompt))
    answers = Answers(small).run(
        ask("echo", prompt, echo=True, max_tokens=2, prompt_logprobs=2, logprobs=1, n=2),
        ask("score", prompt, echo=True, max_tokens=0, prompt_logprobs=0),
    )
    assert answers.text("echo") == "cat defghijklmnopqr" + Answers(small).run(ask("a", prompt, max_tokens=2)).text("a")
    for name, count in (("echo", 2), ("score", 0)):
        found = answers.deltas[name, 0][0].prompt_logprobs
        assert found is not None and len(found) == len(prompt) and found[0] is None
        for index, entry in enumerate(found[1:], start=1):
            assert entry is not None and entry.token_id == prompt[index] and len(entry.top) == count
            row = torch.log_softmax(toy.row([float(t) for t in prompt[:index]]), 0)
            assert entry.logprob == pytest.approx(float(row[prompt[index]]), abs=1e-6)
    assert answers.deltas["echo", 1][0].prompt_logprobs == answers.deltas["echo", 0][0].prompt_logprobs
    assert all(delta.prompt_logprobs is None for delta in answers.deltas["echo", 0][1:])
    (entry,) = answers.deltas["echo", 0][0].logprobs or []
    assert entry.top[0] == (entry.token_id, entry.logprob)
    assert (answers.text("score"), answers.tokens("score")) == ("cat defghijklmnopqr", [])


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_i9_a_poisoned_prompt_has_no_log_probabilities(drawn_by: str) -> None:
    toy = ToyExecutor(poison=frozenset({39}), sampler=sampler(drawn_by))
    answers = Answers(engine(toy)).run(
        ask("bad", [39, *range(1, 20)], max_tokens=0, prompt_logprobs=1), ask("good", [1, 2], max_tokens=2)
    )
    assert answers.last("bad").finish_reason == "error"
    assert "logits are not finite" in str(answers.last("bad").error)
    assert answers.tokens("good") == toy.greedy([1, 2], 2)


def test_collected_rows_survive_preemption() -> None:
    toy = ToyExecutor()
    tight = engine(toy, blocks=9, step_tokens=10)
    prompt = [4, 3, 2, 1] * 4
    answers = Answers(tight).run(ask("a", [1] * 8, max_tokens=25), ask("rows", prompt, collect="logits", max_tokens=15))
    collected = answers.last("rows").collected
    assert collected is not None and collected.logits is not None
    whole = [float(token) for token in [*prompt, *answers.tokens("rows")]]
    assert tight.stats.preemptions > 0
    assert torch.equal(collected.logits, torch.stack([toy.row(whole[: i + 1]) for i in range(len(whole) - 1)]))


@pytest.mark.parametrize("breaks", ["allowed", "accept", "finished", "shape", "fork"])
def test_a_constraint_that_fails_ends_its_own_request_alone(breaks: str) -> None:
    class Broken:
        def step(self, name: str) -> None:
            if name == breaks:
                raise ValueError(f"{name} is broken")

        def allowed(self) -> torch.Tensor | None:
            self.step("allowed")
            return torch.ones(7, dtype=torch.bool) if breaks == "shape" else None

        def accept(self, token_id: int) -> None:
            self.step("accept")

        def finished(self) -> bool:
            self.step("finished")
            return False

        def fork(self) -> Broken:
            self.step("fork")
            return self

    toy = ToyExecutor()
    small = engine(toy)
    answers = Answers(small).run(ask("good", [1, 2]), steps=1)
    if breaks == "fork":
        with pytest.raises(ValueError, match="fork is broken"):
            small.add(ask("bad", [3], n=2, constraint=Broken()))
        answers.run()
    else:
        answers.run(ask("bad", [3], n=2, constraint=Broken()))
        for choice in range(2):
            assert answers.last("bad", choice).finish_reason == "error"
            assert ("mask is torch.bool [7]" if breaks == "shape" else f"{breaks} is broken") in str(
                answers.last("bad", choice).error
            )
    assert answers.tokens("good") == toy.greedy([1, 2], 8)


def test_a_constraint_is_kept_and_ends_the_answer() -> None:
    class Rising:
        """Tokens may only rise; complete at 38; forks are independent."""

        def __init__(self, least: int = 0) -> None:
            self.least = least

        def allowed(self) -> torch.Tensor | None:
            return torch.arange(VOCABULARY) > self.least

        def accept(self, token_id: int) -> None:
            self.least = token_id

        def finished(self) -> bool:
            return self.least >= 38

        def fork(self) -> Rising:
            return Rising(self.least)

    answers = Answers(engine(speculate=True)).run(
        ask("rise", [1, 2], constraint=Rising(), temperature=1.0, seed=1, n=3, max_tokens=50),
        ask("none", [1, 2], constraint=Rising(39)),
    )
    for choice in range(3):
        tokens = answers.tokens("rise", choice)
        assert tokens == sorted(set(tokens)) and tokens[-1] >= 38
        assert answers.last("rise", choice).finish_reason == "stop"
    assert answers.last("none").finish_reason == "error"
    assert "no token is allowed" in str(answers.last("none").error)


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}, {"stop": "ab"}, {"logprobs": 2}])
def test_speculation_changes_no_token(params: dict[str, object]) -> None:
    toy = ToyExecutor(period=2, vocabulary=30)
    prompt = [1, 2, 3, 1, 2]
    plain, guessed = engine(toy), engine(toy, speculate=True)
    expected = Answers(plain).run(ask("a", prompt, max_tokens=100, **params))
    found = Answers(guessed).run(ask("a", prompt, max_tokens=100, **params), ask("b", prompt, max_tokens=60))
    assert found.tokens("a") == expected.tokens("a")
    assert found.text("a") == expected.text("a")
    assert found.last("a").finish_reason == expected.last("a").finish_reason
    flat = [[entry for delta in side.deltas["a", 0] for entry in delta.logprobs or []] for side in (expected, found)]
    assert flat[0] == flat[1]
    if not params:
        assert guessed.stats.accepted_tokens > 0
        assert guessed.stats.steps < plain.stats.steps


def test_too_many_choices_and_other_limits() -> None:
    small = engine()
    for params, param in (
        ({"n": 9}, "n"),
        ({"stop_token_ids": [VOCABULARY]}, "stop_token_ids"),
        ({"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        ({"logprobs": VOCABULARY + 1}, "logprobs"),
    ):
        with pytest.raises(RequestError) as caught:
            small.add(ask("x", [1], **params))
        assert caught.value.param == param
    small.add(ask("twice", [1]))
    with pytest.raises(RequestError, match="'twice' is being answered already"):
        small.add(ask("twice", [1]))
    small.cancel("twice")
    small.check()


def test_a_cache_without_a_block_is_refused() -> None:
    from trivium.inference.cache import blocks_within, layer_bytes_per_token
    from trivium.kernels.program import CacheSpec

    spec = CacheSpec(kv_heads=2, head_dim=8, value_dim=8)
    assert layer_bytes_per_token(spec, "float32") == 128
    assert layer_bytes_per_token(spec, "int8") == 32 + 16
    assert blocks_within([spec] * 2, "float32", 16, memory_bytes=10_000, most_tokens=10**6) == 2
    assert blocks_within([spec] * 2, "float32", 16, memory_bytes=10**9, most_tokens=100) == 7
    with pytest.raises(CapacityError, match=r"one block of 16 tokens takes 4\.00 KiB"):
        blocks_within([spec] * 2, "float32", 16, memory_bytes=4000, most_tokens=100)


def test_guessing_rests_where_wider_steps_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine measures its steps itself; here a clock of our own says what a step with guesses takes."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Priced(ToyExecutor):
        wider_s = 1.0

        def run(self, batch, caches):  # type: ignore[no-untyped-def]
            clock.now += self.wider_s if len(batch.token_ids) > 1 else 1.0
            return super().run(batch, caches)

    steps, texts = [], []
    for wider_s in (1.0, 20.0):
        toy = Priced(period=2)
        toy.wider_s = wider_s
        one = engine(toy, blocks=60, max_positions=200, speculate=True)
        answers = Answers(one)
        answers.run(ask("a", [1, 2, 3], max_tokens=180))
        texts.append(answers.tokens("a"))
        steps.append(one.stats.steps)
        assert one.stats.drafted_tokens > 0
    assert texts[0] == texts[1] == ToyExecutor(period=2).greedy([1, 2, 3], 180)
    assert steps[1] > 2 * steps[0], "all guesses are right, and still do not pay"
