"""Traps that sharded trainers fall into, by the letter under which we noted them; f is every test's one thread."""

from __future__ import annotations

import pytest
import torch

from tests.worlds import Worlds

CASES = "tests.zero.trap_cases"


def test_a_saved_views_survive_release(world: Worlds) -> None:
    for storages, versions, stride, found in world(2).run(CASES, "saved_views"):
        assert (storages, versions, found) == (1, 0, [])
        assert stride == (0, 0)


def test_b_a_released_parameter_can_be_read(world: Worlds) -> None:
    for shape, dtype, name, isnan, held, refused, inside, quarter in world(2).run(CASES, "accidental_reading"):
        assert (shape, dtype, name, isnan, held, quarter) == (
            (20, 16),
            torch.float32,
            "layers.1.up.weight",
            True,
            4,
            True,
        )
        assert all("gathered(model)" in message for message in refused)
        assert "layers.1.up.weight" in inside


def test_c_parameters_start_on_64_bytes(world: Worlds) -> None:
    for found in world(3).run(CASES, "alignment"):
        assert len(found) > 40
        assert set(found) == {0}


@pytest.mark.parametrize("stage", [2, 3])
def test_d_hooks_are_invisible_to_compile(world: Worlds, stage: int) -> None:
    for graphs, found in world(2).run(CASES, "compiled", stage):
        assert graphs == 1
        assert found == []


def test_e_what_nobody_used_is_skipped(world: Worlds) -> None:
    assert world(2).run(CASES, "skipped") == [[], []]


def test_f_every_rank_runs_one_thread(world: Worlds) -> None:
    assert [threads for _, _, threads, _ in world(2).run("tests.cases", "who")] == [1, 1]


def test_g_the_norm_is_better_than_torchs(world: Worlds) -> None:
    for ours, torchs in world(1).run(CASES, "torch_norm"):
        assert ours < 1e-6
        assert ours <= torchs


@pytest.mark.parametrize("what", ["shape", "layer", "dtype", "frozen", "optimizer", "stage", "bucket", "units"])
def test_h_ranks_that_differ_are_told_before_any_payload(world: Worlds, what: str) -> None:
    words = {
        "shape": ["0.weight", "[16, 4]", "[17, 4]"],
        "layer": ["number of parameters"],
        "dtype": ["torch.float64"],
        "frozen": ["1.weight"],
        "optimizer": ["SGD", "AdamW"],
        "stage": ["stage=2", "stage=3"],
        "bucket": ["4096", "8192"],
        "units": ["0.weight", "1.weight"],
    }[what]
    for said, seconds in world(3).run(CASES, "models_that_differ", what):
        assert said.startswith("MismatchError")
        assert all(word in said for word in [*words, "rank 0", "rank 2"])
        assert seconds < 5


def test_i_minus_zero_survives(world: Worlds) -> None:
    assert world(3).run(CASES, "minus_zero") == [[]] * 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_j_parameters_seen_twice_are_reduced_once(world: Worlds, reentrant: bool) -> None:
    assert world(2).run(CASES, "seen_twice", reentrant) == [[], []]


def test_k_one_message_per_unit_and_pass(world: Worlds) -> None:
    for calls, most in world(2).run(CASES, "few_large_messages"):
        assert calls <= most


@pytest.mark.parametrize("units", ["auto", "leaves", "all"])
def test_l_modules_that_read_their_children_are_not_cut(world: Worlds, units: str) -> None:
    assert world(2).run(CASES, "readers", units) == [[], []]


def test_m_a_unit_that_is_read_and_never_called_is_named(world: Worlds) -> None:
    for as_it_is, as_one in world(2).run(CASES, "never_called"):
        assert as_one == "no error"
        assert as_it_is.startswith("ConfigError: layers.0.weight was read, as NaN") and "units=" in as_it_is


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_n_frozen_weights_of_any_dtype(world: Worlds, dtype: torch.dtype) -> None:
    assert world(2).run(CASES, "stored", dtype) == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("sparse", "1 is Embedding(sparse=True)"),
        ("complex", "phase is torch.complex64"),
        ("lazy", "1.weight has no shape yet"),
        ("optimizer", "shard got dict as an optimizer"),
    ],
)
def test_o_what_cannot_be_sharded_is_refused_by_name(world: Worlds, what: str, told: str) -> None:
    for said in world(2).run(CASES, "refused", what):
        assert said.startswith(f"ConfigError: {told}")
