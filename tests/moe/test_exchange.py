"""Hierarchical and coordinated exchanges: the bits of the flat one, and the paper's numbers of messages."""

from __future__ import annotations

from typing import Any

import pytest

from tests.moe.exchange_cases import EXPERTS, ROW_BYTES
from trivium.base.errors import ConfigError
from trivium.dist.exchange import ExchangeConfig

PHASES = ("dispatch", "combine", "combine.backward", "dispatch.backward")
FLAT: dict[str, Any] = {"kind": "flat"}


def by_axis(tallies: dict[str, tuple[int, int]], axis: str, what: int) -> list[int]:
    return [tallies[f"{phase} on {axis}"][what] for phase in PHASES]


def cells(world: Any, size: int, *arguments: Any) -> list[Any]:
    found = world(size).run("tests.moe.exchange_cases", "every_way", *arguments, timeout=120)
    for different, _, _, compared in found:
        assert not any(different), different
        assert {"y", "x", "gate.weight"} < set(compared) and any(name.startswith("experts.") for name in compared)
    return found


@pytest.mark.parametrize(("size", "node", "counts"), [(4, 2, [7, 0, 5, 9]), (8, 4, [7, 0, 5, 9, 1, 4, 4, 6])])
def test_hierarchical_is_flat_in_g_plus_p_over_g_messages(world: Any, size: int, node: int, counts: list[int]) -> None:
    ways = [FLAT, {"kind": "hierarchical", "node": node}]
    ways += [{"kind": "auto", "node": node, "crossover_bytes": limit} for limit in (0, 10**9)]
    found = cells(world, size, size, 1, ways, counts)
    share, axes = EXPERTS // size, ("ep", f"ep/{node}", f"ep/{node}/across")
    loads = [load for _, _, load, _ in found]
    to = [[sum(load[o * share : (o + 1) * share]) for o in range(size)] for load in loads]  # source → owner
    for rank, (_, (flat, hierarchical, as_flat, as_hierarchical), _, _) in enumerate(found):
        first, place = rank - rank % node, rank % node
        assert by_axis(flat, axes[0], 0) == [size - 1] * 4
        assert by_axis(hierarchical, axes[1], 0) == [node - 1] * 4
        assert by_axis(hierarchical, axes[2], 0) == [size // node - 1] * 4
        assert hierarchical[f"dispatch.counts on {axes[1]}"][0] == node - 1
        away = sum(to[rank]) - to[rank][rank]
        assert by_axis(flat, axes[0], 1)[0] == away * ROW_BYTES
        inside = sum(to[rank][o] for o in range(size) if o % node != place)
        across = sum(
            to[first + g][o] for g in range(node) for o in range(place, size, node) if not first <= o < first + node
        )
        assert by_axis(hierarchical, axes[1], 1)[0] == inside * ROW_BYTES
        assert by_axis(hierarchical, axes[2], 1)[0] == across * ROW_BYTES
        assert "dispatch on ep" in as_flat and as_hierarchical == hierarchical


@pytest.mark.parametrize(("size", "tp", "counts"), [(4, 2, [7, 5]), (8, 2, [7, 0, 5, 9]), (8, 4, [6, 3])])
def test_coordinated_is_flat_in_p_over_l_messages(world: Any, size: int, tp: int, counts: list[int]) -> None:
    groups = size // tp
    ways = [FLAT, {"kind": "coordinated"}]
    ways += [{"kind": "coordinated", "node": 2}] if groups == 4 else []
    found = cells(world, size, groups, tp, ways, counts)
    share = EXPERTS // size
    for rank, (_, (flat, coordinated, *others), load, _) in enumerate(found):
        source, place = divmod(rank, tp)
        to = [sum(load[o * share : (o + 1) * share]) for o in range(size)]
        assert by_axis(coordinated, "ep", 0) == [groups - 1] * 4
        for phase in ("combine", "dispatch.backward"):  # what comes home is gathered
            assert coordinated[f"{phase} on tp"][0] == tp - 1
        assert "dispatch on tp" not in coordinated and "combine.backward on tp" not in coordinated
        like = sum(to[e * tp + place] for e in range(groups) if e != source)
        assert coordinated["dispatch on ep"][1] == like * ROW_BYTES
        assert coordinated["combine on tp"][1] == (tp - 1) * sum(to[place::tp]) * ROW_BYTES
        assert flat["dispatch on ep"][1] == sum(to[o] for o in range(size) if o // tp != source) * ROW_BYTES
        for inner in others:
            assert by_axis(inner, "ep/2", 0) == by_axis(inner, "ep/2/across", 0) == [1] * 4


def test_without_a_crossover_auto_is_flat(world: Any) -> None:
    for _, (flat, auto), _, _ in cells(world, 4, 4, 1, [FLAT, {}], [7, 0, 5, 9]):
        assert auto == flat


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [("aaaa", 4), ("aabb", 2), ("abcd", 1), ("aaab", 1), ("aabc", 1), ("abab", 1), ("abba", 1), ("aaba", 1)],
)
def test_hosts_make_nodes_only_where_they_are_alike(world: Any, hosts: str, expected: int) -> None:
    assert world(4).run("tests.moe.exchange_cases", "hosts", list(hosts)) == [expected] * 4


@pytest.mark.parametrize("how", ["other", "permuted"])
def test_different_tokens_in_a_tensor_group_are_refused_on_all(world: Any, how: str) -> None:
    for words in world(2).run("tests.moe.exchange_cases", "apart", how):
        assert "tensor-parallel ranks beginning with rank 0 route different tokens" in words


def test_the_same_tokens_are_not(world: Any) -> None:
    assert world(2).run("tests.moe.exchange_cases", "apart", "same") == ["no error"] * 2


def test_experts_apart_over_the_tensor_axis_are_neither_sharded_nor_saved(world: Any, tmp_path: Any) -> None:
    for said in world(2).run("tests.moe.exchange_cases", "under_zero", tmp_path):
        assert len(said) == 3
        for words, doing in zip(said, ("shard", "save", "export"), strict=True):
            assert doing in words and "moe.experts is spread over the tp axis" in words
            assert "exchange='flat' or 'hierarchical'" in words
        assert said[0].startswith("ConfigError")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "ring"}, "exchange='ring'"),
        ({"node": 0}, "exchange.node=0"),
        ({"crossover_bytes": -1}, "crossover_bytes=-1"),
        ({"kind": "flat", "node": 2}, "exchange.node=2 has no effect with kind='flat'"),
        ({"node": 2}, "exchange.node=2 has no effect with kind='auto'"),
        (
            {"kind": "hierarchical", "crossover_bytes": 4096},
            "crossover_bytes=4096 has no effect with kind='hierarchical'",
        ),
        ({"kind": "coordinated", "crossover_bytes": 0}, "crossover_bytes=0 has no effect with kind='coordinated'"),
    ],
)
def test_exchanges_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ExchangeConfig(**options)
