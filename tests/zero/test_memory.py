"""The paper's memory: states by the formula, two units gathered, buffers of constant size, no growth."""

from __future__ import annotations

import pytest

from tests.worlds import Worlds
from trivium.models import build, preset
from trivium.zero.placement import lay_out
from trivium.zero.units import assign


@pytest.mark.parametrize("size", [1, 2, 4])
def test_states_equal_the_formula(world: Worlds, size: int) -> None:
    for results in world(size).run("tests.zero.traffic_cases", "states"):
        for stage, result in enumerate(results):
            numel, padding, live = result["numel"], result["padding"], result["live"]
            held_gradients = result["peak"]["gradients"]
            parameters = numel / size if stage == 3 else numel
            gradients = numel / size if stage >= 2 else numel
            optimizer = 2 * (numel / size if stage >= 1 else numel)
            expected = 4 * (parameters + gradients + optimizer)
            held = live["parameters"] + held_gradients + live["optimizer"]
            assert expected - 2 * 4 * padding - 16 * 200_000 * (size > 1) <= held
            assert live["parameters"] <= 4 * (parameters + padding)
            assert held_gradients <= 4 * (gradients + padding)
            assert live["gradients"] == (0 if stage >= 2 else held_gradients)  # after zero_grad
            assert live["optimizer"] <= 4 * (optimizer + 2 * padding)
            assert padding <= 0.001 * numel
            assert live == result["before"]
            assert result["peak"].get("gathered", 0) <= result["bound"]
            assert (result["peak"].get("gathered", 0) > 0) == (stage == 3)
            assert live.get("gathered", 0) == 0
            assert result["peak"]["buffers"] <= 2 << 20


@pytest.mark.parametrize("recompute", ["reentrant", "saved"])
def test_two_units_gathered_under_activation_checkpointing(world: Worlds, recompute: str) -> None:
    for peak, bound in world(2).run("tests.zero.traffic_cases", "peak_gathered", recompute):
        assert 0 < peak <= bound


@pytest.mark.parametrize("vocabulary", [100, 40_000])
def test_buffers_at_any_vocabulary_and_in_several_dtypes(world: Worlds, vocabulary: int) -> None:
    for sizes in world(2).run("tests.zero.traffic_cases", "buffers", vocabulary):
        assert all(0 < size <= 2 << 20 for size in sizes)


@pytest.mark.parametrize("stage", [2, 3])
def test_nothing_grows(world: Worlds, stage: int) -> None:
    for resident, counted, same_peaks in world(2).run("tests.zero.traffic_cases", "growth", stage):
        assert counted == 0 and same_peaks
        assert resident < 6 << 20


def test_rank_0_of_1024_holds_15_6_gb_of_a_trillion() -> None:
    """Table 1 of the paper, last column and row: 16 B per parameter over 1024 ranks; nothing is allocated."""
    model = build(preset("1t"), "meta")
    parameters = dict(model.named_parameters())
    held = 0
    for spec in assign(model, "auto", {}):
        for key, names in spec.flats.items():
            layout = lay_out([parameters[name].numel() for name in names], 1024, key.dtype.itemsize)
            held += sum(
                overlap.length for index in range(len(names)) if (overlap := layout.overlap(index, 0)) is not None
            )
    numel = sum(parameter.numel() for parameter in parameters.values())
    assert 16 * held / 1e9 == pytest.approx(16 * numel / 1024 / 1e9, rel=0.001)
    assert round(16 * held / 1e9, 1) == 15.6
