"""The page of documents says of every field, cap and metric what the code does."""

from __future__ import annotations

import re

from tests.serve.running import running
from tests.worlds import ROOT
from trivium.serve.limits import Limits
from trivium.serve.schema_table import table

TEXT = (ROOT / "docs" / "serving.md").read_text()


def test_the_table_of_fields_is_the_code_s() -> None:
    assert table() in TEXT


def test_every_route_and_metric_is_told() -> None:
    with running() as server:
        for _, path in server.server.app.paths:
            assert path.replace("{name:path}", "NAME") in TEXT
        names = re.findall(r"^# TYPE (\w+) (?:gauge|counter|histogram)", server.get("/metrics").body.decode(), re.M)
    for name in names:
        if not name.endswith("_created"):
            short = "_" + name.removeprefix("trivium_").split("_", 2)[-1]
            assert name in TEXT or short in TEXT, name


def test_the_caps_are_told() -> None:
    limits = Limits()
    for told in (
        f"{limits.body_bytes >> 20} MiB", f"{limits.header_bytes >> 10} KiB; {limits.header_count}",
        f"{limits.json_depth}; {limits.json_items:,}", f"{limits.header_s:g} s; {limits.body_s:g} s",
        f"| {limits.connections} |", f"| {limits.queue} |", f"| {limits.per_key} |", f"{limits.idle_s:g} s",
        f"{limits.messages}; {limits.prompts}; {limits.choices}; {limits.stops} × {limits.stop_chars}; "
        f"{limits.logit_bias:,}; {limits.top_logprobs}; {limits.tools}",
    ):  # fmt: skip
        assert told in TEXT, told
