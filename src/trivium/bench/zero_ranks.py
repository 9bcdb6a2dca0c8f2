"""What one rank does in a launch of ``trivium bench zero``: times in turns, or one contestant's memory or traffic.

Started by `bench.launch`: ``python -m trivium.bench.zero_ranks REQUEST FOLDER``.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from trivium.bench import loopback, resident
from trivium.bench.contestant import Contestant
from trivium.bench.launch import report, told
from trivium.bench.ours import Ours
from trivium.bench.runner import most_on, take_turns
from trivium.dist.launch import init, shutdown
from trivium.dist.mesh import Mesh
from trivium.models import DecoderConfig, build

LEARNING_RATE = 1e-4
_PEERS = {"ddp": "ddp", "fsdp2": "fsdp2", "fsdp2-keep": "fsdp2", "deepspeed": "deepspeed"}


class Workload:
    """One shape of model and batch; makes contestants and feeds them the same batches.

    ``mesh`` sends over loopback, as all rivals do; on ``near`` the ranks of one host read each other's memory.
    """

    def __init__(self, request: dict[str, Any], mesh: Mesh, near: Mesh) -> None:
        self.mesh, self.near = mesh, near
        self.config = DecoderConfig(**request["model"])
        self.batch, self.sequence = int(request["batch"]), int(request["sequence"])

    def contestant(self, name: str) -> Contestant:
        """A fresh contestant; all start from the same weights."""
        model = build(self.config, self.mesh.device, seed=0)
        kind, _, stage = name.rpartition("-")
        if kind in ("trivium", "loopback"):
            return Ours(model, LEARNING_RATE, self.near if kind == "trivium" else self.mesh, int(stage))
        peer = peer_of(name)
        one: Contestant
        if name == "ddp":
            one = peer.build(model, LEARNING_RATE)
        elif kind == "deepspeed":
            one = peer.build(model, LEARNING_RATE, self.batch, stage=int(stage))
        else:
            one = peer.build(model, LEARNING_RATE, self.mesh.device, self.mesh.size, reshard=name == "fsdp2")
        return one

    def data(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's tokens and targets of one step."""
        draw = torch.Generator().manual_seed(step * self.mesh.data_size + self.mesh.data_rank)
        tokens = torch.randint(0, self.config.vocabulary, (self.batch, self.sequence + 1), generator=draw)
        tokens = tokens.to(self.mesh.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step(self, contestant: Contestant, number: int, look: Callable[[], None] = lambda: None) -> float:
        """One training step; ``look`` is called after each third of it."""
        loss = contestant.forward(*self.data(number))
        look()
        contestant.backward(loss)
        look()
        contestant.update()
        look()
        if self.mesh.device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())


def time_in_turns(work: Workload, request: dict[str, Any]) -> dict[str, Any]:
    """All contestants of the request side by side; with a delay, each without it and with it."""
    until_s = time.monotonic() + float(request["repeat_s"])
    delay_s, losses = float(request["delay_s"]), {}
    warm_up = int(request["warm_up"])
    contestants = {name: work.contestant(name) for name in request["contestants"]}
    for name, one in contestants.items():
        losses[name] = [work.step(one, number) for number in range(warm_up)]
    gc.collect()

    def turn(one: Contestant, delayed: bool) -> Callable[[int], None]:
        counted = delayed or not delay_s

        def run(number: int) -> None:
            links = (work.mesh.link, work.near.link)
            for link in links:
                link.delay_s = delay_s if delayed else 0.0
            if counted:
                one.begin_count()
            work.step(one, number)
            if counted:
                one.end_count()
            for link in links:
                link.delay_s = 0.0

        return run

    steps = {name: turn(one, False) for name, one in contestants.items()}
    if delay_s:
        steps |= {f"{name}+delay": turn(one, True) for name, one in contestants.items()}
    turns = take_turns(
        steps,
        rounds=int(request["rounds"]),
        per_round=int(request["per_round"]),
        meet=work.mesh.comm("dp").barrier,
        first_step=warm_up,
        tries=int(request["tries"]),
        agree=most_on(work.mesh.comm("dp")),
        until_s=until_s,
    )
    return {
        "times": turns.times,
        "stolen": turns.stolen,
        "losses": losses,
        "counts": {name: one.counts() for name, one in contestants.items()},
        "near": sorted(work.near.link.near),
    }


def memory(work: Workload, request: dict[str, Any]) -> dict[str, Any]:
    """The peak of one contestant's steps above this process after imports and start-up."""
    name = request["contestants"][0]
    importlib.import_module("torch._dynamo")  # every optimizer loads it sooner or later: an import, no training memory
    if name.partition("-")[0] not in ("trivium", "loopback"):
        peer_of(name)
    resident.trim()
    on_gpu = work.mesh.device.type == "cuda"
    meet = work.mesh.comm("dp").barrier
    meet()
    before = resident.resident()
    gpu_before = torch.cuda.memory_allocated() if on_gpu else 0
    one = work.contestant(name)
    resident.trim()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    meet()
    states = resident.resident()
    with resident.Peak() as peak:
        for number in range(int(request["warm_up"]) + int(request["per_round"])):
            work.step(one, number, peak.look)
    return {
        "baseline_bytes": before.total_bytes,
        "before_steps_bytes": states.total_bytes - before.total_bytes,
        "peak_bytes": peak.highest.total_bytes - before.total_bytes,
        "peak_anonymous_bytes": peak.highest.anonymous_bytes - before.anonymous_bytes,
        "num_samples": peak.num_samples,
        "gpu_peak_bytes": torch.cuda.max_memory_allocated() - gpu_before if on_gpu else None,
    }


def traffic(work: Workload, request: dict[str, Any]) -> dict[str, Any]:
    """Loopback bytes of each contestant's steps, all ranks together, one contestant after another."""
    meet = work.mesh.comm("world").barrier
    found: dict[str, Any] = {}
    for name in request["contestants"]:
        one = work.contestant(name)
        for number in range(int(request["warm_up"])):
            work.step(one, number)
        meet()
        before = loopback.sent_bytes()
        meet()
        for number in range(int(request["per_round"])):
            work.step(one, number)
        meet()
        found[name] = (loopback.sent_bytes() - before) / int(request["per_round"])
        meet()
        del one
        gc.collect()
    return {"sent_bytes": found}


def peer_of(name: str) -> ModuleType:
    """The file that runs this rival."""
    return importlib.import_module(f"trivium.bench.peers.{_PEERS.get(name, name.rpartition('-')[0])}")


def main(request_path: str, folder: str) -> None:
    """Do what the request asks and report."""
    warnings.simplefilter("ignore")
    request: dict[str, Any] = json.loads(Path(request_path).read_text())
    torch.set_num_threads(1)
    mesh = init(device=request["device"], nearby=False)
    near = init(device=request["device"], nearby=request["mode"] != "traffic")  # what is counted there is all sent
    mode = {"time": time_in_turns, "memory": memory, "traffic": traffic}[request["mode"]]
    result = mode(Workload(request, mesh, near), request)
    report(folder, mesh.rank, result)
    mesh.comm("world").barrier()
    shutdown()


if __name__ == "__main__":
    with told(sys.argv[2]):
        main(sys.argv[1], sys.argv[2])
    os._exit(0)  # a rival's communication threads may outlive the interpreter and abort it; all is reported by now
