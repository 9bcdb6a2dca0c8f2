"""What the ranks run for tests/dist."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh

import trivium as tv
from tests.clock import Since
from trivium.base.errors import ConfigError, MismatchError, RankError, SetupError
from trivium.dist.meeting import meet
from trivium.dist.mesh import Mesh


def moves(mesh: Any) -> dict[str, Any]:
    """One of each collective, and what the ledger says of it."""
    comm, rank, size = mesh.comm("dp"), mesh.rank, mesh.size
    with mesh.ledger() as sent:
        gathered = torch.empty(4 * size)
        comm.all_gather(gathered, torch.full((4,), float(rank)), "forward").wait()
        send = torch.arange(3.0 * size).view(size, 3) + 100 * rank
        received = torch.full((size, 3), -1.0)
        comm.exchange(received, send, "backward").wait()
        received[rank] = send[rank]
        text = torch.full((2,), float(rank))
        comm.broadcast(text, src=size - 1)
        parts = comm.gather_tensor(torch.full((rank,), float(rank)), dst=0)
        with mesh.ledger() as inner:
            total = comm.all_reduce_ints([rank, 2**60 + rank])
            most = comm.all_reduce_ints([-rank], "max")
    return {
        "gathered": gathered.tolist(),
        "received": received.tolist(),
        "text": text.tolist(),
        "parts": None if parts is None else [part.tolist() for part in parts],
        "total": total,
        "most": most,
        "json": comm.all_gather_json({"rank": rank, "text": "é" * rank}),
        "told": comm.broadcast_json([rank], src=size - 1),
        "bytes": sent.bytes_by("phase"),
        "payload": sent.payload_bytes,
        "all": sent.bytes,
        "inner": inner.bytes_by("phase"),
        "calls": sent.calls,
        "after": inner.calls,
    }


def near_and_far(mesh: Any) -> dict[str, Any]:
    """An all-gather and an exchange with all ranks as neighbours, with only those of a pair, and with none."""
    size, rank, timeout_s = mesh.size, mesh.rank, 60.0
    found: dict[str, Any] = {"values": [], "bytes": []}
    for name in ("near", "some", "none"):
        made = Mesh(rank=rank, size=size, device=torch.device("cpu"))
        comm = made.comm("dp")
        pids = {other: pid for other, pid in enumerate(comm.all_gather_json(os.getpid())) if other != rank}
        if name == "some":
            pids = {other: pid for other, pid in pids.items() if other // 2 == rank // 2}
        made.link.nearby = meet(rank, pids if name != "none" else {}, comm.all_gather_json, timeout_s)
        found[name] = sorted(made.link.near)
        gathered, received = torch.empty(3 * size), torch.full((size, 5), -1.0)
        with made.ledger() as sent:
            first = comm.all_gather(gathered, torch.full((3,), float(rank)), "forward")
            send = torch.arange(float(size))[:, None].expand(size, 5).contiguous() + 100 * rank
            second = comm.exchange(received, send, "backward")
            for handle in (second, first) if rank % 2 else (first, second):
                handle.wait()
        found["values"].append((gathered.tolist(), received.tolist()))
        found["bytes"].append(sent.bytes)
        if made.link.nearby is not None:
            made.link.nearby.close()
    return found


def many_under_way(mesh: Any, count: int) -> list[float]:
    """So many all-gathers of 256 KiB, then what they brought."""
    comm, shard = mesh.comm("dp"), torch.full((1 << 16,), float(mesh.rank))
    output = torch.empty(mesh.size << 16)
    handles = [comm.all_gather(output, shard, "forward") for _ in range(count)]
    for handle in handles:
        handle.wait()
    return [float(value) for value in output.unique()]


def shard_in_place(mesh: Any) -> list[float]:
    """All-gather of a shard that is this rank's own range of the output."""
    output = torch.zeros(2 * mesh.size)
    output[2 * mesh.rank : 2 * mesh.rank + 2] = mesh.rank + 1.0
    mesh.comm("dp").all_gather(output, output[2 * mesh.rank : 2 * mesh.rank + 2], "x").wait()
    values: list[float] = output.tolist()
    return values


def differ(mesh: Any) -> str:
    try:
        mesh.comm("dp").require_equal("a" if mesh.rank else "b", "the letter")
    except MismatchError as error:
        return str(error)
    return "no error"


def agreements(mesh: Any) -> tuple[list[list[list[int]]], list[int], list[str]]:
    """Agreements of several lengths, the calls they took, and what is said where subject or length differ."""
    comm, last = mesh.comm("dp"), mesh.rank == mesh.size - 1
    found, calls, said = [], [], []
    for length in (0, 14, 15, 40):
        with mesh.ledger() as sent:
            found.append(comm.agree([mesh.rank - 2**62 + place for place in range(length)], "lengths", "counting"))
        calls.append(sent.calls)
    for what, length in (("tea" if last else "coffee", 3), ("cups", 40 if last else 3), ("cups", 15 if last else 14)):
        try:
            comm.agree([mesh.rank] * length, what, f"{length} {what}, ümläut" + " and more" * 20)
        except MismatchError as error:
            said.append(str(error))
    return found, calls, said


def come_for_different_things(mesh: Any) -> list[str]:
    """What is said where the last rank comes for another collective than the others, or with another count."""
    comm, last = mesh.comm("dp"), mesh.rank == mesh.size - 1
    pairs: list[tuple[Any, Any]] = [
        (comm.barrier, lambda: comm.all_reduce_ints([1])),
        (lambda: comm.all_reduce_ints([1]), lambda: comm.all_reduce_ints([1], "max")),
        (lambda: comm.agree([1, 2]), lambda: comm.agree([1])),
        (lambda: comm.all_gather_json("text"), lambda: comm.gather_tensor(torch.zeros(3))),
    ]
    said = []
    for others, mine in pairs:
        try:
            (mine if last else others)()
        except MismatchError as error:
            said.append(str(error))
    return said


def axes(mesh: Any) -> dict[str, Any]:
    """The axes of four ranks cut three ways, and two hybrid groups."""
    found: dict[str, Any] = {}
    for name, degrees in (("ep", {"ep": 2}), ("tp", {"tp": 2}), ("pp tp", {"pp": 2, "tp": 2})):
        made = Mesh(rank=mesh.rank, size=mesh.size, device=torch.device("cpu"), **degrees)
        found[name] = {axis: made.comm(axis).ranks for axis in ("world", "dp", "edp", "ep", "tp", "pp")}
        found[name]["sum"] = made.comm("dp").all_reduce_ints([made.rank])
    inside, across = mesh.split("dp", 2)
    found["split"] = (
        inside.ranks,
        across.ranks,
        inside.all_reduce_ints([mesh.rank]),
        across.all_reduce_ints([mesh.rank]),
    )
    again, _ = mesh.split("dp", 2)
    found["cached"] = again is inside and mesh.channel(inside, "gather") is mesh.channel(inside, "gather")
    return found


def impossible(mesh: Any) -> list[str]:
    said = []
    for degrees in ({"tp": 3}, {"ep": 3}, {"pp": 0}):
        try:
            Mesh(rank=mesh.rank, size=mesh.size, device=torch.device("cpu"), **degrees)
        except ConfigError as error:
            said.append(str(error))
    for call in (lambda: mesh.comm("no"), lambda: mesh.split("dp", 3)):
        try:
            call()
        except ConfigError as error:
            said.append(str(error))
    return said


def die(mesh: Any, how: str) -> str:
    """The last rank is killed, or stopped, while the others wait for it: after how long they are told what."""
    comm = mesh.comm("dp")
    control = mesh.channel(comm, "control")
    comm.barrier()
    if mesh.rank == mesh.size - 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
    since = Since()
    try:
        if how == "agree":
            comm.agree([1])
        elif how == "stop":
            control.agree([1])
        elif how == "all_gather":
            comm.all_gather(torch.empty(1000 * mesh.size), torch.empty(1000), "forward").wait()
        else:
            comm.exchange(torch.empty(mesh.size, 1000), torch.empty(mesh.size, 1000), "backward").wait()
    except RankError as error:
        return f"{since.seconds():.1f} s ({since.wall_s():.1f} s on the wall): {error}"
    return "0 s: no error"


def adopted(mesh: Any) -> dict[str, Any]:
    """What is made of torch's own device meshes, and what is said of those that do not fit."""
    size = mesh.size
    whole = tv.init(device_mesh=init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "tp")))
    found: dict[str, Any] = {axis: whole.comm(axis).ranks for axis in ("dp", "tp", "ep", "edp", "pp", "world")}
    found["sum"] = whole.comm("dp").all_reduce_ints([mesh.rank])
    said = []
    for shape, names in (((size,), None), ((size,), ("data",)), ((2, size // 2), ("tp", "dp"))):
        try:
            tv.init(device_mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        except ConfigError as error:
            said.append(str(error))
    found["said"] = said
    return found


__all__ = ["SetupError"]
