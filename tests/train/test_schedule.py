"""The learning rate's factor, step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.errors import ConfigError
from trivium.train.schedule import ScheduleConfig, factor


def test_warm_up_rises_to_one_in_equal_steps() -> None:
    config = ScheduleConfig(warmup_steps=4)
    assert [factor(config, step, 100) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_passes_the_middle_and_ends_at_the_minimum() -> None:
    config = ScheduleConfig(kind="cosine", warmup_steps=10, min_ratio=0.2)
    assert factor(config, 59, 110) == pytest.approx(0.6)
    assert factor(config, 109, 110) == pytest.approx(0.2)
    values = [factor(config, step, 110) for step in range(10, 110)]
    assert values == sorted(values, reverse=True) and values[0] < 1.0


def test_wsd_holds_then_falls_in_a_line() -> None:
    config = ScheduleConfig(kind="wsd", warmup_steps=2, min_ratio=0.0, decay_fraction=0.4)
    assert [round(factor(config, step, 10), 4) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0.0]


def test_constant_holds_for_ever() -> None:
    config = ScheduleConfig(kind="constant", warmup_steps=1)
    assert {factor(config, step, 5) for step in range(5)} == {1.0}


@given(
    kind=st.sampled_from(["cosine", "wsd", "constant"]),
    warmup=st.integers(0, 50),
    steps=st.integers(1, 200),
    minimum=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_every_factor_lies_between_nothing_and_one(
    kind: str, warmup: int, steps: int, minimum: float, decay: float
) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, min_ratio=minimum, decay_fraction=decay)  # type: ignore[arg-type]
    for step in range(steps + 3):
        assert 0.0 <= factor(config, step, steps) <= 1.0
    if kind != "constant" and warmup < steps:
        assert factor(config, steps - 1, steps) == pytest.approx(minimum, abs=1e-12)


@pytest.mark.parametrize("wrong", [{"warmup_steps": -1}, {"min_ratio": 1.5}, {"decay_fraction": 0.0}])
def test_wrong_values_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"schedule.{next(iter(wrong))}="):
        ScheduleConfig(**wrong)  # type: ignore[arg-type]
