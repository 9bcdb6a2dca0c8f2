"""The page opens offline, shows everything and escapes it; rows of metrics survive a kill."""

from __future__ import annotations

import json
import re
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from trivium.base.errors import DataError, SetupError
from trivium.train import report, report_router
from trivium.train.config import TrainConfig
from trivium.train.metrics import Recorder, read
from trivium.train.report import Planned
from trivium.train.writers import open_writers, scalars

EVIL = "</pre><script>alert('x')</script>&\"'"


def rows(*, steps: int = 5, evil: str = EVIL) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [
        {
            "kind": "start", "step": 0, "config": {"run": evil, "zero": {"stage": 3}, "data": {"paths": [evil]}},
            "parameters": 1000, "ranks": 2, "threads": 1, "accumulation": 1, "text": evil, "unigram": 5.0,
            "bigram": 3.0, "versions": {"torch": evil},
        }
    ]  # fmt: skip
    for step in range(1, steps + 1):
        loss = None if step == 3 else 6.0 - step / 10
        found.append(
            {
                "kind": "step", "step": step, "loss": loss, "tokens_per_s": 100.0, "payload_bytes": 6000,
                "gradient_norm": None if step == 3 else 1.0, "memory": {"parameters": 2000, evil: 3000},
                "flops_share": 0.5,
            }
        )  # fmt: skip
        found.append({"kind": "validation", "step": step, "loss": 6.0})
    found.append(
        {"kind": "end", "step": steps, "skipped": 1, "scores": {evil: 0.975}, "samples": [[evil, evil]], "signal": 0}
    )
    return found


def routed(layers: int) -> list[dict[str, Any]]:
    """Three steps; expert 1 of every layer dies in the second, expert 3 besides in the third."""
    loads = ([4, 4, 4, 4], [10, 0, 4, 2], [15, 0, 5, 0])
    return [
        {
            "kind": "step", "step": step,
            "router": [
                {
                    "layer": 2 * place + 1, "load": load, "drop_rate": 0.1 * step, "entropy": 1.5 - 0.25 * step,
                    "dead": [expert for expert, count in enumerate(load) if not count],
                }
                for place in range(layers)
            ],
        }
        for step, load in enumerate(loads, 1)
    ]  # fmt: skip


def drawn(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Label → axes on which `report_router` has drawn that picture."""
    found = {}
    for label, draw in report_router.pictures(steps):
        found[label] = Figure().subplots()
        draw(found[label])
    return found


def test_the_routers_drops_entropy_and_dead_experts_are_drawn_over_time() -> None:
    axes = drawn(routed(2))
    assert list(axes) == [
        "expert, layer 1", "expert, layer 3", "dropped choices, share", "router entropy, nats",
        "experts that nobody chose",
    ]  # fmt: skip
    for label, expected in (
        ("dropped choices, share", [0.1, 0.2, 0.3]),
        ("router entropy, nats", [1.25, 1.0, 0.75]),
        ("experts that nobody chose", [0, 1, 2]),
    ):
        lines = axes[label].get_lines()
        assert [line.get_label() for line in lines] == ["layer 1", "layer 3"]
        for line in lines:
            assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == pytest.approx(expected)
    (mesh,) = axes["expert, layer 3"].collections
    assert mesh.get_array()[1].tolist() == [0.25, 0, 0]  # of expert 1, share by share


def test_the_routers_summary_names_the_dead() -> None:
    assert report_router.summary(routed(1)) == [
        ("layer 1, 4 experts", "heaviest 75.0%, lightest 0.0% (even: 25.0%); 30.0% dropped; 2 dead (1, 3)")
    ]
    assert report_router.summary(rows()) == [] and report_router.pictures(rows()) == []


@pytest.mark.parametrize(("layers", "said"), [(12, ""), (15, "\nfirst 12 of 15 layers")])
def test_pictures_say_when_layers_are_left_out(layers: int, said: str) -> None:
    labels = [label for label, _ in report_router.pictures(routed(layers)) if label.startswith("expert,")]
    assert labels == [f"expert, layer {2 * place + 1}{said}" for place in range(12)]
    experts = {"add": {str(layer): [1, 2] for layer in range(layers)}}
    assert [label for label, _ in report_router.task_pictures(experts)] == [f"task, layer {n}{said}" for n in range(12)]
    assert len(report_router.summary(routed(layers))) == layers


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.links: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.mark.parametrize(
    "planned",
    [
        (),
        (Planned(name=EVIL, planned=100, measured=99),),
        (Planned(name=EVIL, planned=100, measured=80, agrees=False),),
    ],
)
def test_the_page_fetches_nothing_and_runs_nothing(tmp_path: Path, planned: tuple[Planned, ...]) -> None:
    path = report.write(tmp_path, rows(), planned)
    text = path.read_text(encoding="utf-8")
    seen = Seen()
    seen.feed(text)
    assert ("(differs)" in text) == any(not line.agrees for line in planned)
    assert "script" not in seen.tags and "iframe" not in seen.tags and "img" not in seen.tags
    assert all(link.startswith("#") for link in seen.links)
    assert not re.search(r"https?:|@import|url\((?!#)", text)
    assert seen.tags["svg"] == 5
    assert EVIL in "".join(seen.text)
    for title in ("Loss", "Throughput", "Bytes sent", "Memory", "Configuration", "97.5%", "not finite", "unigram"):
        assert title in text or title == "not finite"


def test_a_run_without_steps_has_a_page_too(tmp_path: Path) -> None:
    assert "Configuration" in report.page(rows(steps=0))
    assert report.page([])


def test_rows_go_on_after_a_kill(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    for step in (1, 2, 3):
        recorder.write("step", step=step, loss=float("nan") if step == 2 else 1.0, memory={"a": float("inf")})
    recorder.close()
    file = tmp_path / "metrics.jsonl"
    with file.open("a") as stream:
        stream.write('{"kind": "step", "st')
    assert [row["step"] for row in read(file)] == [1, 2, 3]
    again = Recorder(tmp_path, resumed=2)
    again.write("step", step=3, loss=2.0)
    again.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in lines] == [(1, 1.0), (2, None), (3, 2.0)]
    assert lines[0]["memory"] == {"a": None}
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_spoiled_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\nnonsense\n{}\n")
    with pytest.raises(DataError, match=r"metrics.jsonl:2: not a row"):
        read(tmp_path / "metrics.jsonl")


def test_a_long_run_s_rows_stay_on_disk(tmp_path: Path) -> None:
    recorder, words = Recorder(tmp_path), "x" * 1000
    recorder.write("step", step=0, words=words)
    tracemalloc.start()
    for step in range(1, 500):
        recorder.write("step", step=step, words=f"{words}{step}")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 50_000  # the rows are half a million bytes
    assert [row["step"] for row in recorder.read()] == list(range(500))
    recorder.close()
    assert Recorder(None).read() == []


@pytest.mark.parametrize(("extra", "module"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_extra_is_told_with_its_install(
    extra: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    from trivium.base import config as configs

    config = configs.build(TrainConfig, {"run": str(tmp_path), "report": {extra: True}})
    with pytest.raises(SetupError, match=rf"pip install 'trivium\[{extra}\]'"):
        open_writers(config)


def test_scalars_are_the_numbers_of_a_row() -> None:
    row = {"kind": "step", "step": 3, "time": 1.0, "loss": 2.5, "memory": {"parameters": 7}, "process": None}
    assert scalars(row) == {"loss": 2.5, "memory/parameters": 7.0}
    assert scalars({"kind": "validation", "step": 3, "loss": 2.0}) == {"validation/loss": 2.0}
    assert scalars({"kind": "end", "step": 3, "loss": 2.0}) == {}
