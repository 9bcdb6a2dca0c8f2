"""What ranks run for tests/plan/test_reality.py: a few steps, what the ledger and the meter say, and the plan."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.allocated import allocated
from trivium import zero
from trivium.memory.pages import recycled_pages
from trivium.models import DecoderConfig, build
from trivium.plan import Batch, Plan, Setting, forecast, inventory_of, take
from trivium.zero import ZeroConfig

DECODER = DecoderConfig(vocabulary=1100, dim=64, layers=3, heads=4, kv_heads=2, ffn_dim=176, max_positions=32)
SHAPES = {"untied": DECODER, "tied": replace(DECODER, tied=True)}


class Odd(nn.Module):
    """Frozen layers first, then uneven ones; a buffer, a zero-size and a one-element parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.layers = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 40), nn.Linear(40, 3)])
        self.scale = nn.Parameter(torch.ones(1))
        self.empty = nn.Parameter(torch.ones(0))
        self.register_buffer("shift", torch.zeros(3))
        self.first.requires_grad_(False)
        self.layers[0].requires_grad_(False)

    def forward(self, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        for layer in (self.first, *self.layers):
            x = torch.tanh(layer(x))
        return nn.functional.mse_loss(x * self.scale + self.shift, targets) + self.empty.sum()


def make(name: str, dtype: torch.dtype, device: str) -> nn.Module:
    if name == "odd":
        with torch.device(device):
            return Odd().to(dtype)
    return build(SHAPES[name], device=device, dtype=dtype)


def batch_of(name: str, dtype: torch.dtype, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(number)
    if name == "odd":
        return torch.randn(4, 8, generator=draw).to(dtype), torch.randn(4, 3, generator=draw).to(dtype)
    tokens = torch.randint(0, 1100, (2, 17), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def planned(name: str, setting: Setting) -> Plan:
    model = make(name, setting.dtype, "meta")
    return forecast(take(model), setting)


def compare(
    mesh: Any, name: str, dtype: torch.dtype, options: dict[str, Any], accumulation: int, no_sync: bool = False
) -> dict[str, Any]:
    """Three steps as planned; the third's bytes by phase and the bytes held after it, beside the plan's."""
    model = make(name, dtype, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = zero.shard(model, optimizer, mesh, **options)
    meter = zero.meter_of(model)
    for step in range(3):
        meter.reset_peak()
        with mesh.ledger() as sent:
            for index in range(accumulation):
                batch = batch_of(name, dtype, step * 100 + index * 10 + mesh.rank)
                if no_sync and index + 1 < accumulation:
                    with zero.no_sync(model):
                        model(*batch).backward()
                else:
                    model(*batch).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    setting = Setting(
        ranks=mesh.size,
        rank=mesh.rank,
        zero=ZeroConfig(**options),
        dtype=dtype,
        batch=Batch(rows=2, sequence=16),
        accumulation=accumulation,
        no_sync=no_sync,
    )
    plan = planned(name, setting)
    phases = ("forward", "backward", "step")
    by_phase, calls = sent.bytes_by("phase"), sent.calls_by("phase")
    return {
        "sent": {phase: (by_phase.get(phase, 0), calls.get(phase, 0)) for phase in phases},
        "forecast": {phase: (t.sent_bytes, t.calls) for phase, t in plan.communication.by_phase.items()},
        "payload": (sent.payload_bytes, plan.communication.per_step.sent_bytes),
        "held": meter.by_label(),
        "peak": meter.by_label(peak=True),
        "memory": asdict(plan.memory),
    }


def live_peak(mesh: Any, config: DecoderConfig, dtype: torch.dtype, stage: int, batch: Batch) -> tuple[int, int]:
    """The most bytes that torch's allocator had given out, with the pages for gathered parameters that it does not see,
    beside the plan's total."""
    model = build(config, device="meta", dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, config.vocabulary, (batch.rows, batch.sequence))
    documents = (torch.arange(batch.sequence) > batch.sequence // 2).long().expand(batch.rows, -1)
    with allocated() as seen:
        model, optimizer = zero.shard(model, optimizer, mesh, stage=stage, average=False)
        for _ in range(3):
            loss = model(
                tokens,
                tokens,
                documents_BT=documents if batch.documents else None,
                reduction="sum",
                run_block=_recomputed if batch.recompute else None,
            )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    setting = Setting(
        ranks=mesh.size, rank=mesh.rank, zero=ZeroConfig(stage=stage, average=False), dtype=dtype, batch=batch
    )
    lent = zero.meter_of(model).peak_bytes("gathered") if recycled_pages(mesh.device) else 0  # not the allocator's
    return seen.peak_bytes + lent, forecast(inventory_of(config, dtype), setting, config).memory.total


def _recomputed(block: Any, *arguments: Any) -> Any:
    return checkpoint(block, *arguments, use_reentrant=False)
