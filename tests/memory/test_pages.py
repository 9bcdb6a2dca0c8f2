"""Regions keep their address, lend their pages, and never mix up what they hold."""

from __future__ import annotations

import random
import resource
import sys

import pytest
import torch

from trivium.memory.pages import Pages, Region, recycled_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are moved on Linux only")
PAGE = resource.getpagesize()


def faults(pages: Pages, region: Region) -> int:
    """Page faults that filling and writing ``region`` takes."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pages.fill(region)
    region.memory.fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_a_parked_regions_pages_serve_the_next_without_faults() -> None:
    pages = Pages()
    first, second = pages.region(1000 * PAGE), pages.region(900 * PAGE)
    assert faults(pages, first) >= 900
    pages.park(first)
    assert faults(pages, second) < 100


def test_a_larger_region_collects_from_several() -> None:
    pages = Pages()
    small = [pages.region(300 * PAGE) for _ in range(3)]
    for region in small:
        faults(pages, region)
    for region in small:
        pages.park(region)
    large = pages.region(1000 * PAGE)
    assert 100 <= faults(pages, large) < 200


def test_regions_in_use_never_share_pages() -> None:
    pages, dice = Pages(), random.Random(0)
    regions = [pages.region(dice.randrange(1, 40 * PAGE)) for _ in range(12)]
    addresses = [region.memory.data_ptr() for region in regions]
    used: dict[int, int] = {}
    for turn in range(2000):
        number = dice.randrange(len(regions))
        region = regions[number]
        if number in used:
            assert bool((region.memory == used.pop(number)).all())
            pages.park(region)
        else:
            pages.fill(region)
            region.memory.fill_(turn % 251)
            used[number] = turn % 251
    for number, value in used.items():
        assert bool((regions[number].memory == value).all())
    assert [region.memory.data_ptr() for region in regions] == addresses


def test_where_the_kernel_refuses_pages_are_faulted_in(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    monkeypatch.setattr(pages, "_move", lambda *arguments: None)
    first, second = pages.region(500 * PAGE), pages.region(500 * PAGE)
    faults(pages, first)
    pages.park(first)
    assert faults(pages, second) >= 400
    assert bool((second.memory == 1).all())
    assert faults(pages, first) >= 400


def test_devices_without_movable_pages_have_none() -> None:
    assert recycled_pages(torch.device("cuda")) is None
    assert recycled_pages(torch.device("cpu")) is not None
