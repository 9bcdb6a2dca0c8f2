"""What the ranks run for tests/zero/test_traffic.py and test_memory.py."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import trivium as tv
from tests.zero.zoo import Block
from trivium.zero.api import engine_of


class Large(nn.Module):
    """Ten million parameters and a bit: blocks between an embedding and a head."""

    def __init__(self, *, dim: int = 256, layers: int = 14, vocabulary: int = 6000, recompute: str = "") -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(Block(dim, 4 * dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocabulary, bias=False)
        self.recompute = recompute

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.recompute == "reentrant") if self.recompute else layer(x)
        loss: torch.Tensor = self.head(self.norm(x)).logsumexp(-1).mean()
        return loss


def ids(number: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (1, 8), generator=torch.Generator().manual_seed(number))


def start(mesh: Any, *, bare: dict[str, Any] | None = None, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Large(**(bare or {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    return tv.zero.shard(model, optimizer, mesh, **options)


def step(mesh: Any, model: nn.Module, optimizer: Any, number: int, micro_batches: int = 1) -> None:
    for index in range(micro_batches):
        model(ids(10 * number + index + mesh.rank, model.head.weight.shape[0])).backward()  # type: ignore[union-attr, index]
    optimizer.step()
    optimizer.zero_grad()


def volume(mesh: Any, recompute: str = "", shape: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """For each stage, payload sent per step and parameter element of this rank, and by phase."""
    found = []
    for stage in range(4):
        model, optimizer = start(mesh, stage=stage, bare={"recompute": recompute, **(shape or {})})
        step(mesh, model, optimizer, 0)
        with mesh.ledger() as sent:
            step(mesh, model, optimizer, 1)
        numel = sum(p.numel() for p in model.parameters())
        found.append(
            {
                "numel": numel,
                "per_element": sent.payload_bytes / 4 / numel,
                "phases": sent.bytes_by("phase"),
                "detours": engine_of(model).conductor.num_detours,
                "kept": sum(
                    sum(flat.layout.numels)
                    for unit in engine_of(model).units
                    for flat in unit.flats
                    if unit.keep and flat.row.parameter
                ),
            }
        )
    return found


def order_of_work(mesh: Any) -> list[str]:
    """Gathers and reductions as they are issued and layers as they compute, in one step at stage 3 after two others.

    ``backward`` and ``end``: a gradient has come to a layer's last product, and to its input.
    """
    model, optimizer = start(mesh, stage=3, bare={"layers": 4, "dim": 32, "vocabulary": 4000})
    engine = engine_of(model)
    events: list[str] = []
    for number in range(2):
        step(mesh, model, optimizer, number)
    for unit in engine.units:
        for flat in unit.flats:

            def start_gather(
                phase: str, flat: Any = flat, name: str = unit.name, before: Any = flat.start_gather
            ) -> None:
                events.append(f"gather {name} {phase}")
                before(phase)

            flat.start_gather = start_gather  # type: ignore[method-assign]
        unit.module.register_forward_pre_hook(lambda module, args, name=unit.name: events.append(f"compute {name}"))
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        name = f"layers.{number}"
        layer.down.register_forward_hook(lambda module, args, out, name=name: note(out, f"backward {name}"))
        layer.register_forward_pre_hook(lambda module, args, name=name: note(args[0], f"end {name}"))

    def note(tensor: torch.Tensor, event: str) -> None:
        tensor.register_hook(lambda gradient: events.append(event))

    names = {id(flat): unit.name for unit in engine.units for flat in unit.flats}
    send = engine.reducer._send_next

    def send_next() -> None:
        events.append(f"launch {names[id(engine.reducer._jobs[0].flat)]}")
        send()

    engine.reducer._send_next = send_next  # type: ignore[method-assign]
    step(mesh, model, optimizer, 3)
    return events


def states(mesh: Any) -> list[dict[str, Any]]:
    """The meter's bytes at each stage after three steps, the layout's padding, and the two largest units."""
    found = []
    for stage in range(4):
        model, optimizer = start(mesh, stage=stage, bucket_bytes=1 << 20)
        for number in range(2):
            step(mesh, model, optimizer, number)
        meter, engine = tv.zero.meter_of(model), engine_of(model)
        before = meter.by_label()
        meter.reset_peak()
        for number in range(2, 5):
            step(mesh, model, optimizer, number)
        sizes = sorted(sum(flat.whole_bytes for flat in unit.flats) for unit in engine.units if not unit.keep)
        found.append(
            {
                "numel": sum(p.numel() for p in model.parameters()),
                "padding": sum(flat.layout.padding for flat in engine.flats),
                "live": meter.by_label(),
                "before": before,
                "peak": meter.by_label(peak=True),
                "bound": sum(sizes[-2:])
                + sum(flat.whole_bytes for unit in engine.units if unit.keep for flat in unit.flats),
            }
        )
    return found


def peak_gathered(mesh: Any, recompute: str) -> tuple[int, int]:
    """Most bytes gathered at once under activation checkpointing, and those of two blocks and what stays."""
    model, optimizer = start(mesh, stage=3, bare={"recompute": recompute, "layers": 8, "vocabulary": 300, "dim": 64})
    for number in range(2):
        step(mesh, model, optimizer, number)
    meter, engine = tv.zero.meter_of(model), engine_of(model)
    meter.reset_peak()
    step(mesh, model, optimizer, 3)
    sizes = {unit.name: sum(flat.whole_bytes for flat in unit.flats) for unit in engine.units}
    kept = sum(sizes[unit.name] for unit in engine.units if unit.keep)
    return meter.peak_bytes("gathered"), kept + 2 * sizes["layers.0"]


def buffers(mesh: Any, vocabulary: int) -> list[int]:
    """Communication buffers with a bucket of 1 MiB, in fp32 and in two dtypes."""
    found = []
    for mixed in (False, True):
        model = Large(dim=32, layers=2, vocabulary=vocabulary)
        if mixed:
            model.head.to(torch.bfloat16)
        model, optimizer = tv.zero.shard(
            model, torch.optim.AdamW(model.parameters()), mesh, stage=2, bucket_bytes=1 << 20
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
            model(ids(mesh.rank, vocabulary)).backward()
        optimizer.step()
        found.append(tv.zero.meter_of(model).peak_bytes("buffers"))
    return found


def growth(mesh: Any, stage: int) -> tuple[int, int, bool]:
    """Resident bytes gained over twenty steps after ten, and what the meter gained since the second."""
    model, optimizer = start(
        mesh, stage=stage, bare={"dim": 128, "layers": 4, "vocabulary": 2000}, bucket_bytes=1 << 18
    )
    meter, process = tv.zero.meter_of(model), psutil.Process()
    for number in range(2):
        step(mesh, model, optimizer, number, 2)
    counted = meter.live_bytes()
    meter.reset_peak()
    step(mesh, model, optimizer, 2, 2)
    peak = meter.by_label(peak=True)
    for number in range(3, 10):
        step(mesh, model, optimizer, number, 2)
    resident = process.memory_info().rss
    for number in range(10, 30):
        step(mesh, model, optimizer, number, 2)
    return process.memory_info().rss - resident, meter.live_bytes() - counted, meter.by_label(peak=True) == peak


@dataclass(frozen=True, kw_only=True)
class Counted:
    """One step of all ranks, in bytes: what the kernel counted on lo, in how many packets, and how many of these TCP
    sent again; what the ledgers say, and the paper's 2Ψ(N-1), at stage 3 3Ψ(N-1), which is N times what
    it gives each rank.
    """

    kernel: int
    packets: int
    resent: int
    ledger: int
    paper: int


def loopback(mesh: Any) -> list[dict[str, int]]:
    """A `Counted` for each stage. Between two barriers nothing else sends: this process group is alone on its lo.

    Of several steps the one counts in which TCP sent the fewest segments again: two processors hand loopback's packets
    over in another order now and then, and where the machine stands still for a while TCP believes them lost.
    """
    comm = mesh.comm("dp")
    found = []
    for stage in range(4):
        model, optimizer = start(mesh, stage=stage)
        step(mesh, model, optimizer, 0)
        paper = 4 * sum(p.numel() for p in model.parameters()) * (3 if stage == 3 else 2) * (mesh.size - 1)
        tries: list[Counted] = []
        while len(tries) < 3 and all(one.resent for one in tries):
            comm.barrier()
            before, resent = psutil.net_io_counters(pernic=True)["lo"], _resent()
            comm.barrier()
            with mesh.ledger() as sent:
                step(mesh, model, optimizer, 3)
            comm.barrier()
            after, resent = psutil.net_io_counters(pernic=True)["lo"], _resent() - resent
            comm.barrier()
            counted = Counted(
                kernel=after.bytes_sent - before.bytes_sent,
                packets=after.packets_sent - before.packets_sent,
                resent=comm.all_reduce_ints([resent], "max")[0],
                ledger=comm.all_reduce_ints([sent.bytes])[0],
                paper=paper,
            )
            tries.append(counted)
        found.append(asdict(min(tries, key=lambda one: one.resent)))
    return found


def _resent() -> int:
    """Segments that TCP has sent again in this process's network namespace."""
    names, values = (
        line.split() for line in Path("/proc/net/snmp").read_text().splitlines() if line.startswith("Tcp:")
    )
    return int(values[names.index("RetransSegs")])
