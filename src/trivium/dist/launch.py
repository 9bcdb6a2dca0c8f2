"""Join the processes of a run: torchrun's environment, Slurm's or MPI's, or a world of one. The only reader of these
variables.

Nothing here starts processes; torchrun does.
"""

from __future__ import annotations

import atexit
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore
from torch.distributed.device_mesh import DeviceMesh

from trivium.base.errors import ConfigError, SetupError
from trivium.dist.comm import Comm, Link
from trivium.dist.mesh import Mesh

_SOURCES = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("Slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True, kw_only=True)
class World:
    """Who this process is among the others, and where they meet."""

    source: str
    rank: int
    size: int
    local_rank: int
    address: str | None
    port: int | None


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """The world that ``environment`` (default: the process's own) describes. Raises SetupError on half of one."""
    env = os.environ if environment is None else environment
    for source, rank_key, size_key, local_key in _SOURCES:
        if source == "Slurm" and "SLURM_STEP_ID" not in env:
            continue
        if rank_key not in env and size_key not in env:
            continue
        rank, size = _number(env, rank_key, source), _number(env, size_key, source)
        if not 0 <= rank < size:
            raise SetupError(f"{rank_key}={rank} is not below {size_key}={size}: expected 0 to {size - 1}")
        local_rank = _number(env, local_key, source) if local_key in env else rank
        if size == 1:
            return World(source=source, rank=0, size=1, local_rank=local_rank, address=None, port=None)
        address = env.get("MASTER_ADDR") or (
            _first_host(env.get("SLURM_JOB_NODELIST", "")) if source == "Slurm" else ""
        )
        if not address:
            raise SetupError(
                f"{rank_key}={rank} and {size_key}={size} are set but MASTER_ADDR is not: set it to the host "
                "of rank 0, or start with torchrun"
            )
        if "MASTER_PORT" not in env and source == "torchrun":
            raise SetupError("MASTER_ADDR is set but MASTER_PORT is not: set it to a free port, or start with torchrun")
        port = _number(env, "MASTER_PORT", source) if "MASTER_PORT" in env else 29_500
        if not 1 <= port <= 65_535:
            raise SetupError(f"MASTER_PORT={port}: expected 1 to 65535")
        return World(source=source, rank=rank, size=size, local_rank=local_rank, address=address, port=port)
    return World(source="alone", rank=0, size=1, local_rank=0, address=None, port=None)


def init(
    *,
    ep: int = 1,
    tp: int = 1,
    pp: int = 1,
    device_mesh: DeviceMesh | None = None,
    device: str = "auto",
    timeout_s: float = 300.0,
    delay_s: float = 0.0,
    nearby: bool = True,
) -> Mesh:
    """Join the other ranks and arrange them. Collective; keeps no global of its own.

    Creates torch's default process group, or reuses the one that is there. ``device`` is ``auto`` (CUDA where there is
    one, otherwise the CPU), ``cpu`` or ``cuda``. ``delay_s`` is added to every collective, to measure what is hidden.
    ``nearby``: on the CPU, ranks of one host read each other's memory where the kernel permits it, instead of sending
    over loopback; the network's counters then miss what parameters and gradients take. `Link.near` says with whom.
    A collective that waits longer than ``timeout_s`` for a peer raises RankError, on every axis.
    Raises SetupError when the environment is half set or rank 0 cannot be reached, ConfigError on impossible degrees.
    """
    if device_mesh is not None:
        return _adopt(device_mesh, delay_s, timeout_s, nearby)
    world = read_world()
    place = _device(device, world.local_rank)
    if not dist.is_initialized():
        _join(world, place, timeout_s)
        atexit.register(shutdown)
    mesh = Mesh(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=place,
        ep=ep,
        tp=tp,
        pp=pp,
        delay_s=delay_s,
        timeout_s=timeout_s,
    )
    mesh.link.watch(mesh.comm("world"), timeout_s, nearby=nearby and place.type == "cpu")
    atexit.register(mesh.link.close)  # runs before shutdown: the last registered goes first
    return mesh


def shutdown() -> None:
    """Leave cleanly, so that the others do not take this rank for dead. Optional."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world_comm() -> Comm:
    """Everyone in torch's default group, or this process alone when there is none; for rooms that were given no
    mesh."""
    link = Link(torch.device("cpu"))
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Comm("world", [0], 0, None, link)
    if dist.get_backend() == "nccl":
        link = Link(torch.device("cuda", torch.cuda.current_device()))
    return Comm("world", range(dist.get_world_size()), dist.get_rank(), dist.group.WORLD, link)


def _adopt(device_mesh: DeviceMesh, delay_s: float, timeout_s: float, nearby: bool) -> Mesh:
    names = device_mesh.mesh_dim_names
    if names is None:
        raise ConfigError("device_mesh has no dimension names: name them from pp, dp, ep, tp")
    unknown = [name for name in names if name not in ("pp", "dp", "ep", "tp")]
    if unknown:
        raise ConfigError(f"device_mesh has a dimension {unknown[0]!r}: expected names from pp, dp, ep, tp")
    order = [name for name in ("pp", "dp", "ep", "tp") if name in names]
    if list(names) != order:
        raise ConfigError(f"device_mesh dimensions are {tuple(names)}: expected the order {tuple(order)}")
    if not torch.equal(device_mesh.mesh.flatten(), torch.arange(dist.get_world_size())):
        raise ConfigError("device_mesh does not cover the ranks 0 to N-1 in order; build it with init_device_mesh")
    sizes = dict(zip(names, device_mesh.mesh.shape, strict=True))
    place = _device(device_mesh.device_type, int(os.environ.get("LOCAL_RANK", dist.get_rank())))
    mesh = Mesh(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=place,
        ep=sizes.get("ep", 1),
        tp=sizes.get("tp", 1),
        pp=sizes.get("pp", 1),
        delay_s=delay_s,
        timeout_s=timeout_s,
    )
    mesh.link.watch(mesh.comm("world"), timeout_s, nearby=nearby and place.type == "cpu")
    atexit.register(mesh.link.close)
    return mesh


def _join(world: World, place: torch.device, timeout_s: float) -> None:
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if world.size == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if world.address is None or world.port is None:
        raise SetupError("a world of several ranks needs the address and port of rank 0")
    try:
        managed = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if managed:
            dist.init_process_group(backend, timeout=timeout)
            return
        _resolve(world.address)
        store = TCPStore(
            world.address, world.port, world.size, world.rank == 0, timedelta(seconds=min(timeout_s, 60.0))
        )
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise SetupError(
            f"rank {world.rank} of {world.size} could not meet the others at {world.address}:{world.port}: "
            f"{str(error).splitlines()[0]}. Check that MASTER_ADDR is rank 0's host and MASTER_PORT is free"
        ) from error


def _resolve(address: str) -> None:
    """Fail at once on a name that nobody knows: the store would try for a minute."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise SetupError(
            f"MASTER_ADDR={address!r} is not the name of a host: {error.strerror}. Set it to the host of rank 0"
        ) from error


def _device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device={device!r}: expected auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SetupError("device=cuda, but torch sees no CUDA device: install a CUDA build of torch or use device=cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise SetupError(f"local rank {local_rank} has no GPU: this host has {count}; start at most {count} ranks here")
    place = torch.device("cuda", local_rank)
    torch.cuda.set_device(place)
    return place


def _number(env: Mapping[str, str], key: str, source: str) -> int:
    text = env.get(key)
    if text is None:
        raise SetupError(f"{source}'s environment is half set: {key} is missing")
    if not re.fullmatch(r"-?\d{1,9}", text.strip()):
        raise SetupError(f"{key}={text!r}: expected a whole number")
    return int(text)


def _first_host(nodes: str) -> str:
    """The first host of Slurm's compressed list: ``node[003-007,9],other`` is ``node003``."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "" if match is None else match.group(1) + (match.group(2) or "")
