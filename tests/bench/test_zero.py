from __future__ import annotations

import copy
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
    assert {
        "schema",
        "bench",
        "date",
        "command",
        "machine",
        "workload",
        "skipped",
        "near",
        "contestants",
        "targets",
    } == set(report)
    assert report["near"] in ([[1], [0]], [[], []])  # where the kernel forbids it, nobody reads
    assert report["workload"]["tries"] == 4
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
    assert "sent/Ψ" in page.getvalue() and "brackets" not in page.getvalue()
    wired = copy.deepcopy(report)
    for name in ("ddp", "loopback-3"):
        wired["contestants"][name]["bytes"]["wire"] = 4.0 * preset("1m").num_parameters()
    Console(file=page, width=140).print(table(wired))
    rows = {line[:26].strip(): line.split()[-1] for line in page.getvalue().splitlines()[-12:] if line.strip()}
    assert rows["Trivium stage 3, loopback"] == rows["DDP"] == "2.00" and rows["Trivium stage 1"] == "(2.00)"
    assert "in brackets: by the ledger" in page.getvalue()
    wired["contestants"]["trivium-3"]["delay"] = {"hidden": 0.5}
    narrow = io.StringIO()
    Console(file=narrow, width=80).print(table(wired))
    assert "hidden" in narrow.getvalue() and "…" not in narrow.getvalue()
    plot(wired, tmp_path / "wired.svg")
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
    names, skipped = bench_zero._present(("ddp", "deepspeed-3", "trivium-3"), "cpu")
    assert names == ["ddp", "trivium-3"]
    assert "pip install" in skipped["deepspeed-3"]
    names, skipped = bench_zero._present(("loopback-1", "deepspeed-3", "trivium-3", "loopback-3"), "cuda")
    assert names == ["trivium-3"] and list(skipped) == ["loopback-1", "deepspeed-3", "loopback-3"]
    assert "no rank reads another's memory" in skipped["loopback-1"]
    with pytest.raises(ConfigError, match="nothing to measure: on cuda"):
        bench_zero._present(("loopback-1",), "cuda")


@pytest.mark.parametrize(
    ("near", "sending"), [(True, ["ddp", "loopback-1"]), (False, ["ddp", "trivium-1", "loopback-1"])]
)
def test_the_wire_is_measured_of_all_who_send(monkeypatch: pytest.MonkeyPatch, near: bool, sending: list[str]) -> None:
    def launched(module: str, request: dict[str, Any], ranks: int, **more: Any) -> list[dict[str, Any]]:
        return [{"sent_bytes": dict.fromkeys(request["contestants"], 10.0)}] * ranks

    monkeypatch.setattr(bench_zero, "launch", launched)
    monkeypatch.setattr(bench_zero.loopback, "prefix", lambda: ["unshare"])
    names = ("ddp", "trivium-1", "loopback-1")
    found: dict[str, dict[str, Any]] = {name: {"bytes": {}} for name in names}
    bench_zero._wire(ZeroBench(contestants=names), names, found, lambda line: None, near=near)
    assert [name for name in names if found[name]["bytes"] == {"wire": 5.0}] == sending


def test_a_delayed_step_is_compared_where_little_was_stolen() -> None:
    times = {"trivium-1": [[1.0], [1.0], [1.0]], "trivium-1+delay": [[1.5], [9.0], [8.0]]}
    stolen = {"trivium-1": [0.0, 0.0, 0.3], "trivium-1+delay": [0.0, 0.4, 0.0]}
    assert bench_zero._longer_s(times, stolen, "trivium-1") == 0.5
    assert bench_zero._longer_s(times, {name: [0.5] * 3 for name in times}, "trivium-1") == 7.0
