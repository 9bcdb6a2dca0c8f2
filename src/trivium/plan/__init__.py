"""What a run would take, from the runtime's own arithmetic; nothing is run."""

from __future__ import annotations

from trivium.plan.activations import Batch
from trivium.plan.communication import Communication, Traffic
from trivium.plan.forecast import Plan, Setting, forecast, inventory_of
from trivium.plan.inventory import Inventory, take
from trivium.plan.memory import Memory
from trivium.plan.report import Compared, compare, table

__all__ = [
    "Batch",
    "Communication",
    "Compared",
    "Inventory",
    "Memory",
    "Plan",
    "Setting",
    "Traffic",
    "compare",
    "forecast",
    "inventory_of",
    "table",
    "take",
]
