"""What the ranks run for tests/zero/test_surface.py: promises of the public surface that no other case looks at."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import trivium as tv
from tests.allocated import allocated
from tests.zero import oracle, zoo
from tests.zero.cases import compare_with, message_of
from tests.zero.oracle import Cell
from tests.zero.trap_cases import _model_that_differs
from trivium.dist.shard import shard_map_of

DIFFERENCES = ("shape", "layer", "dtype", "frozen", "optimizer", "stage", "bucket", "units")


def layers(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 5)).to(dtype)


def torch_clips(mesh: Any, stage: int) -> tuple[bool, list[tuple[int, ...]], str, list[str]]:
    """Whether the optimizer is torch's kind, the strides of the gradients shown, what torch's own clip says, and
    whether the step afterwards is that of one process."""
    model, alone = zoo.build("blocks"), zoo.build("blocks")
    model, optimizer = tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, stage=stage)
    oracle.zoo_loss(model, mesh.rank).backward()
    strides = [param.grad.stride() for param in model.parameters() if param.grad is not None and param.dim()]
    nan = all(bool(param.grad.isnan().all()) for param in model.parameters() if param.grad is not None)
    said = "clipped"
    try:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    except RuntimeError as error:
        said = str(error)
    optimizer.step()
    optimizer.zero_grad()
    expected = zoo.optimizer_for("adamw", alone)
    oracle.train_alone(mesh.size, Cell(stage=stage, steps=1), alone, expected)
    found = oracle.differences(model, optimizer, alone, expected)
    return nan and isinstance(optimizer, torch.optim.Optimizer), strides, said, found


def output_gradients(mesh: Any, stage: int, dtype: torch.dtype) -> list[str]:
    """``output.backward(gradient)`` beside the backward of a loss that has this gradient, and beside one process."""
    results = []
    draw = torch.Generator().manual_seed(mesh.rank)
    x, gradient = (torch.randn(3, width, generator=draw).to(dtype) for width in (6, 5))
    for given in (True, False):
        model = layers(dtype)
        options = {"stage": stage, "loss_scale": 64.0 if dtype is torch.float16 else "auto"}
        model, optimizer = tv.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.5), mesh, **options)
        y = model(x)
        if given:
            y.backward(gradient)
        else:
            (y * gradient).sum().backward()
        optimizer.step()
        results.append({name: tensor.clone() for name, tensor in tv.zero.iter_full(model)})
    found = [name for name in results[0] if not oracle.same(results[0][name], results[1][name])]
    start = layers(dtype).state_dict()
    found += [f"{name} did not move" for name in start if oracle.same(results[0][name], start[name])]
    return found


def under_autocast(mesh: Any, stage: int) -> list[str]:
    """fp32 parameters under bf16 autocast, against one process under the same autocast."""

    def loss(model: nn.Module, number: int) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return oracle.zoo_loss(model, number)

    cell = Cell(stage=stage, steps=3, accumulation=2, clip=0.05, bucket_bytes=1024)
    model, alone = zoo.build("blocks"), zoo.build("blocks")
    optimizer, norms = oracle.train_sharded(mesh, cell, model, zoo.optimizer_for("adamw", model), loss)
    expected = zoo.optimizer_for("adamw", alone)
    told = [] if norms == oracle.train_alone(mesh.size, cell, alone, expected, loss) else ["other norms"]
    return [*told, *oracle.differences(model, optimizer, alone, expected)]


def compiled_whole(mesh: Any, stage: int) -> list[str]:
    """Blocks through AOTAutograd, which chooses what backward keeps, against one process that compiles them too."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch._dynamo.reset()

    def make(model: nn.Module) -> Any:
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile(backend="aot_eager")
        return zoo.optimizer_for("adamw", model)

    return compare_with(mesh, Cell(stage=stage, steps=3, accumulation=2), make)


def bytes_before_the_error(mesh: Any) -> dict[str, tuple[str, int, int]]:
    """For each way in which the last rank's model differs: the error, and payload and other bytes sent until then."""
    found = {}
    for what in DIFFERENCES:
        model, optimizer, options = _model_that_differs(what, mesh.rank == mesh.size - 1)
        with mesh.ledger() as sent:
            said = message_of(lambda m=model, o=optimizer, k=options: tv.zero.shard(m, o, mesh, **k))
        found[what] = (said.partition(":")[0], sent.payload_bytes, sent.bytes)
    return found


def born_in_parts(mesh: Any) -> tuple[int, int, int]:
    """Most bytes that torch had given out while a meta model was sharded at stage 3, this rank's shard of it, and the
    largest layer."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(24)))
    optimizer = torch.optim.AdamW(model.parameters())
    with allocated() as seen:
        model, optimizer = tv.zero.shard(model, optimizer, mesh, stage=3)
    return seen.peak_bytes, tv.zero.meter_of(model).live_bytes("parameters"), 4 * 256 * 257


def low_precision(mesh: Any, dtype: torch.dtype, reduce_dtype: str, gradient_dtype: str) -> list[str]:
    """16-bit parameters at every stage, against fp32 masters and the reduction written out in one process."""
    found = []
    for stage in range(4):
        model = zoo.build("blocks", dtype)
        model, optimizer = tv.zero.shard(
            model,
            torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False),
            mesh,
            stage=stage,
            bucket_bytes=1024,
            reduce_dtype=reduce_dtype,
            gradient_dtype=gradient_dtype,
            loss_scale=1.0,
        )
        for step in range(3):
            model(zoo.batch(step * mesh.size + mesh.rank, dtype)).backward()
            optimizer.step()
            optimizer.zero_grad()
        alone, masters = _written_out(mesh.size, dtype, reduce_dtype, gradient_dtype)
        full = tv.zero.full_state_dict(model)
        found += [f"stage {stage}: {name}" for name in full if not oracle.same(full[name], alone[name])]
        shard_map = shard_map_of(model)
        for name, entry in (shard_map.entries if shard_map else {}).items():
            if entry.piece is not None:
                held, start = entry.piece.tensor.detach().reshape(-1), entry.piece.start
                if not oracle.same(held, masters[name].reshape(-1)[start : start + held.numel()]):
                    found.append(f"stage {stage}: master of {name}")
    return found


def _written_out(
    size: int, dtype: torch.dtype, reduce_dtype: str, gradient_dtype: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and masters after three steps: gradients of all ranks added in rank order, divided once, kept in the
    type asked for; AdamW on fp32 copies; weights rounded from these."""
    model = zoo.build("blocks", dtype)
    masters = {name: nn.Parameter(param.detach().float()) for name, param in model.named_parameters()}
    optimizer = torch.optim.AdamW(masters.values(), lr=1e-2, foreach=False)
    for step in range(3):
        sums: dict[str, torch.Tensor] = {}
        for rank in range(size):
            model.zero_grad()
            model(zoo.batch(step * size + rank, dtype)).backward()
            for name, param in model.named_parameters():
                assert param.grad is not None
                one = param.grad if reduce_dtype == "parameter" else param.grad.float()
                sums[name] = one.clone() if rank == 0 else sums[name] + one
        for name, master in masters.items():
            kept = sums[name].to(torch.float32 if gradient_dtype == "float32" else dtype)
            master.grad = (kept / size).float()
        optimizer.step()
        with torch.no_grad():
            for name, param in model.named_parameters():
                param.copy_(masters[name])
    return dict(model.state_dict()), {name: master.detach() for name, master in masters.items()}
