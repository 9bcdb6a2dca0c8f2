"""Mixture of experts: gate, capacity, dispatch, experts and the layer made of them.

DeepSpeed-MoE (arXiv 2201.05596), sections 3 and 4; docs/moe.md maps its sections to files.
"""

from __future__ import annotations

from trivium.moe.capacity import CapacityConfig
from trivium.moe.experts import GELUExpert
from trivium.moe.gate import Gate, GateConfig, GateProtocol, Gating
from trivium.moe.layer import Aux, MoE
from trivium.moe.report import RouterReport, Tally
from trivium.moe.routing import Routing
from trivium.moe.upcycle import upcycle

__all__ = [
    "Aux",
    "CapacityConfig",
    "GELUExpert",
    "Gate",
    "GateConfig",
    "GateProtocol",
    "Gating",
    "MoE",
    "RouterReport",
    "Routing",
    "Tally",
    "upcycle",
]
