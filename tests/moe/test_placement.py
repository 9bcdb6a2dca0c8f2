"""The paper's example of multi-expert, multi-data parallelism (DeepSpeed-MoE 4.1), on 128 ranks that are not there."""

from __future__ import annotations

import itertools

import pytest
import torch

from trivium.dist import mesh as meshes
from trivium.dist.comm import Comm
from trivium.dist.mesh import Mesh
from trivium.moe import MoE
from trivium.zero.units import assign

RANKS = 128
LAYERS = (32, 64, 128)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups without processes: making them sends nothing, and every rank says what this one says."""
    monkeypatch.setattr(meshes.dist, "new_group", lambda *options, **named: object())
    monkeypatch.setattr(Comm, "all_gather_json", lambda comm, value: [value] * comm.size)


@pytest.mark.usefixtures("fake")
def test_every_rank_of_128_holds_exactly_one_expert_of_each_layer() -> None:
    holders: dict[tuple[int, str], list[int]] = {}
    groups: dict[tuple[int, str], set[tuple[int, ...]]] = {}
    for rank in range(RANKS):
        mesh = Mesh(rank=rank, size=RANKS, device=torch.device("cpu"))
        layers = [
            MoE(4, 8, experts, top_k=1, mesh=mesh, ep=experts, exchange="flat", layer=number, seed=0, device="meta")
            for number, experts in enumerate(LAYERS)
        ]
        assert mesh.comm("dp").size == RANKS
        for number, (layer, experts, replicas) in enumerate(zip(layers, LAYERS, (4, 2, 1), strict=True)):
            (name,) = (name for name, _ in layer.experts.named_children())
            across = mesh.comm(layer.experts.placement.axis)
            assert layer.comm_size == experts and across.size == replicas
            holders.setdefault((number, name), []).append(rank)
            groups.setdefault((number, name), set()).add(across.ranks)
    for number, (experts, replicas) in enumerate(zip(LAYERS, (4, 2, 1), strict=True)):
        assert {name for layer, name in holders if layer == number} == {str(expert) for expert in range(experts)}
        for expert in range(experts):
            where = holders[number, str(expert)]
            assert len(where) == replicas
            assert groups[number, str(expert)] == {tuple(where)}  # its gradient is reduced over exactly its holders


@pytest.mark.usefixtures("fake")
def test_its_units_reduce_dense_weights_over_all_and_experts_over_their_replicas() -> None:
    mesh = Mesh(rank=77, size=RANKS, device=torch.device("cpu"))
    model = torch.nn.Sequential(
        *(
            MoE(4, 8, experts, top_k=1, mesh=mesh, ep=experts, exchange="flat", seed=0, device="meta")
            for experts in LAYERS
        )
    )
    sizes = [
        sorted({(key.axis == "dp", mesh.comm(key.axis).size) for key in spec.flats})
        for spec in assign(model, "auto", {})
        if spec.flats
    ]
    assert sizes == [[(False, 4), (True, 128)], [(False, 2), (True, 128)], [(False, 1), (True, 128)]]


def test_axes_cover_all_ranks_once_at_every_degree() -> None:
    for ep, tp, pp in itertools.product((1, 2, 4), (1, 2), (1, 2)):
        for axis, rows in meshes.axis_rows(32, ep=ep, tp=tp, pp=pp).items():
            assert sorted(rank for row in rows for rank in row) == list(range(32)), axis
        inside, across = meshes.split_rows(meshes.axis_rows(32, ep=ep, tp=tp, pp=pp)["dp"], 4)
        assert all(len(set(one) & set(other)) <= 1 for one in inside for other in across)
