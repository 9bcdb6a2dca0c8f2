"""Which signals a run heeds, and until when."""

from __future__ import annotations

import signal

import pytest

from trivium.train.stop import signals


@pytest.mark.parametrize("deaf", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_an_error_on_its_way_out_is_not_cut_off_by_the_launcher(deaf: bool, earlier: bool) -> None:
    """``earlier``: the run had been asked to stop before, so that one more signal would end it at once."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(ValueError, match="a peer is gone"), signals(deaf_after_error=deaf) as stop:
            if earlier:
                signal.raise_signal(signal.SIGINT)
                stop._first_at_s -= 10
            raise ValueError("a peer is gone")
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        if deaf:
            signal.raise_signal(signal.SIGTERM)  # would end this process
        else:
            assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before[signal.SIGTERM])


def test_a_run_that_ended_well_heeds_what_it_heeded_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with signals(deaf_after_error=True) as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop.wish == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
