"""What a launch makes of its ranks' ends."""

from __future__ import annotations

import pytest

from trivium.cli.launching import _conclude, _Words


def words(**signals: int) -> _Words:
    """torchrun's post-mortem of ranks that signals have ended."""
    text = b"".join(
        b"  rank      : %d (local_rank: %d)\n  exitcode  : -%d (pid: 1)\n" % (int(rank[1:]), int(rank[1:]), number)
        for rank, number in signals.items()
    )
    return _Words(ending=[text])


@pytest.mark.parametrize(
    ("signals", "named"),
    [({"r0": 15, "r1": 9}, [1]), ({"r0": 9, "r1": 15, "r2": 11}, [0, 2]), ({"r0": 15, "r1": 15}, [0, 1])],
)
def test_ranks_that_torchrun_ended_because_of_another_are_no_cause(
    signals: dict[str, int], named: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that had not yet seen the loss of its peer has nothing to say when SIGTERM comes."""
    assert _conclude(1, [], words(**signals), len(signals), 0) == (1, None)
    told = caplog.text
    assert [rank for rank in range(len(signals)) if f"the cause was rank {rank}, which ended killed" in told] == named
