"""What the ranks run for tests/zero/test_traps.py."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trivium as tv
from tests.clock import Since
from tests.zero import oracle, zoo
from tests.zero.cases import compare_with, message_of
from tests.zero.oracle import Cell
from trivium.zero.api import engine_of


def sharded(mesh: Any, name: str = "blocks", **options: Any) -> tuple[nn.Module, Any]:
    model = zoo.build(name)
    return tv.zero.shard(model, zoo.optimizer_for("adamw", model), mesh, **options)


def saved_views(mesh: Any) -> list[Any]:
    """(a) Storage addresses while computing, the version of a weight over a step, and the step's differences."""
    model, _ = sharded(mesh, stage=3)
    weight = model.layers[0].up.weight  # type: ignore[index, union-attr]
    storages = []
    model.layers[0].up.register_forward_pre_hook(  # type: ignore[index, union-attr]
        lambda module, args: storages.append(module.weight.untyped_storage()._cdata)
    )
    version = weight._version
    loss = model(zoo.batch(mesh.rank))
    released = weight.stride()
    loss.backward()
    return [len(set(storages)), weight._version - version, released, oracle.compare(mesh, Cell(stage=3))]


def accidental_reading(mesh: Any) -> tuple[Any, ...]:
    """(b) What a released parameter looks like, and state_dict at stage 3."""
    model, _ = sharded(mesh, stage=3)
    weight = model.layers[1].up.weight  # type: ignore[index, union-attr]
    held = weight.untyped_storage().nbytes()
    name = next(name for name, param in model.named_parameters() if param is weight)
    refused = [message_of(model.state_dict), message_of(lambda: model.load_state_dict({}, strict=False))]
    with tv.zero.gathered(model):
        inside = sorted(model.state_dict())
        model.load_state_dict({key: torch.full_like(value, 0.25) for key, value in model.state_dict().items()})
    full = tv.zero.full_state_dict(model)
    quarter = all(bool((value == 0.25).all()) for value in full.values())
    return tuple(weight.shape), weight.dtype, name, bool(weight.isnan().all()), held, refused, inside, quarter


def alignment(mesh: Any) -> list[int]:
    """(c) Addresses of gathered parameters and segments, modulo 64."""
    found = []
    for stage in range(4):
        model, _ = sharded(mesh, "odd", stage=stage)
        with tv.zero.gathered(model):
            found += [param.data_ptr() % 64 for param in model.parameters() if param.numel()]
    return found


def compiled(mesh: Any, stage: int) -> tuple[int, list[str]]:
    """(d) Graphs compiled in six steps with compiled blocks, and the difference from one process."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # dynamo's own look
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def make(model: nn.Module) -> Any:
        for layer in model.layers:  # type: ignore[union-attr]
            layer.compile(backend=backend)
        return zoo.optimizer_for("adamw", model)

    model = zoo.build("blocks")
    oracle.train_sharded(mesh, Cell(stage=stage, steps=6), model, make(model))
    count = len(graphs)
    return count, compare_with(mesh, Cell(stage=stage, steps=6), make)


def skipped(mesh: Any) -> list[str]:
    """(e) What nobody uses keeps its bits and has no state, though weight decay would change it."""
    found = []
    for stage in range(4):
        model = zoo.build("odd")
        before = model.never.weight.detach().clone()  # type: ignore[union-attr]
        optimizer, _ = oracle.train_sharded(mesh, Cell(stage=stage, steps=3), model, zoo.optimizer_for("adamw", model))
        names = {id(param): name for name, param in model.named_parameters()}
        for name, tensor in tv.zero.iter_full(model):
            if name == "never.weight" and not oracle.same(tensor, before):
                found.append(f"stage {stage}: {name} changed")
        for unit in engine_of(model).units:
            for flat in unit.flats:
                for param, segment in zip(flat.params, flat.segments, strict=True):
                    if names[id(param)].startswith("never") and segment is not None and segment in optimizer.state:
                        found.append(f"stage {stage}: {names[id(param)]} has state")
    return found


def torch_norm(mesh: Any) -> tuple[float, float]:
    """(g) Our norm's error against fp64, and that of torch's fp32 norm, at four million elements."""
    gradient = torch.rand(1 << 22, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = gradient.double().norm().item()
    return abs(oracle.norm_alone([gradient]) - exact) / exact, abs(gradient.norm().item() - exact) / exact


def minus_zero(mesh: Any) -> list[str]:
    """(i) Gradients of -0.0 everywhere stay -0.0, as in one process; one +0.0 makes +0.0."""
    found = []
    for stage in range(4):
        model = nn.Linear(3, 4, bias=False)
        _, optimizer = tv.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh, stage=stage)
        (model(torch.full((1, 3), -0.0)).sum() * 1.0).backward()
        for param in optimizer.param_groups[0]["params"]:
            if not bool(torch.signbit(param.grad).all()):
                found.append(f"stage {stage}: lost the sign")
    return found


class Recomputed(nn.Module):
    """Layers under checkpointing, one of them used inside and outside of it."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(zoo.Block(zoo.DIM, 10) for _ in range(3))
        self.twice = nn.Linear(zoo.DIM, zoo.DIM)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(x)
        for layer in self.layers:
            y = checkpoint(lambda z, layer=layer: F.silu(self.twice(layer(z))), y, use_reentrant=self.reentrant)
        return self.twice(y).square().mean()


def seen_twice(mesh: Any, reentrant: bool) -> list[str]:
    """(j) Parameters used inside and outside of checkpointed regions."""
    found = []
    for stage in range(4):
        cell = Cell(stage=stage, steps=3, accumulation=2)
        models = []
        for _ in range(2):
            torch.manual_seed(5)
            models.append(Recomputed(reentrant))

        def loss(model: nn.Module, number: int) -> torch.Tensor:
            result: torch.Tensor = model(zoo.batch(number))
            return result

        optimizer, _ = oracle.train_sharded(mesh, cell, models[0], torch.optim.AdamW(models[0].parameters()), loss)
        alone = torch.optim.AdamW(models[1].parameters())
        oracle.train_alone(mesh.size, cell, models[1], alone, loss)
        found += [f"stage {stage}: {line}" for line in oracle.differences(models[0], optimizer, models[1], alone)]
    return found


def few_large_messages(mesh: Any) -> tuple[int, int]:
    """(k) Collectives of payload in one step, and units: each unit is one message per pass, whatever its parameters."""
    model, optimizer = sharded(mesh, stage=3)
    for number in range(2):
        model(zoo.batch(number)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with mesh.ledger() as sent:
        model(zoo.batch(3)).backward()
        optimizer.step()
    calls = sum(count for phase, count in sent.calls_by("phase").items() if phase != "agree")
    return calls, 3 * len(engine_of(model).units)


def models_that_differ(mesh: Any, what: str) -> tuple[str, float]:
    """(h) One rank's model is another: the error on each rank, and how long it took to come once all were ready."""
    model, optimizer, options = _model_that_differs(what, mesh.rank == mesh.size - 1)
    mesh.comm("dp").barrier()
    since = Since()
    said = message_of(lambda: tv.zero.shard(model, optimizer, mesh, **options))
    return said, since.seconds()


def _model_that_differs(what: str, last: bool) -> tuple[nn.Module, Any, dict[str, Any]]:
    torch.manual_seed(0)
    width = 17 if what == "shape" and last else 16
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    if what == "layer" and last:
        model.append(nn.Linear(2, 2))
    if what == "dtype" and last:
        model.double()
    if what == "frozen" and last:
        model[1].requires_grad_(False)
    kind = torch.optim.SGD if what == "optimizer" and last else torch.optim.AdamW
    options: dict[str, Any] = {"stage": 2 if what == "stage" and last else 3}
    if what == "bucket":
        options["bucket_bytes"] = 4096 if last else 8192
    if what == "units":
        options["units"] = [model[0]] if last else [model[1]]
    return model, kind(model.parameters(), lr=0.1), options


class Readers(nn.Module):
    """torch's own modules that read their children without calling them, and lists that nobody can call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(zoo.DIM, 128)
        self.attention = nn.MultiheadAttention(128, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(128, 2, 16, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoderLayer(128, 2, 16, dropout=0.0, batch_first=True)
        self.pairs = nn.ModuleList([nn.ModuleList([nn.Linear(128, 8), nn.Linear(8, 128)]) for _ in range(2)])
        self.named = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(128, 8), "down": nn.Linear(8, 128)})])
        self.scales = nn.ModuleList([nn.ParameterList([nn.Parameter(torch.ones(128))])])
        fused = vars(nn).get("LinearCrossEntropyLoss")  # torch 2.13 and later
        self.loss = None if fused is None else fused(128, 600)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x)[None]
        y = y + self.attention(y, y, y, need_weights=False)[0]
        y = self.decoder(self.encoder(y), y)
        for up, down in self.pairs:  # type: ignore[misc]
            y = y + down(F.gelu(up(y)))
        for layer in self.named:
            y = y + layer["down"](F.gelu(layer["up"](y)))  # type: ignore[index]
        y = y * self.scales[0][0]  # type: ignore[index]
        if self.loss is None:
            return y.square().mean()
        targets = torch.arange(y.shape[1]) % 600
        result: torch.Tensor = self.loss(y[0], targets)
        return result


def readers(mesh: Any, units: str) -> list[str]:
    """(l) Training and evaluation (torch's fast path) of such a model, beside one process."""
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(Readers())

    def loss(model: nn.Module, number: int) -> torch.Tensor:
        result: torch.Tensor = model(zoo.batch(number))
        return result

    cell = Cell(stage=3, steps=2, units=units)
    optimizer, _ = oracle.train_sharded(mesh, cell, models[0], torch.optim.SGD(models[0].parameters(), lr=0.1), loss)
    alone = torch.optim.SGD(models[1].parameters(), lr=0.1)
    oracle.train_alone(mesh.size, cell, models[1], alone, loss)
    found = oracle.differences(models[0], optimizer, models[1], alone)
    with torch.no_grad():
        one, other = (loss(model.eval(), 7) for model in models)
    return found if oracle.same(one, other) else [*found, f"evaluated to {one} instead of {other}"]


class Reads(nn.Module):
    """A root that uses a projection's weight without calling the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(zoo.DIM, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.layers[0].weight).sum()  # type: ignore[arg-type]


def never_called(mesh: Any) -> tuple[str, str]:
    """(m) Training such a model as it is, and with the root as its only unit."""
    said = []
    for units in ("auto", []):
        model = Reads()
        model, _ = tv.zero.shard(model, torch.optim.SGD(model.parameters(), lr=0.1), mesh, stage=3, units=units)
        said.append(message_of(lambda model=model: model(zoo.batch(0)).backward()))
    return said[0], said[1]


class Stored(nn.Module):
    """A frozen weight in a dtype that has no NaN, or no arithmetic, beside a trained layer."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.stored = nn.Parameter(torch.arange(zoo.DIM).to(dtype), requires_grad=False)
        self.last = nn.Linear(zoo.DIM, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x * self.stored.float()).square().mean()


def stored(mesh: Any, dtype: torch.dtype) -> list[bool]:
    """(n) At stages 0 and 3: whether the loss is that of one process, and the weight comes back."""
    found = []
    for stage in (0, 3):
        torch.manual_seed(5)
        model, alone = Stored(dtype), Stored(dtype)
        alone.load_state_dict(model.state_dict())
        trained = torch.optim.SGD(model.last.parameters(), lr=0.1)
        model, optimizer = tv.zero.shard(model, trained, mesh, stage=stage)
        loss = model(zoo.batch(0))
        loss.backward()
        optimizer.step()
        full = tv.zero.full_state_dict(model)
        same = not full or oracle.same(full["stored"], alone.stored.detach())
        found += [oracle.same(loss.detach(), alone(zoo.batch(0)).detach()), same]
    return found


def refused(mesh: Any, what: str) -> str:
    """(o) What shard says of a model or an optimizer that cannot be sharded."""
    model: nn.Module = nn.Sequential(nn.Linear(2, 2))
    optimizer: Any = None
    if what == "sparse":
        model.append(nn.Embedding(5, 2, sparse=True))  # type: ignore[operator]
    if what == "complex":
        model.register_parameter("phase", nn.Parameter(torch.ones(4, dtype=torch.complex64)))
    if what == "lazy":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.append(nn.LazyLinear(4))  # type: ignore[operator]
    if what == "optimizer":
        optimizer = {"lr": 1}
    return message_of(lambda: tv.zero.shard(model, optimizer, mesh))
