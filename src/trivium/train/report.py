"""A run's rows of metrics as one HTML page that opens offline: pictures inlined, every word escaped, nothing fetched.

ZeRO sections 3 and 7: memory by category and bytes per step beside the paper's 2Ψ and 3Ψ.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.base.units import format_bytes, format_count
from trivium.train import report_distill, report_router

FILE = "report.html"
Row = Mapping[str, Any]
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;
background:#fff}h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2rem}table{border-collapse:collapse}
td,th{text-align:left;padding:.15rem 1.2rem .15rem 0;border-bottom:1px solid #ddd;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}pre{white-space:pre-wrap;
background:#f4f5f7;padding:.6rem}@media(prefers-color-scheme:dark){body{background:#16191d;color:#dfe3e8}
pre{background:#22272e}svg{background:#fff}}"""


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One line of plan beside measured, in bytes. ``agrees``: they differ by no more than is promised."""

    name: str
    planned: int
    measured: int
    agrees: bool = True


def write(folder: Path, rows: Sequence[Row], planned: Sequence[Planned] = ()) -> Path:
    """Write ``folder``/report.html from a run's ``rows``; replaced whole."""
    path = folder / FILE
    temporary = path.with_name(f"{FILE}.tmp")
    temporary.write_text(page(rows, planned), encoding="utf-8")
    temporary.replace(path)
    return path


def page(rows: Sequence[Row], planned: Sequence[Planned] = ()) -> str:
    """The page as text."""
    start = next((row for row in reversed(rows) if row["kind"] == "start"), {})
    steps = [row for row in rows if row["kind"] == "step"]
    validations = [row for row in rows if row["kind"] == "validation"]
    end = next((row for row in reversed(rows) if row["kind"] == "end"), {})
    config = start.get("config", {})
    title = f"Trivium: {config.get('run', 'a run')}"
    parts = [f"<h1>{_text(title)}</h1>", _summary(start, steps, validations, end)]
    if steps:
        parts += [
            _section("Loss", _plot(lambda axes: _loss(axes, steps, validations, start), "nats per token")),
            _section("Throughput", _plot(lambda axes: _speed(axes, steps), "tokens per second")),
            _section("Bytes sent per rank and step", _plot(lambda axes: _bytes(axes, steps, start), "MB")),
            _section("Gradient norm", _plot(lambda axes: _norm(axes, steps), "norm")),
            _section("Memory of rank 0 by category, peak", _memory(steps[-1], planned)),
        ]
    parts += [_routers(steps), _teacher(rows), _answers(end)]
    parts.append(_section("Configuration", _table([(key, _value(value)) for key, value in _flat(config)])))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(title)}</title>'
    return (
        f'<!doctype html><html lang="en"><head>{head}<style>{_STYLE}</style></head><body>{"".join(parts)}</body></html>'
    )


def _summary(start: Row, steps: Sequence[Row], validations: Sequence[Row], end: Row) -> str:
    rows = [
        ("parameters", _parameters(start)),
        ("ranks × threads", f"{start.get('ranks', '?')} × {start.get('threads', '?')}"),
        ("ZeRO stage", str(start.get("config", {}).get("zero", {}).get("stage", "?"))),
        ("text", str(start.get("text", "?"))),
        ("steps", f"{end.get('step', len(steps))}, {end.get('skipped', 0)} skipped"),
    ]
    if steps:
        rows.append(("training loss, last step", _number(steps[-1]["loss"])))
        shares = sorted(row["flops_share"] for row in steps if row["flops_share"] is not None)
        if shares:
            rows.append(("model FLOP/s, share of the measured matrix peak", f"{shares[len(shares) // 2]:.1%}"))
    if validations:
        rows.append(("validation loss, last", _number(validations[-1]["loss"])))
    if start.get("unigram") is not None:
        rows.append(("by counting alone", f"unigram {start['unigram']:.4f}, bigram {start['bigram']:.4f}"))
    versions = start.get("versions", {})
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    return _table(rows)


def _parameters(start: Row) -> str:
    told = format_count(start.get("parameters", 0))
    activated = start.get("activated", start.get("parameters", 0))
    return told if activated == start.get("parameters", 0) else f"{told}, {format_count(activated)} for each token"


def _routers(steps: Sequence[Row]) -> str:
    found = report_router.pictures(steps)
    if not found:
        return ""
    told = _table(report_router.summary(steps))
    return _section("Routers", told + "".join(_plot(draw, label) for label, draw in found))


def _teacher(rows: Sequence[Row]) -> str:
    told = report_distill.words(rows)
    drawn = "".join(_plot(draw, label) for label, draw in report_distill.pictures(rows))
    return _section("Distillation", f"<p>{_text(told)}</p>{drawn}") if told else ""


def _answers(end: Row) -> str:
    parts = []
    scores = end.get("scores") or {}
    if scores:
        told = _table([(name, f"{share:.1%}") for name, share in scores.items()])
        parts.append(_section("Held-out inputs answered exactly", told))
    found = report_router.task_pictures(end.get("experts") or {})
    if found:
        drawn = "".join(_plot(draw, label) for label, draw in found)
        parts.append(_section("Which expert takes which task", drawn))
    samples = end.get("samples") or []
    if samples:
        texts = "".join(f"<pre><b>{_text(prompt)}</b>{_text(text)}</pre>" for prompt, text in samples)
        parts.append(_section("What it writes", texts))
    return "".join(parts)


def _memory(last: Row, planned: Sequence[Planned]) -> str:
    if planned:
        head = '<tr><th></th><th class="n">plan</th><th class="n">measured</th></tr>'
        body = "".join(
            f'<tr><td>{_text(line.name)}</td><td class="n">{format_bytes(line.planned)}</td>'
            f'<td class="n">{format_bytes(line.measured)}{"" if line.agrees else " (differs)"}</td></tr>'
            for line in planned
        )
        table = f"<table>{head}{body}</table>"
    else:
        table = _table([(name, format_bytes(count)) for name, count in last["memory"].items()])
    return table + _plot(lambda axes: _bars(axes, last, planned), "MB")


def _loss(axes: Any, steps: Sequence[Row], validations: Sequence[Row], start: Row) -> None:
    axes.plot(*_points(steps, "loss"), linewidth=0.8, label="training")
    if validations:
        axes.plot(*_points(validations, "loss"), marker="o", markersize=3, label="validation")
    for name, style in (("unigram", "--"), ("bigram", ":")):
        if start.get(name) is not None:
            axes.axhline(start[name], linestyle=style, color="gray", label=name)
    axes.legend()


def _speed(axes: Any, steps: Sequence[Row]) -> None:
    axes.plot(*_points(steps, "tokens_per_s"), linewidth=0.8)
    axes.set_ylim(bottom=0)


def _bytes(axes: Any, steps: Sequence[Row], start: Row) -> None:
    axes.plot(*_points(steps, "payload_bytes", 1e-6), label="sent, agreements aside")
    ranks = start.get("ranks", 1)
    config = start.get("config", {})
    width = 4 if config.get("model", {}).get("dtype", "float32") == "float32" else 2
    volume = start.get("parameters", 0) * width * start.get("accumulation", 1) * (ranks - 1) / ranks * 1e-6
    for factor, style in ((2, "--"), (3, ":")):
        axes.axhline(factor * volume, linestyle=style, color="gray", label=f"{factor}Ψ(N−1)/N per micro-batch")
    axes.set_ylim(bottom=0)
    axes.legend()


def _norm(axes: Any, steps: Sequence[Row]) -> None:
    axes.plot(*_points(steps, "gradient_norm"), linewidth=0.8)
    axes.set_yscale("log")


def _bars(axes: Any, last: Row, planned: Sequence[Planned]) -> None:
    lines = planned or [Planned(name=name, planned=0, measured=count) for name, count in last["memory"].items()]
    places = range(len(lines))
    if planned:
        axes.bar([at - 0.2 for at in places], [line.planned / 1e6 for line in lines], 0.4, label="plan")
    shift = 0.2 if planned else 0.0
    axes.bar([at + shift for at in places], [line.measured / 1e6 for line in lines], 0.4, label="measured")
    axes.set_xticks(list(places), [line.name for line in lines])
    axes.set_xlabel("")
    if planned:
        axes.legend()


def _points(rows: Sequence[Row], key: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    kept = [row for row in rows if row.get(key) is not None]
    return [row["step"] for row in kept], [row[key] * factor for row in kept]


def _plot(draw: Callable[[Any], None], label: str) -> str:
    """An SVG element drawn without any display, without the prolog and links that a file would have."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        canvas = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        draw(axes)
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))  # type: ignore[no-untyped-call]
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", text)


def _section(title: str, body: str) -> str:
    return f"<h2>{_text(title)}</h2>{body}"


def _table(rows: Sequence[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{_text(key)}</td><td>{_text(value)}</td></tr>" for key, value in rows)
    return f"<table>{body}</table>"


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            found.append((prefix + key, value))
    return found


def _value(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _text(words: str) -> str:
    """Words as they are read, whatever is in them."""
    return html.escape(words, quote=True)
