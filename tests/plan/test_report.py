"""Plan beside measured, and what counts as agreement."""

from __future__ import annotations

from trivium.models import preset
from trivium.plan import Plan, Setting, compare, forecast, inventory_of, table


def plan() -> Plan:
    return forecast(inventory_of(preset("1m")), Setting(ranks=2), preset("1m"))


def measured(found: Plan) -> dict[str, int]:
    memory = found.memory
    return {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "buffers": memory.buffers,
        "gathered": memory.gathered,
        "sent": found.communication.per_step.sent_bytes,
        "total": memory.total,
    }


def test_what_was_planned_agrees() -> None:
    rows = compare(plan(), measured(plan()))
    assert [row.name for row in rows] == [
        "parameters",
        "gradients",
        "optimizer",
        "states",
        "buffers",
        "gathered",
        "sent",
        "total",
    ]
    assert all(row.agrees for row in rows)
    assert "differs" not in table(rows)
    assert table(rows).count("exact") == len(rows)


def test_tolerances() -> None:
    found = plan()

    def row(name: str, factor: float) -> bool:
        values = measured(found)
        values[name] = round(values[name] * factor)
        return {row.name: row for row in compare(found, values)}[name].agrees

    assert row("total", 1.09) and row("total", 0.91)
    assert not row("total", 1.11) and not row("total", 0.89)
    assert row("buffers", 1.009) and not row("buffers", 1.02)
    assert row("gathered", 0.5) and not row("gathered", 1.01)


def test_what_was_not_planned_is_shown_as_different() -> None:
    values = {**measured(plan()), "sums": 4096}
    text = table(compare(plan(), values))
    assert "sums" in text and "differs" in text


def test_only_what_was_measured_is_compared() -> None:
    assert [row.name for row in compare(plan(), {"buffers": 1, "other": 2})] == ["buffers"]
