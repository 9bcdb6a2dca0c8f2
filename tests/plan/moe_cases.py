"""What ranks run for tests/plan/test_moe.py: steps of a decoder with experts apart, and its plan."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from tests.allocated import allocated
from trivium import zero
from trivium.dist.mesh import Mesh
from trivium.models import DecoderConfig, MoEConfig, Record, build
from trivium.plan import Batch, Setting, Traffic, forecast, inventory_of
from trivium.train.objective import recomputed
from trivium.zero import ZeroConfig

MOE = MoEConfig(experts=(4, 6), layers=(1, 2), top_k=2, ffn_dim=40, residual="add")
DECODER = DecoderConfig(vocabulary=1100, dim=64, layers=4, heads=4, kv_heads=2, ffn_dim=176, max_positions=32, moe=MOE)
PHASES = ("forward", "backward", "step")
EXCHANGED = ("dispatch.counts", "dispatch", "combine", "dispatch.backward", "combine.backward")


def compare(
    mesh: Any,
    ep: int | tuple[int, int],
    dtype: torch.dtype,
    options: dict[str, Any],
    recompute: bool = False,
    decoder: DecoderConfig = DECODER,
) -> dict[str, Any]:
    """Three steps as planned; the third's bytes and what is held after it, beside the plan's.

    ``exchanged``: (phase → bytes, phase → bytes that the routings say) of rows to other ranks' experts.
    """
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=ep if isinstance(ep, int) else max(ep))
    model = build(decoder, device="meta", dtype=dtype, seed=0, mesh=spread, ep=ep)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = zero.shard(model, optimizer, spread, **options)
    meter = zero.meter_of(model)
    record = Record()
    for step in range(3):
        meter.reset_peak()
        draw = torch.Generator().manual_seed(100 * step + mesh.rank)
        tokens = torch.randint(0, 1100, (2, 17), generator=draw)
        with spread.ledger() as sent:
            run_block = recomputed if recompute else None
            model(tokens[:, :-1], tokens[:, 1:], run_block=run_block, record=record).backward()
            optimizer.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    setting = Setting(
        ranks=mesh.size, rank=mesh.rank, zero=ZeroConfig(**options), dtype=dtype, ep=ep,
        batch=Batch(rows=2, sequence=16, recompute=recompute),
    )  # fmt: skip
    plan = forecast(inventory_of(decoder, dtype, ep=ep, rank=mesh.rank), setting, decoder)
    by_phase, calls = sent.bytes_by("phase"), sent.calls_by("phase")
    rows = 0
    for layer, aux in record.aux.items():
        block = model.blocks[layer]
        mine = set(block.moe.experts.numbers)
        rows += sum(int(load) for number, load in enumerate(aux.load) if number not in mine)
    told = {phase: t.sent_bytes for phase, t in plan.communication.by_phase.items()}
    return {
        "sent": {phase: (by_phase.get(phase, 0), calls.get(phase, 0)) for phase in PHASES},
        "forecast": {
            phase: (t.sent_bytes, t.calls) for phase, t in plan.communication.by_phase.items() if phase in PHASES
        },
        "states": (plan.communication.states_per_step.sent_bytes, sum(by_phase.get(p, 0) for p in PHASES)),
        "exchanged": {phase: by_phase.get(phase, 0) for phase in EXCHANGED},
        "even": {phase: told.get(phase, 0) for phase in EXCHANGED},
        "calls": [calls.get(phase, 0) for phase in EXCHANGED],
        "even_calls": [plan.communication.by_phase.get(phase, Traffic()).calls for phase in EXCHANGED],
        "row_bytes": rows * decoder.dim * dtype.itemsize,
        "held": meter.by_label(),
        "peak": meter.by_label(peak=True),
        "memory": asdict(plan.memory),
        "parameters": plan.num_parameters,
    }


def live_peak(mesh: Any, config: DecoderConfig, ep: int, stage: int, batch: Batch) -> tuple[int, int]:
    """The most bytes that torch's allocator had given out in three steps, beside the plan's total."""
    spread = Mesh(rank=mesh.rank, size=mesh.size, device=mesh.device, ep=ep)
    model = build(config, device="meta", seed=0, mesh=spread, ep=ep)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    tokens = torch.randint(0, config.vocabulary, (batch.rows, batch.sequence))
    with allocated() as seen:
        model, optimizer = zero.shard(model, optimizer, spread, stage=stage, average=False)
        for _ in range(3):
            run_block = recomputed if batch.recompute else None
            loss = model(tokens, tokens, reduction="sum", run_block=run_block)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss
    setting = Setting(ranks=mesh.size, rank=mesh.rank, zero=ZeroConfig(stage=stage, average=False), batch=batch, ep=ep)
    return seen.peak_bytes, forecast(inventory_of(config, ep=ep, rank=mesh.rank), setting, config).memory.total
