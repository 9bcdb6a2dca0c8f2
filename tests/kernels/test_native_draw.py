"""Native draws against an oracle in fp64 and the numpy reference: the same token, in any company, on any row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.steps import NATIVE, sampler, variants
from trivium.base.errors import ConfigError
from trivium.inference.draw import best_of, draw
from trivium.inference.request import SamplingParams
from trivium.kernels.draws import Draws, Sampler, Tokens

Row = npt.NDArray[np.float32]
Weights = npt.NDArray[np.float64]
# Of all mass: how far from the border between two tokens rounding may matter.
NEAR = 1e-6
WIDTHS = (1, 2, 15, 17, 127, 128, 129, 300, 2047, 2049, 9_000, 70_001)


@dataclass(frozen=True)
class Wanted:
    """One draw's settings; ``tops`` −1: no log-probabilities."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5
    tops: int = -1


def draws(wanted: Sequence[Wanted], rows: Sequence[int] | None = None, **more: Any) -> Draws:
    return Draws(
        rows=range(len(wanted)) if rows is None else rows,
        temperature=[one.temperature for one in wanted],
        top_k=[one.top_k for one in wanted],
        top_p=[one.top_p for one in wanted],
        min_p=[one.min_p for one in wanted],
        uniform=[one.uniform for one in wanted],
        tops=[one.tops for one in wanted],
        **more,
    )


def row_of(kind: str, width: int, seed: int) -> Row:
    """Rows of every shape that the kernel treats in a way of its own."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal(width)
    values = {
        "peaked": 4 * normal,
        "flat": 0.3 * normal,
        "even": np.full(width, -2.5),
        "ties": np.round(3 * normal),
        "zeros": np.where(normal > 0, 0.0, -0.0),
        "holes": np.where(generator.random(width) < 0.97, -np.inf, normal),
        "outlier": np.where(np.arange(width) == width // 3, 9.0, 1e-4 * normal),
        "steep": 1e3 * normal,
        "huge": np.clip(3e38 * normal, -3.4e38, 3.4e38),
        "lowest": np.full(width, np.finfo(np.float32).min),
    }[kind].astype(np.float32)
    values[generator.integers(width)] = values.max() if values.max() > -np.inf else 1.0
    return values


def possible(row: Row, one: Wanted) -> set[int]:
    """The tokens that may be drawn, in fp64: more than one where a border lies near."""
    highest = float(row.max())
    heat = float(np.float32(min(max(one.temperature, 1e-30), 1e30)))
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp((row.astype(np.float64) - highest) / heat)
    least = float(np.float32(one.min_p))
    if one.top_k <= 0 and one.top_p >= 1.0:
        many = [np.where(weights >= min(least * near, 1.0), weights, 0) for near in (1 - 1e-5, 1 + 1e-5)]
        return {int(token) for kept in many for token in near_places(kept, np.array([len(kept)]), one.uniform)}
    order = np.argsort(-row, kind="stable")
    order = order[: one.top_k] if one.top_k > 0 else order
    weights = weights[order]
    running = np.cumsum(weights)
    ends = []
    for near in (-1, 1):
        keep = len(order)
        if one.top_p < 1.0:
            keep = min(keep, 1 + int(np.searchsorted(running, (one.top_p + near * NEAR) * running[-1], side="left")))
        ends.append(min(keep, max(1, int((weights >= least * (1 - near * 1e-5)).sum()))))
    return {int(order[place]) for place in near_places(weights, np.arange(ends[0], ends[1] + 1), one.uniform)}


def near_places(weights: Weights, keeps: npt.NDArray[np.intp], uniform: float) -> npt.NDArray[np.intp]:
    """Where ``uniform`` falls among the first ``keeps`` weights, and what lies near it; never where nothing is."""
    running = np.cumsum(weights)
    ends = running[keeps - 1]
    first = np.searchsorted(running, (uniform - NEAR) * ends, side="right").min()
    last = np.minimum(np.searchsorted(running, (uniform + NEAR) * ends, side="right"), np.searchsorted(running, ends))
    places = np.arange(min(first, last.max()), last.max() + 1)
    return places[weights[places] > 0]


def params(one: Wanted) -> SamplingParams:
    return SamplingParams(temperature=one.temperature, top_k=one.top_k, top_p=one.top_p, min_p=one.min_p)


KINDS = ("peaked", "flat", "even", "ties", "zeros", "holes", "outlier", "steep", "huge", "lowest")
SETTINGS = (
    Wanted(),
    Wanted(temperature=0.3),
    Wanted(temperature=1e-30),
    Wanted(temperature=1e30),
    Wanted(min_p=0.05),
    Wanted(min_p=1.0),
    Wanted(top_p=0.9),
    Wanted(top_p=0.5, temperature=1.7),
    Wanted(top_p=0.999999),
    Wanted(top_p=1e-12),
    Wanted(top_p=0.97, min_p=0.2),
    Wanted(top_k=1),
    Wanted(top_k=50),
    Wanted(top_k=50, top_p=0.9),
    Wanted(top_k=50, top_p=0.8, min_p=0.3),
    Wanted(top_k=700, top_p=0.95, temperature=1.5),
    Wanted(top_k=2_000_000_000),
    Wanted(top_k=2_000_000_000, top_p=0.7, min_p=0.01),
)


def check(found: Sampler, rows: Sequence[Row], wanted: Sequence[Wanted]) -> None:
    """Every setting on every row: as the oracle says; where no border is near, as the reference says."""
    pairs = [(place, one) for place in range(len(rows)) for one in wanted]
    got = found.draw(torch.from_numpy(np.stack(rows)), draws([one for _, one in pairs], [place for place, _ in pairs]))
    for (place, one), token in zip(pairs, got.token, strict=True):
        allowed = possible(rows[place], one)
        assert token in allowed, (place, one)
        if len(allowed) == 1:
            assert draw(rows[place], params(one), one.uniform) == token, (place, one)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("width", WIDTHS)
def test_as_the_oracle_and_the_reference(variant: str, width: int) -> None:
    kinds, cuts = (KINDS, SETTINGS) if width < 9_000 else (("peaked", "flat", "outlier"), SETTINGS[::2])
    uniforms = np.random.default_rng(width).random(len(cuts))
    wanted = [replace(one, uniform=uniform) for one, uniform in zip(cuts, uniforms, strict=True)]
    check(sampler(variant), [row_of(kind, width, width) for kind in kinds], wanted)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_the_ends_of_the_interval(variant: str, uniform: float) -> None:
    wanted = [replace(one, uniform=uniform) for one in SETTINGS]
    check(sampler(variant), [row_of(kind, 3_000, 5) for kind in KINDS], wanted)


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    width=st.integers(1, 5_000),
    seed=st.integers(0, 2**32 - 1),
    one=st.builds(
        Wanted,
        temperature=st.sampled_from([1e-30, 1e-3, 0.5, 1.0, 2.5, 1e6, 1e30]),
        top_k=st.one_of(st.integers(-1, 60), st.integers(1, 6_000)),
        top_p=st.one_of(st.just(1.0), st.floats(1e-12, 1.0)),
        min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
        uniform=st.floats(0.0, 1.0, exclude_max=True),
    ),
)
def test_any_row_and_any_settings(kind: str, width: int, seed: int, one: Wanted) -> None:
    for variant in variants():
        check(sampler(variant), [row_of(kind, width, seed)], [one])


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(("width", "count"), [(1, 1), (129, 64), (2_500, 512), (9_000, 8_192)])
def test_whole_numbers_leave_no_rounding(variant: str, width: int, count: int) -> None:
    """Weights of 1 and 0, and as many ones as a power of two: the borders themselves belong to the token after them."""
    row = np.full(width, -np.inf, dtype=np.float32)
    ones = np.sort(np.random.default_rng(width).permutation(width)[:count])
    row[ones] = 2.0
    cuts = ((Wanted(), count), (Wanted(top_k=max(1, count // 2)), max(1, count // 2)), (Wanted(min_p=1.0), count))
    cuts += ((Wanted(top_p=0.25), max(1, count // 4)), (Wanted(top_k=4 * width), count))
    wanted, right = [], []
    for one, kept in cuts:
        for i in range(0, kept, max(1, kept // 64)):
            for shift in (0.0, 0.5):
                wanted.append(replace(one, uniform=(i + shift) / kept))
                right.append(int(ones[i]))
    got = sampler(variant).draw(torch.from_numpy(row[None]), draws(wanted, [0] * len(wanted)))
    assert got.token == right


def told(tokens: Tokens, place: int) -> list[Any]:
    """All that is told of a draw; NaN as a word."""
    found = [tokens.token[place], str(tokens.best[place]), str(tokens.left[place])]
    return [*found, tokens.whole[place], tokens.top[place]] if math.isfinite(tokens.best[place]) else found


@pytest.mark.parametrize("variant", NATIVE)
def test_a_row_never_depends_on_its_company(variant: str) -> None:
    width, count = 5_003, 32  # enough for three threads
    generator = np.random.default_rng(0)
    rows = np.stack([row_of(KINDS[i % len(KINDS)], width, i) for i in range(count)])
    rows[7, 5], rows[9, 0], rows[11] = np.nan, np.inf, -np.inf
    wanted = [replace(SETTINGS[i % len(SETTINGS)], uniform=generator.random(), tops=4) for i in range(count)]
    logits = torch.from_numpy(rows)
    one, three = sampler(variant, 1), sampler(variant, 3)
    alone = [told(one.draw(logits[i : i + 1].clone(), draws(wanted[i : i + 1])), 0) for i in range(count)]
    assert [len(found) for found in alone].count(3) == 3
    for _ in range(3):
        for many in (one, three):
            together = many.draw(logits, draws(wanted))
            assert [told(together, i) for i in range(count)] == alone
            backwards = many.draw(logits, draws(wanted[::-1], range(count)[::-1]))
            assert [told(backwards, i) for i in range(count)][::-1] == alone


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("width", [1, 16, 129, 5_000])
def test_the_likeliest_and_what_is_wrong_with_a_row(variant: str, width: int) -> None:
    generator = np.random.default_rng(width)
    rows = np.round(3 * generator.standard_normal((200, width))).astype(np.float32)
    rows[1:4] = np.stack([np.full(width, -np.inf), np.full(width, np.nan), np.full(width, -np.float32(3.4e38))])
    for i in range(20, 40):
        rows[i, generator.integers(width)] = np.nan
        rows[i, generator.integers(width)] = np.inf
    for i in range(40, 60):
        rows[i, generator.integers(width)] = np.inf
    for temperature in (0.0, 1.0):
        got = sampler(variant, 2).draw(torch.from_numpy(rows), draws([Wanted(temperature=temperature)] * len(rows)))
        at = rows.argmax(axis=1)
        best = rows[np.arange(len(rows)), at]
        assert np.array_equal(got.best, best, equal_nan=True)
        plain = ~np.isfinite(best) if temperature else np.ones(len(rows), dtype=bool)
        assert np.array_equal(np.array(got.token)[plain], at[plain])


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("width", [1, 130, 5_003])
def test_masks_and_edits(variant: str, width: int) -> None:
    generator = np.random.default_rng(width)
    rows, allowed, edits, changed = [], [], [], []
    for i in range(40):
        row = row_of("peaked", width, i)
        mask = None if i % 3 == 0 else generator.random(width) < (0.3, 0.0)[i % 7 == 1]
        ids = generator.integers(0, width, i % 5).astype(np.int32)
        values = np.where(generator.random(len(ids)) < 0.3, -np.inf, 20 * generator.random(len(ids))).astype(np.float32)
        other = row.copy()
        for token, value in zip(ids, values, strict=True):
            other[token] = value
        if mask is not None:
            other[~mask] = -np.inf
        rows.append(row)
        changed.append(other)
        allowed.append(None if mask is None else torch.from_numpy(mask))
        edits.append((torch.from_numpy(ids), torch.from_numpy(values)) if len(ids) else None)
    wanted = [replace(SETTINGS[i % len(SETTINGS)], uniform=generator.random()) for i in range(40)]
    found = sampler(variant, 2)
    got = found.draw(torch.from_numpy(np.stack(rows)), draws(wanted, allowed=allowed, edits=edits))
    plain = found.draw(torch.from_numpy(np.stack(changed)), draws(wanted))
    assert got.best == [float(row.max()) for row in rows]
    assert got.left == [float(row.max()) for row in changed]
    left = np.isfinite(got.left)
    assert np.array_equal(np.array(got.token)[left], np.array(plain.token)[left])
    likeliest = found.draw(
        torch.from_numpy(np.stack(rows)), draws([Wanted(temperature=0.0)] * 40, allowed=allowed, edits=edits)
    )
    assert likeliest.token == [int(row.argmax()) for row in changed]


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("kind", ["peaked", "ties", "holes", "even", "lowest"])
def test_log_probabilities(variant: str, kind: str) -> None:
    for width in (1, 127, 3_001):
        row = row_of(kind, width, 1)
        counts = [count for count in (0, 1, 20, 200, width) if count <= width]
        wanted = [Wanted(tops=count, temperature=heat, top_p=0.5) for count in counts for heat in (0.0, 1.0, 0.7)]
        got = sampler(variant).draw(torch.from_numpy(row[None]), draws(wanted, [0] * len(wanted)))
        whole = float(np.logaddexp.reduce(row.astype(np.float64)))
        for place, one in enumerate(wanted):
            assert got.whole[place] == pytest.approx(whole, rel=1e-6, abs=1e-6)
            assert got.top[place] == (best_of(row, one.tops).tolist() if one.tops else [])
        without = sampler(variant).draw(
            torch.from_numpy(row[None]), draws([replace(one, tops=-1) for one in wanted], [0] * len(wanted))
        )
        assert got.token == without.token


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize(
    "one", [Wanted(), Wanted(temperature=2.0), Wanted(top_k=9), Wanted(top_p=0.8), Wanted(min_p=0.1)]
)
def test_many_draws_follow_the_distribution(variant: str, one: Wanted) -> None:
    row, count = row_of("peaked", 40, 3), 20_000
    uniforms = np.random.default_rng(11).random(count).tolist()
    wanted = [replace(one, uniform=uniform) for uniform in uniforms]
    got = sampler(variant).draw(torch.from_numpy(row[None]), draws(wanted, [0] * count)).token
    order = np.argsort(-row, kind="stable")[: one.top_k or None]
    weights = np.exp((row[order].astype(np.float64) - row.max()) / one.temperature)
    keep = 1 + int(np.searchsorted(np.cumsum(weights), one.top_p * weights.sum())) if one.top_p < 1 else len(order)
    order, weights = order[:keep], weights[:keep]
    order, weights = order[weights >= one.min_p], weights[weights >= one.min_p]
    shares = np.zeros(len(row))
    shares[order] = weights / weights.sum()
    counts = np.bincount(got, minlength=len(row))
    assert counts[shares == 0].sum() == 0
    enough = shares * count >= 5
    chi = float((((counts - shares * count) ** 2)[enough] / (shares * count)[enough]).sum())
    freedom = int(enough.sum()) - 1
    # Wilson and Hilferty's bound at p = 0.0001.
    assert chi < max(1, freedom) * (1 - 2 / (9 * max(1, freedom)) + 3.72 * math.sqrt(2 / (9 * max(1, freedom)))) ** 3


BAD: dict[str, dict[str, Any]] = {
    r"rows\[1\]: 2, expected 0 to 1": {"rows": [0, 2]},
    r"rows\[0\]: -1": {"rows": [-1, 0]},
    r"temperature\[1\]: nan": {"temperature": [1.0, math.nan]},
    r"top_p\[0\]: 1.5": {"top_p": [1.5, 1.0]},
    r"min_p\[0\]: -0.5": {"min_p": [-0.5, 0.0]},
    r"uniform\[1\]: 2": {"uniform": [0.0, 2.0]},
    "draws.rows: ": {"rows": [0, 2**31]},
    "draws.temperature: ": {"temperature": ["hot", 1.0]},
    "top_k: 3 entries for 2 draws": {"top_k": [0, 0, 0]},
    r"edits\[1\]: token 9": {"edits": [None, (torch.tensor([9], dtype=torch.int32), torch.zeros(1))]},
    "as many float32": {"edits": [None, (torch.tensor([1], dtype=torch.int32), torch.zeros(2))]},
    r"contiguous bool \[9\]": {"allowed": [torch.ones(8, dtype=torch.bool), None]},
    "on the CPU, got torch.bool .* on meta": {"allowed": [torch.ones(9, dtype=torch.bool, device="meta"), None]},
    "logits on the CPU, got .* on meta": {
        "edits": [None, (torch.zeros(1, dtype=torch.int32, device="meta"), torch.zeros(1))]
    },
    r"int32 ids \[N\]": {"edits": [None, (torch.tensor(1, dtype=torch.int32), torch.tensor(1.0))]},
    r"tops\[0\]: 10, expected -inf to 9": {"tops": [10, 0]},
    "for each of 2": {"allowed": [None]},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_draws_are_named(message: str) -> None:
    if not variants():
        pytest.skip("no native kernels here")
    wanted = replace(draws([Wanted(), Wanted()]), **BAD[message])
    with pytest.raises(ConfigError, match=message):
        sampler(variants()[0]).draw(torch.zeros(2, 9), wanted)


@pytest.mark.parametrize("variant", variants())
def test_whatever_is_not_zero_in_a_mask_allows(variant: str) -> None:
    logits, mask = torch.zeros(1, 70), torch.zeros(70, dtype=torch.uint8)
    mask[3], mask[40], mask[69] = 2, 255, 128
    for best in (3, 40, 69):
        logits[0, best] += 1 + best
        found = sampler(variant).draw(logits, draws([Wanted(temperature=0.0)], allowed=[mask.view(torch.bool)]))
        assert found.token == [best]


def test_bad_logits_are_named() -> None:
    if not variants():
        pytest.skip("no native kernels here")
    found = sampler(variants()[0])
    for logits in (torch.zeros(2, 9).double(), torch.zeros(9), torch.zeros(9, 2).t()):
        with pytest.raises(ConfigError, match="logits: expected contiguous float32"):
            found.draw(logits, draws([Wanted()]))
    with pytest.raises(ConfigError, match="do not fit logits"):
        found.draw(torch.zeros(2, 0), draws([Wanted()]))
    assert found.draw(torch.zeros(0, 9), draws([])).token == []
