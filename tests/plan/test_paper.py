"""Every figure of the paper's Tables 1 and 2, as the command prints it."""

from __future__ import annotations

import pytest

from tests.plan.terminal import trivium, trivium_json

TABLE_1 = {
    1: ("120 / 120 / 120", "2048 / 2048 / 2048", "16000 / 16000 / 16000"),
    4: ("52.5 / 41.3 / 30", "896 / 704 / 512", "7000 / 5500 / 4000"),
    16: ("35.6 / 21.6 / 7.5", "608 / 368 / 128", "4750 / 2875 / 1000"),
    64: ("31.4 / 16.6 / 1.88", "536 / 284 / 32", "4187 / 2218 / 250"),
    256: ("30.4 / 15.4 / 0.47", "518 / 263 / 8", "4046 / 2054 / 62.5"),
    1024: ("30.1 / 15.1 / 0.12", "514 / 258 / 2", "4011 / 2013 / 15.6"),
}
TABLE_2 = {1: (2e9, 7.6e9, 14.4e9, 128e9), 16: (32e9, 122e9, 231e9, 2e12)}


def test_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = trivium(capsys, "plan", "--paper")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    assert {int(row[0]): tuple(row[1:]) for row in rows if "/" in row[1]} == TABLE_1
    assert [row[0] for row in rows if "/" not in row[1]] == ["1", "2", "4", "8", "16"]


def test_largest_models_as_data(capsys: pytest.CaptureFixture[str]) -> None:
    code, data = trivium_json(capsys, "plan", "--paper")
    assert code == 0
    found = {row["model_parallel"]: tuple(row["largest_parameters"].values()) for row in data["table_2"]}
    for degree, sizes in TABLE_2.items():
        assert found[degree] == pytest.approx(sizes, rel=0.03)
    assert {row["ranks"] for row in data["table_1"]} == set(TABLE_1)
