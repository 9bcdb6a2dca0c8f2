"""The ranks along named axes."""

from __future__ import annotations

from tests.worlds import Worlds


def test_axes_of_four_ranks(world: Worlds) -> None:
    found = world(4).run("tests.dist.cases", "axes")
    for rank, axes in enumerate(found):
        low = rank // 2 * 2
        assert axes["ep"]["dp"] == (0, 1, 2, 3)
        assert axes["ep"]["ep"] == (low, low + 1)
        assert axes["ep"]["edp"] == (rank % 2, rank % 2 + 2)
        assert axes["tp"]["tp"] == (low, low + 1)
        assert axes["tp"]["dp"] == (rank % 2, rank % 2 + 2)
        assert axes["tp"]["sum"] == [rank % 2 * 2 + 2]
        assert axes["pp tp"]["pp"] == (rank % 2, rank % 2 + 2)
        assert axes["pp tp"]["dp"] == (rank,)
        assert axes["split"] == ((low, low + 1), (rank % 2, rank % 2 + 2), [2 * low + 1], [rank % 2 * 2 + 2])
        assert axes["cached"]


def test_impossible_degrees_are_told_with_their_numbers(world: Worlds) -> None:
    for said in world(4).run("tests.dist.cases", "impossible"):
        assert len(said) == 5
        words = ["tp=3", "ep=3 does not divide the 4", "mesh.pp=0", "no axis 'no'", "groups of 3"]
        assert all(word in message for word, message in zip(words, said, strict=True))


def test_a_device_mesh_of_torch_is_adopted(world: Worlds) -> None:
    for rank, found in enumerate(world(4).run("tests.dist.cases", "adopted")):
        low = rank // 2 * 2
        assert found["tp"] == (low, low + 1)
        assert found["dp"] == found["edp"] == (rank % 2, rank % 2 + 2)
        assert found["ep"] == found["pp"] == (rank,)
        assert found["world"] == (0, 1, 2, 3)
        assert found["sum"] == [rank % 2 * 2 + 2]
        words = ["no dimension names", "dimension 'data'", "expected the order ('dp', 'tp')"]
        assert all(word in said for word, said in zip(words, found["said"], strict=True)), found["said"]
