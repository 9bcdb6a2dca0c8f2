"""``trivium bench serve --promises``: bounds are kept or not, rows are told whole, and each row runs to its end."""

from __future__ import annotations

import asyncio
import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from trivium.base.errors import ConfigError
from trivium.bench import serve_model_rows as small
from trivium.bench.serve import ServeBench
from trivium.bench.serve_client import Sample, Target
from trivium.bench.serve_model import write
from trivium.bench.serve_plot import plot_promises
from trivium.bench.serve_press import slope
from trivium.bench.serve_process import started
from trivium.bench.serve_promises import ROWS, Promises, _through, run
from trivium.bench.serve_row import COLUMNS, Row, line, write_rows
from trivium.inference import LLM

pytestmark = pytest.mark.timeout(280)


def kept(row: Row) -> dict[str, bool]:
    return {one["what"]: one["kept"] for one in row.told()["promises"]}


def test_a_promise_is_kept_or_not(tmp_path: Path) -> None:
    row = Row(name="n", about="a")
    row.at_least("more", 5, 5)
    row.at_least("too little", 4.9, 5)
    row.at_most("less", 5, 5)
    row.at_most("too much", 5.1, 5)
    row.at_most("unmeasured", None, 5)
    row.at_least("not a number", math.nan, 5)
    assert list(kept(row).values()) == [True, False, True, False, False, False]
    told = row.told()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert line(told).count("NOT KEPT") == 4
    write_rows([told], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert (tuple(rows[0]), rows[1], len(rows)) == (COLUMNS, ["n", "more", "5.0", ">= 5", "True"], 7)


def test_slopes_and_seconds() -> None:
    assert slope([(1, 10), (2, 12), (3, 14)]) == pytest.approx(2)
    samples = [
        Sample(started_s=7.0, status=200, total_s=0.5),
        Sample(started_s=7.4, status=429, error="status 429", total_s=0.1),
        Sample(started_s=8.5, status=200, total_s=0.7),
    ]
    assert small.by_second(samples) == {"answered": [1, 0, 1], "refused": [1, 0, 0]}


def test_which_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="small-answers"):
        Promises(only=["streams", "nothing"])
    for wrong in ({"overload_s": 0}, {"soak_requests": 3}, {"soak_s": -1}):
        with pytest.raises(ConfigError):
            Promises(**wrong)  # type: ignore[arg-type]
    assert len(set(ROWS)) == len(ROWS) == 13


def test_rows_of_http_alone(tmp_path: Path) -> None:
    said: list[str] = []
    report = run(Promises(only=["full-queue"]), "command", said.append)
    (row,) = report["rows"]
    assert (row["row"], [one["what"] for one in row["promises"]]) == (
        "full queue",
        ["429 p50 ms", "answers other than 429"],
    )
    assert row["promises"][1]["kept"]
    assert len(said) == 1
    plot_promises(report, tmp_path / "p.svg")
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_a_share_of_nothing_is_not_measured() -> None:
    assert (small.share(1.0, 4.0), small.share(0.0, 4.0), small.share(1.0, 0.0)) == (0.25, 0.0, None)


def test_rows_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "LOADS", ((1, 2), (4, 8), (8, 16)))
    folder = tmp_path / "small"
    assert 5e6 < write(folder) < 10e6
    work = Target(url="", model="small", prompt_words=6, max_tokens=8)
    texts = small.offline(LLM(folder, memory="128MiB", threads=1), work)
    assert len(texts) == 26
    with started(str(folder), ["--threads=1", "--memory=128MiB"]) as server:
        asked = Target(url=server.url, model="small", prompt_words=6, max_tokens=8)
        assert list(kept(asyncio.run(_through(small.cold_start(server, asked))))) == ["first token after s"]
        none = ServeBench(first_ms=1e-6)
        row, loads = asyncio.run(_through(small.concurrency(server, asked, texts, none)))
        assert [load["goodput_per_s"] for load in loads] == [0, 0, 0]
        assert kept(row)["texts that differ from generate's"]
        assert [load["ok"] for load in loads] == [2, 8, 16]
        row, load = asyncio.run(
            _through(small.overload(server, asked, 1.0, ServeBench(first_ms=60_000, gap_ms=60_000), 64))
        )
        goodput, whole = row.promises[0], row.also["whole answers per second, of the peak's"]
        assert goodput.what == "goodput (first token in 60000 ms, then 60000 ms a token), of the peak's"
        assert goodput.measured == pytest.approx(whole, abs=1e-3)  # where none is too late the two are one
        row, _ = asyncio.run(_through(small.overload(server, asked, 1.0, none, 64)))
        assert row.told()["promises"][0]["measured"] is None and not row.promises[0].kept
        assert row.also["whole answers per second, of the peak's"] > 0
        row, load = asyncio.run(_through(small.overload(server, asked, 1.0, ServeBench(), 64)))
        assert kept(row)["failed"] and kept(row)["longest queue"]
        assert sum(row.also["by_second"]["answered"]) == load["ok"]
        row = asyncio.run(_through(small.cancels(server, asked, 64)))
        assert kept(row)["descriptors more"]
        row = asyncio.run(_through(small.soak(server, asked, 400, 0.0)))
        assert kept(row)["5xx"] and row.also["statuses"].keys() <= {0, 200, 400, 429}
        report: dict[str, Any] = {
            "rows": [row.told()],
            "loads": [],
            "workload": {"parameters": 6e6},
            "machine": {"cores": 1, "cpu": "x"},
        }
        plot_promises(report, tmp_path / "p.svg")
