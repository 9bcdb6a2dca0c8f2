from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trivium.base.errors import CapacityError, ConfigError
from trivium.bench import zero as bench_zero
from trivium.bench.plot import plot
from trivium.bench.table import table, targets
from trivium.bench.zero import ZeroBench, run
from trivium.models import preset


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    bench = ZeroBench(
        shape="1m",
        rounds=2,
        per_round=1,
        contestants=("ddp", "trivium-1", "trivium-3", "loopback-3"),
        memory=False,
        wire=False,
        timeout_s=120,
    )
    return run(bench, "trivium bench zero --shape 1m", lambda line: None)


def test_the_report_says_what_was_measured_where_and_how(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert {"schema", "bench", "date", "command", "machine", "workload", "skipped", "contestants", "targets"} == set(
        report
    )
    assert {"cpu", "cores", "memory_bytes", "torch", "python"} <= set(report["machine"])
    assert report["workload"]["parameters"] == preset("1m").num_parameters()
    assert list(report["contestants"]) == ["ddp", "trivium-1", "trivium-3", "loopback-3"]
    for one in report["contestants"].values():
        assert 0 < one["step_s"]["least"] <= one["step_s"]["median"] <= one["step_s"]["greatest"]
        assert set(one["ratio"]) == {"ddp"}
        assert [len(taken) for taken in one["rounds_s"]] == [1, 1]
    assert [one["contestant"] for one in report["targets"]] == ["trivium-1"]


def test_ours_send_what_was_planned_and_learn_what_the_others_learn(report: dict[str, Any]) -> None:
    everyone = report["contestants"]
    for name in ("trivium-1", "trivium-3", "loopback-3"):
        sent = everyone[name]["bytes"]
        assert sent["ledger"] == sent["plan"] > 0
        assert sent["agreeing"] < 0.01 * sent["ledger"]
    assert everyone["trivium-1"]["losses"] == everyone["trivium-3"]["losses"] == everyone["loopback-3"]["losses"]
    assert everyone["trivium-1"]["losses"] == pytest.approx(everyone["ddp"]["losses"], abs=1e-5)


def test_a_report_becomes_a_table_and_a_picture(report: dict[str, Any], tmp_path: Path) -> None:
    page = io.StringIO()
    Console(file=page, width=140).print(table(report))
    assert "Trivium stage 3 " in page.getvalue() and "Trivium stage 3, loopback" in page.getvalue()
    assert "÷ DDP" in page.getvalue()
    (line,) = targets(report)
    assert "target at most 1.03" in line
    plot(report, tmp_path / "zero.svg")
    assert "Trivium stage 1" in (tmp_path / "zero.svg").read_text() or (tmp_path / "zero.svg").stat().st_size > 5_000
    with pytest.raises(ConfigError, match=r"ends in \.svg, \.png or \.pdf"):
        plot(report, tmp_path / "zero.gif")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contestants": ("horovod",)}, "'horovod': expected some of ddp, fsdp2"),
        ({"contestants": ()}, "no contestants"),
        ({"rounds": 0}, "rounds=0: expected 1 or more"),
        ({"device": "tpu"}, "device='tpu': expected cpu or cuda"),
        ({"delay_ms": -1.0}, "expected 0 or more"),
        ({"shape": "33m"}, "did you mean '34m'"),
    ],
)
def test_what_cannot_be_measured_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ZeroBench(**given)


def test_a_model_that_does_not_fit_is_refused_before_anything_starts() -> None:
    with pytest.raises(CapacityError, match="choose fewer with --contestants"):
        run(ZeroBench(shape="7.5b"), "", lambda line: None)


def test_a_missing_rival_is_skipped_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_zero.importlib.util, "find_spec", lambda name: None)
    names, skipped = bench_zero._present(("ddp", "deepspeed-3", "trivium-3"))
    assert names == ["ddp", "trivium-3"]
    assert "pip install" in skipped["deepspeed-3"]
