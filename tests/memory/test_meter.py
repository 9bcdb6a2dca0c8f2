"""Live and peak bytes per label and tier."""

from __future__ import annotations

from trivium.memory.meter import Meter


def test_live_and_peak() -> None:
    meter = Meter()
    meter.add("gathered", 100)
    meter.add("gathered", 50)
    meter.add("gathered", -120)
    meter.add("parameters", 7)
    meter.add("parameters", 5, tier="host")
    assert meter.live_bytes("gathered") == 30
    assert meter.peak_bytes("gathered") == 150
    assert meter.live_bytes() == 37
    assert meter.live_bytes(tier="host") == 5
    assert meter.by_label() == {"gathered": 30, "parameters": 7}
    assert meter.by_label(peak=True) == {"gathered": 150, "parameters": 7}
    meter.reset_peak()
    assert meter.peak_bytes("gathered") == 30
    assert meter.peak_bytes("never") == meter.live_bytes("never") == 0
