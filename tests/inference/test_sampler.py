"""Draws: the right distribution, the right cuts, the same in any batch, defined at every extreme."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.inference.toy import DRAWN_BY, sampler
from trivium.inference.draw import best_of, draw
from trivium.inference.request import RequestError, SamplingParams
from trivium.inference.sampler import Draw, Drawer, logprobs, logprobs_of, sample

LOGITS = torch.linspace(-3, 3, 301)[torch.randperm(301, generator=torch.Generator().manual_seed(0))]


def drawer(seed: int = 0, choice: int = 0, prompt: tuple[int, ...] = (), **params: object) -> Drawer:
    return Drawer(SamplingParams(**params), seed=seed, choice=choice, prompt=prompt)  # type: ignore[arg-type]


def kept(logits_V: torch.Tensor, params: SamplingParams) -> set[int]:
    """What top-k, then top-p of the rest, then min-p leave: the plain way."""
    order = sorted(range(len(logits_V)), key=lambda token: (-float(logits_V[token]), token))
    chosen = order[: params.top_k] if params.top_k > 0 else order
    weights = torch.softmax(logits_V[chosen].double() / params.temperature, 0).tolist()
    running, left = 0.0, []
    for token, weight in zip(chosen, weights, strict=True):
        if left and running >= params.top_p:
            break
        running += weight
        left.append((token, weight))
    return {token for token, weight in left if weight >= params.min_p * left[0][1]}


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.3},
        {"top_k": 40, "top_p": 0.6, "min_p": 0.5},
        {"top_p": 0.98, "temperature": 2.0},
        {"top_p": 1e-9},
    ],
)
def test_draws_follow_the_distribution(params: dict[str, object]) -> None:
    settings = SamplingParams(**params)  # type: ignore[arg-type]
    row = LOGITS.numpy()
    count = 4000
    found = np.bincount([draw(row, settings, (i + 0.5) / count) for i in range(count)], minlength=301) / count
    left = kept(LOGITS, settings)
    wanted = np.zeros(301)
    for token in left:
        wanted[token] = math.exp(float(LOGITS[token]) / settings.temperature)
    wanted /= wanted.sum()
    assert set(np.flatnonzero(found)) <= left
    assert np.abs(found - wanted).max() <= 1.5 / count


@pytest.mark.parametrize("width", [1, 127, 128, 129, 300])
@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_impossible_tokens_are_never_drawn(width: int, uniform: float) -> None:
    row = np.full(width, -np.inf, dtype=np.float32)
    row[width // 2] = 5.0
    for params in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 1e-8}, {"temperature": 1e30}):
        assert draw(row, SamplingParams(**params), uniform) == width // 2  # type: ignore[arg-type]


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=400), st.integers(1, 420))
def test_the_likeliest_in_order(values: list[int], count: int) -> None:
    row = np.array(values, dtype=np.float32)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert best_of(row, count).tolist() == order[:count]


def test_uniforms_are_uniform_and_each_ones_own() -> None:
    found = np.array([drawer(seed, choice).uniform(i) for seed in range(8) for choice in range(4) for i in range(100)])
    assert len(set(found)) == len(found)
    assert found.min() >= 0 and found.max() < 1
    counts = np.bincount((found * 16).astype(int), minlength=16)
    assert ((counts - 200) ** 2 / 200).sum() < 37.7  # chi-square, 15 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(found[:-1], found[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_a_row_does_not_depend_on_its_neighbours(drawn_by: str) -> None:
    kernel = sampler(drawn_by)
    rows = torch.stack([LOGITS * scale for scale in (1.0, 0.3, 2.0, 1.5)])
    draws = [
        Draw(drawer(1), 3),
        Draw(drawer(2, temperature=0.0), 0),
        Draw(drawer(3, prompt=(4, 5), repetition_penalty=1.3, top_p=0.7, logprobs=2), 1, (7,)),
        Draw(drawer(4, logit_bias={9: 50.0}), 2, (), torch.arange(301) > 5),
    ]
    together = sample(rows, draws, sampler=kernel)
    assert together == [sample(rows[i : i + 1], [draws[i]], sampler=kernel)[0] for i in range(4)]
    assert together == sample(rows.flip(0), draws[::-1], sampler=kernel)[::-1]
    assert together == sample(rows, draws[::-1], at=[3, 2, 1, 0], sampler=kernel)[::-1]
    assert together[1].token_id == int(LOGITS.argmax())
    assert together[3].token_id == 9
    assert together[2].logprobs is not None and len(together[2].logprobs.top) == 2


def test_penalties_and_bias() -> None:
    one = drawer(
        prompt=(0, 1), repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias={4: 1.5}
    )
    for token in (2, 2, 3):
        one.said(token)
    row = np.array([4.0, -4.0, 4.0, -4.0, 1.0, 1.0], dtype=np.float32)
    ids, values = one.edits(row)
    row[ids] = values
    assert row.tolist() == [2.0, -8.0, 2.0 - 1.25, -8.0 - 0.75, 2.5, 1.0]
    assert not drawer().changes and drawer(logit_bias={1: 0.5}).changes


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
@pytest.mark.parametrize(("bad", "word"), [(math.nan, "NaN"), (math.inf, "infinite")])
def test_i9_only_the_bad_row_has_an_error(bad: float, word: str, drawn_by: str) -> None:
    kernel = sampler(drawn_by)
    rows = LOGITS.repeat(3, 1)
    rows[1, 17] = bad
    everything = {"repetition_penalty": 2.0, "logit_bias": {17: 3.0}, "logprobs": 2}
    for one in (
        Draw(drawer(temperature=0.0), 0),
        Draw(drawer(), 0),
        Draw(drawer(prompt=(17,), **everything), 0, (17,)),
    ):
        found = sample(rows, [one] * 3, sampler=kernel)
        assert [one.error is None for one in found] == [True, False, True]
        assert word in str(found[1].error)
        none = sample(torch.full((1, 301), -math.inf), [one], sampler=kernel)
        assert "all minus infinite" in str(none[0].error)


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_bans_and_masks_that_leave_nothing(drawn_by: str) -> None:
    draws = [
        Draw(drawer(), 0, (), torch.zeros(301, dtype=torch.bool)),
        Draw(drawer(), 0, tuple(range(301))),
        Draw(drawer(), 0, (5,), torch.arange(301) == 5),
        Draw(drawer(), 0, (), torch.zeros(300, dtype=torch.bool)),
        Draw(drawer(), 0, (5, 999, -1)),
    ]
    found = sample(LOGITS.repeat(5, 1), draws, sampler=sampler(drawn_by))
    assert all("no token is allowed" in str(one.error) for one in found[:3])
    assert "the constraint's mask is torch.bool [300]: expected torch.bool [301]" in str(found[3].error)
    assert found[4].error is None and found[4].token_id != 5


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_penalties_never_forbid_what_was_possible(drawn_by: str) -> None:
    rows = torch.full((2, 301), 3.0)
    rows[:, 7] = -3e38
    only = torch.arange(301) == 7
    draws = [
        Draw(drawer(prompt=(7,), repetition_penalty=2.0), 0, (), only),
        Draw(drawer(logit_bias={7: -1e38}), 0, (), only),
    ]
    assert [(one.error, one.token_id) for one in sample(rows, draws, sampler=sampler(drawn_by))] == [(None, 7)] * 2


@pytest.mark.skipif(len(DRAWN_BY) < 2, reason="no native kernels here")
@given(st.data())
def test_the_kernel_and_numpy_say_the_same(data: st.DataObject) -> None:
    """Whole numbers as logits of few tokens: a border near a drawn number would be a wonder."""
    width = data.draw(st.integers(1, 200), label="width")
    rows, draws = [], []
    for index in range(data.draw(st.integers(1, 4), label="rows")):
        tokens = st.integers(0, width - 1)
        one = drawer(
            index,
            prompt=tuple(data.draw(st.lists(tokens, max_size=5))),
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 1.9])),
            top_k=data.draw(st.integers(0, 30)),
            top_p=data.draw(st.sampled_from([1.0, 0.913, 0.377])),
            min_p=data.draw(st.sampled_from([0.0, 0.0123, 0.277])),
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.3])),
            frequency_penalty=data.draw(st.sampled_from([0.0, 0.5])),
            logit_bias=data.draw(st.dictionaries(tokens, st.integers(-5, 5), max_size=3)),
            logprobs=data.draw(st.sampled_from([None, 0, 3])),
        )
        for token in data.draw(st.lists(tokens, max_size=4)):
            one.said(token)
        mask = torch.arange(width) % 3 != 1 if data.draw(st.booleans()) else None
        draws.append(Draw(one, index, tuple(data.draw(st.lists(tokens, max_size=2))), mask))
        rows.append(np.array(data.draw(st.lists(st.integers(-4, 4), min_size=width, max_size=width)), dtype=np.float32))
    logits = torch.from_numpy(np.stack(rows))
    at = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=len(draws), max_size=len(draws)))
    wanted = sample(logits, draws, at=at)
    found = sample(logits, draws, at=at, sampler=sampler(DRAWN_BY[1].values[0]))  # type: ignore[arg-type]
    for one, other in zip(found, wanted, strict=True):
        assert (one.token_id, one.error) == (other.token_id, other.error)
        assert (one.logprobs is None) == (other.logprobs is None)
        if one.logprobs is not None and other.logprobs is not None:
            assert one.logprobs.logprob == pytest.approx(other.logprobs.logprob, abs=1e-5)
            assert [token for token, _ in one.logprobs.top] == [token for token, _ in other.logprobs.top]


@pytest.mark.parametrize("drawn_by", DRAWN_BY)
def test_logprobs_of_many_rows(drawn_by: str) -> None:
    rows = torch.stack([LOGITS, LOGITS.flip(0), 3 * LOGITS])
    found = logprobs(rows, [7, 300, 0], 4, sampler(drawn_by))
    assert found is not None
    for row, one in zip(rows, found, strict=True):
        other = logprobs_of(row.numpy(), one.token_id, 4)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-6)
        assert [token for token, _ in one.top] == [token for token, _ in other.top]
    rows[1, 5] = math.nan
    assert logprobs(rows, [7, 300, 0], 4, sampler(drawn_by)) is None


def test_logprobs_are_the_models_own() -> None:
    wanted = torch.log_softmax(LOGITS.double(), 0)
    found = logprobs_of(LOGITS.numpy(), 7, 3)
    assert found.logprob == pytest.approx(float(wanted[7]), abs=1e-6)
    assert [token for token, _ in found.top] == wanted.topk(3).indices.tolist()
    assert sum(math.exp(value) for _, value in logprobs_of(LOGITS.numpy(), 0, 301).top) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", -1), ("max_tokens", 1.5), ("min_tokens", -1), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", 10**400), ("temperature", "1"), ("temperature", True), ("top_k", -2),
        ("top_p", 1.1), ("top_p", -0.1), ("min_p", 2), ("repetition_penalty", 0), ("repetition_penalty", -1), ("n", 0),
        ("seed", 1.0), ("stop", [""]), ("stop", [1]), ("stop_token_ids", [-1]), ("logprobs", -1),
        ("logit_bias", {1: math.nan}), ("logit_bias", {"1": 1.0}), ("frequency_penalty", None),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(param: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{param: value})  # type: ignore[arg-type]
    assert caught.value.param == param
    assert param in str(caught.value) and len(str(caught.value)) < 200


def test_settings_that_contradict() -> None:
    with pytest.raises(RequestError, match="min_tokens=5 and max_tokens=4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(stop="x").stop == ("x",)
