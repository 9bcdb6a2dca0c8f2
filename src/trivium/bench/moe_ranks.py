"""What one rank does in a launch of ``trivium bench moe``: layers in turns, one layer's memory, or exchanges.

Started by `bench.launch`: ``python -m trivium.bench.moe_ranks REQUEST FOLDER``.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from trivium.bench import resident
from trivium.bench.launch import report, told
from trivium.bench.moe_layers import Rivals, Shape
from trivium.bench.runner import most_on, take_turns
from trivium.dist.exchange import Counts, Exchange, ExchangeConfig, make_exchange
from trivium.dist.launch import init, shutdown
from trivium.dist.mesh import Mesh
from trivium.moe import MoE

_WARM_TOKENS = 16
Result = TypeVar("Result")


def layers(mesh: Mesh, request: dict[str, Any]) -> dict[str, Any]:
    """Forward and backward of whole layers, and their matrix products alone, in turns."""
    rivals = Rivals(Shape(**request["shape"]))
    made = {name: rivals.layer(name) for name in request["contestants"]}
    outs = {name: rivals.step(layer) for name, layer in made.items()}
    base = outs["trivium"]
    apart = {name: float((out - base).norm() / base.norm()) for name, out in outs.items()}
    products = rivals.products()
    steps: dict[str, Callable[[int], Any]] = {
        name: lambda step, layer=layer: rivals.step(layer)  # type: ignore[misc]
        for name, layer in made.items()
    }
    steps["products"] = lambda step: products()
    return {**_turns(mesh, steps, request), "apart": apart, "load": rivals.load()}


def movers(mesh: Mesh, request: dict[str, Any]) -> dict[str, Any]:
    """Gate, dispatch and combine alone, in turns: forward, and forward with backward."""
    rivals = Rivals(Shape(**request["shape"]))
    made = {name: rivals.mover(name) for name in request["contestants"]}

    def forward(layer: nn.Module) -> None:
        with torch.no_grad():
            layer(rivals.x_TC)

    outs = {name: layer(rivals.x_TC).detach() for name, layer in made.items()}
    base = outs["trivium"]
    steps: dict[str, Callable[[int], Any]] = {}
    for name, layer in made.items():
        steps[name] = lambda step, layer=layer: forward(layer)  # type: ignore[misc]
        steps[f"{name}+backward"] = lambda step, layer=layer: rivals.step(layer)  # type: ignore[misc]
    apart = {name: float((out - base).norm() / base.norm()) for name, out in outs.items()}
    return {**_turns(mesh, steps, request), "apart": apart}


def memory(mesh: Mesh, request: dict[str, Any]) -> dict[str, Any]:
    """The peak of one layer's forward and backward above parameters, code and a small batch's leftovers."""
    shape = Shape(**request["shape"])
    rivals = Rivals(shape)
    small = Rivals(Shape(**{**request["shape"], "tokens": _WARM_TOKENS}))
    layer = rivals.layer(request["contestants"][0])
    small.step(layer)
    layer.zero_grad(set_to_none=True)
    resident.trim()
    before = resident.resident()
    with resident.Peak(interval_s=0.001) as peak:
        for _ in range(int(request["rounds"])):
            rivals.step(layer)
            peak.look()
    return {
        "peak_bytes": peak.highest.anonymous_bytes - before.anonymous_bytes,
        "gradient_bytes": sum(p.numel() * p.element_size() for p in layer.parameters()),
        "num_samples": peak.num_samples,
    }


class Timed(Exchange):
    """An exchange that notes how long it took."""

    def __init__(self, inner: Exchange) -> None:
        super().__init__(inner.ranks, inner.source, inner.owners, inner.owner)
        self._inner, self.taken_s = inner, 0.0

    def agree(self, numbers: Sequence[int], phase: str) -> list[list[int]]:
        """Timed."""
        return self._timed(lambda: self._inner.agree(numbers, phase))

    def send(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """Timed."""
        return self._timed(lambda: self._inner.send(rows_RC, counts_SO, phase))

    def home(self, rows_RC: torch.Tensor, counts_SO: Counts, phase: str) -> torch.Tensor:
        """Timed."""
        return self._timed(lambda: self._inner.home(rows_RC, counts_SO, phase))

    def _timed(self, call: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        out = call()
        self.taken_s += time.perf_counter() - started
        return out


def training(mesh: Mesh, request: dict[str, Any]) -> dict[str, Any]:
    """Steps of a stack of layers with experts spread over all ranks: seconds, of them in all-to-all, and bytes.

    The formula is what this rank's rows cost all ranks: there and back, forward and backward, and the counts.
    """
    shape, depth = Shape(**request["shape"]), int(request["depth"])
    stack = [MoE(shape.dim, shape.ffn_dim, shape.experts, shape.top_k, mesh=mesh, seed=n) for n in range(depth)]
    exchanges = [Timed(layer.exchange) for layer in stack if layer.exchange is not None]
    for layer, exchange in zip(stack, exchanges, strict=True):
        layer.exchange = exchange
    optimizer = torch.optim.AdamW([p for layer in stack for p in layer.parameters()], lr=1e-4, fused=True)
    x_TC = torch.randn(shape.tokens, shape.dim, generator=torch.Generator().manual_seed(mesh.rank))
    times, inside, sent_bytes, formula_bytes = [], [], 0, 0
    for _ in range(int(request["warm_up"]) + int(request["rounds"])):
        mesh.comm("world").barrier()
        before = sum(one.taken_s for one in exchanges)
        started = time.perf_counter()
        h_TC, loss, formula_bytes = x_TC, torch.zeros(()), 0
        with mesh.ledger() as sent:
            for layer in stack:
                y_TC, aux = layer(h_TC)
                h_TC, loss = h_TC + y_TC, loss + aux.loss
                away = int(aux.load.sum()) - sum(int(aux.load[n]) for n in layer.experts.numbers)
                formula_bytes += (2 + 2) * away * shape.dim * 4 + (shape.experts + 3) * 8 * (mesh.size - 1)
            (loss + h_TC.square().mean()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - started)
        inside.append(sum(one.taken_s for one in exchanges) - before)
        sent_bytes = sent.bytes
    skip = int(request["warm_up"])
    return {"step_s": times[skip:], "exchange_s": inside[skip:], "bytes": sent_bytes, "formula_bytes": formula_bytes}


def crossover(mesh: Mesh, request: dict[str, Any]) -> dict[str, Any]:
    """Flat and hierarchical exchanges of evenly spread rows, there and back, in turns, for each size of message."""
    comm, dim = mesh.comm("ep"), int(request["dim"])
    ways = {"flat": ExchangeConfig(kind="flat")}
    ways |= {f"node {node}": ExchangeConfig(kind="hierarchical", node=node) for node in request["nodes"]}
    made = {name: make_exchange(mesh, comm, config) for name, config in ways.items()}
    found: dict[str, Any] = {}
    for message_bytes in request["sizes"]:
        rows = max(1, int(message_bytes) // (4 * dim))
        counts = [[rows] * comm.size] * comm.size
        rows_RC = torch.randn(rows * comm.size, dim)
        steps = {name: partial(_there_and_back, one, rows_RC, counts) for name, one in made.items()}
        found[str(message_bytes)] = _turns(mesh, steps, request)
    return {"by_size": found}


def _there_and_back(one: Exchange, rows_RC: torch.Tensor, counts_SO: Counts, step: int) -> None:
    one.home(one.send(rows_RC, counts_SO, "there"), counts_SO, "back")


def _turns(mesh: Mesh, steps: Mapping[str, Callable[[int], Any]], request: dict[str, Any]) -> dict[str, Any]:
    for step in steps.values():
        for number in range(int(request["warm_up"])):
            step(number)
    turns = take_turns(
        steps,
        rounds=int(request["rounds"]),
        per_round=int(request["per_round"]),
        meet=mesh.comm("world").barrier,
        clock=time.process_time if request.get("clock") == "cpu" else time.perf_counter,
        tries=int(request["tries"]),
        agree=most_on(mesh.comm("world")),
        until_s=float(request["until_s"]),
    )
    return {"times": turns.times, "stolen": turns.stolen}


def main(request_path: str, folder: str) -> None:
    """Do what the request asks and report."""
    warnings.simplefilter("ignore")
    request: dict[str, Any] = json.loads(Path(request_path).read_text())
    request["until_s"] = time.monotonic() + float(request["repeat_s"])
    torch.set_num_threads(int(request["threads"]))
    mesh = init(device="cpu", ep=int(request["ranks"]))
    modes = {"layers": layers, "movers": movers, "memory": memory, "training": training, "crossover": crossover}
    report(folder, mesh.rank, modes[request["mode"]](mesh, request))
    mesh.comm("world").barrier()
    shutdown()


if __name__ == "__main__":
    with told(sys.argv[2]):
        main(sys.argv[1], sys.argv[2])
    os._exit(0)  # a rival's threads may outlive the interpreter and abort it; all is reported by now
