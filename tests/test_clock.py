"""The clock that tests hold promises of seconds to never runs backwards, nor stands still."""

from __future__ import annotations

import pytest

from tests import clock
from tests.clock import Since


@pytest.mark.parametrize(("stolen", "seconds"), [(0.0, 40.0), (10.0, 30.0), (39.0, 4.0), (640.0, 4.0)])
def test_what_was_stolen_is_forgiven_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch, stolen: float, seconds: float
) -> None:
    now, gone = [100.0], [7.0]
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "stolen_s", lambda: gone[0])
    since = Since()
    now[0], gone[0] = 140.0, 7.0 + stolen
    assert (since.wall_s(), since.seconds()) == (40.0, seconds)
