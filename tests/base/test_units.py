from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.base.errors import ConfigError
from trivium.base.units import format_bytes, format_count, parse_bytes, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80GB", 80 * 10**9),
        ("8GiB", 8 * 2**30),
        ("8 gib", 8 * 2**30),
        ("1.5 KiB", 1536),
        ("0.3B", 1),
        ("512", 512),
        ("1_000kB", 10**6),
        ("2T", 2 * 10**12),
        (7, 7),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_parse_bytes(text: str | int, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GB", "80 GBit", "-1GB", "nan", "1e999GB", "8 8", "٣GB", -1, True])
def test_parse_bytes_refuses(text: str | int) -> None:
    with pytest.raises(ConfigError, match="expected a size"):
        parse_bytes(text)


def test_counts_of_model_cards() -> None:
    assert parse_count("7.5b") == 7_500_000_000
    assert parse_count("1T") == 10**12
    assert parse_count(12) == 12
    assert format_count(13_150_000_000) == "13.15B"
    assert format_count(950) == "950"
    assert format_count(999_999) == "1.00M"
    with pytest.raises(ConfigError, match="expected a count"):
        parse_count("many")


def test_format_bytes() -> None:
    assert format_bytes(1536) == "1.50 KiB"
    assert format_bytes(31.4e9, binary=False) == "31.40 GB"
    assert format_bytes(-5) == "-5 B"
    assert format_bytes(2**20 - 1) == "1.00 MiB"


@given(st.integers(min_value=0, max_value=2**60))
def test_format_bytes_is_read_back(count: int) -> None:
    again = parse_bytes(format_bytes(count, digits=6))
    assert again == pytest.approx(count, rel=1e-6, abs=1)
