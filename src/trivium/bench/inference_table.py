"""The inference bench's report as a table, and its ratios against what the project aims at."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from rich.table import Table

from trivium.bench.inference import undisturbed
from trivium.bench.stolen import LITTLE

# Ours, workload, the contestants of which the best is meant, and the ratio of tokens/s aimed at.
TARGETS: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
    ("trivium bfloat16", "decode 1", ("transformers float32", "transformers bfloat16"), 1.5),
    ("trivium bfloat16", "decode 1", ("llama.cpp BF16",), 1.0),
    ("trivium int8", "decode 1", ("llama.cpp Q8_0",), 1.3),
    ("trivium int4", "decode 1", ("llama.cpp Q4_0",), 1.4),
    ("trivium int8", "decode 16", ("transformers float32", "transformers bfloat16"), 2.5),
    ("trivium int8", "decode 16", ("OpenVINO int8",), 1.2),
    ("trivium float32", "prefill 512", ("transformers float32",), 1.0),
    ("trivium bfloat16", "prefill 512", ("transformers float32",), 1.0),
    ("trivium int8", "prefill 512", ("transformers float32",), 1.0),
    ("trivium int4", "prefill 512", ("transformers float32",), 1.0),
    ("trivium bfloat16", "prefill 512", ("llama.cpp BF16",), 1.2),
    ("trivium int8", "prefill 512", ("llama.cpp Q8_0",), 1.2),
    ("trivium int4", "prefill 512", ("llama.cpp Q4_0",), 1.2),
)
ON_GPT2 = ("trivium bfloat16", "decode 1", ("transformers float32", "transformers bfloat16"), 3.0)
SHARES = {"trivium bfloat16": 0.85, "trivium int8": 0.80, "trivium int4": 0.70}


def table(report: dict[str, Any]) -> Table:
    """tokens/s per contestant and workload, and the share of the read limit at batch 1."""
    summary = report["summary"]
    workloads = list(dict.fromkeys(workload for entries in summary.values() for workload in entries))
    where = f"{report['threads']} threads" if report.get("device", "cpu") == "cpu" else report["machine"]["gpu"]
    made = Table(title=f"{report['shape']['name']}, {where}, tokens/s")
    made.add_column("")
    for workload in workloads:
        made.add_column(workload, justify="right")
    made.add_column(f"of {report['read_limit_gb_per_s']:.1f} GB/s", justify="right")
    for name, entries in summary.items():
        share = entries.get("decode 1", {}).get("share_of_read_limit")
        cells = [f"{entries[workload]['tokens_per_s']:.1f}" if workload in entries else "-" for workload in workloads]
        made.add_row(name, *cells, "" if share is None else f"{share:.0%}")
    return made


def lines(report: dict[str, Any]) -> list[str]:
    """Below the table: who is absent and why, what else is to be known, and the aims."""
    absent = [f"no figures, or not all: {words}" for words in report["absent"].values()]
    notes = [*report["notes"].values()]
    shares = [share for r in report["rounds"] for name in r["seconds"] for share in r["stolen"][name].values()]
    gone = [share for share in shares if share > LITTLE]
    if gone:
        lost = f"{len(gone)} of {len(shares)} figures lost more than {LITTLE:.0%} of the cores to others"
        notes.append(f"{lost}, up to {max(gone):.0%}")
    return [*absent, *notes, *targets(report)]


def targets(report: dict[str, Any]) -> list[str]:
    """A line per aim that this report can tell of: the median over rounds of the ratio within a round."""
    lines = []
    if report.get("device") == "cuda":  # no aims there: what was reached
        return [
            f"{name}: {entries['decode 1']['share_of_read_limit']:.0%} of the copy bandwidth"
            for name, entries in report["summary"].items()
            if "decode 1" in entries
        ]
    aims = (*TARGETS, ON_GPT2) if report["shape"]["name"] == "gpt2" else TARGETS
    for ours, workload, others, aim in aims:
        both = [r for r in report["rounds"] if _told(r, workload, [ours]) and _told(r, workload, others)]
        calm = undisturbed(both, workload, [ours, *others])
        if calm:
            ratio = statistics.median(min(_told(r, workload, others)) / r["seconds"][ours][workload] for r in calm)
            word = "met" if ratio >= aim else "missed"
            lines.append(f"{ours}, {workload}: {ratio:.2f} × {' or '.join(others)} (aim {aim}): {word}")
    for name, aim in SHARES.items():
        share = report["summary"].get(name, {}).get("decode 1", {}).get("share_of_read_limit")
        if share is not None:
            lines.append(
                f"{name}: {share:.0%} of the read limit (aim {aim:.0%}): {'met' if share >= aim else 'missed'}"
            )
    return lines


def _told(round_: dict[str, Any], workload: str, names: Iterable[str]) -> list[float]:
    """The seconds of those of these contestants that took part."""
    taken = (round_["seconds"].get(name, {}) for name in names)
    return [seconds[workload] for seconds in taken if workload in seconds]
