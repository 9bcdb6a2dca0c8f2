"""How the ranks of one host find each other, prove that they may read each other's memory, and connect.

No paper. Whatever the kernel forbids, the ranks concerned send through gloo; what goes wrong afterwards is told on all.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trivium.base.errors import SetupError
from trivium.dist.nearby import Nearby, Reader

_PROBE = 0x7472697669756D
_CONNECT_TIMEOUT_S = 60.0
_TIMEVAL = struct.Struct("ll")


def meet(
    rank: int,
    neighbours: Mapping[int, int],
    swap: Callable[[Any], Sequence[Any]],
    timeout_s: float,
) -> Nearby | None:
    """Try to read ``neighbours`` (rank → process on this host), and connect to those where it works both ways.

    Collective: ``swap`` gives every rank's JSON value by rank. None where there is nobody to read.
    Raises SetupError on every rank when some cannot connect.
    """
    reader, door = _ways(len(neighbours)) if neighbours else (None, None)
    probe = torch.full((1,), _PROBE, dtype=torch.int64)
    with door if door is not None else contextlib.nullcontext():
        net = os.readlink("/proc/self/ns/net") if door is not None else ""  # which names of sockets are known in
        told = swap([probe.data_ptr(), door.getsockname().hex() if door is not None else "", net])
        seen: list[int] = []
        if reader is not None:
            alike = [other for other in neighbours if told[other][1] and told[other][2] == net]
            seen = [other for other in alike if _can_read(reader, neighbours[other], told[other][0])]
        everyone = swap(seen)
        near = {other: neighbours[other] for other in seen if rank in everyone[other]}
        made, problem = None, ""
        if reader is not None and door is not None and near:
            try:
                names = {other: bytes.fromhex(told[other][1]) for other in near}
                made = Nearby(
                    near, _connect(rank, near, names, door, min(timeout_s, _CONNECT_TIMEOUT_S)), reader, timeout_s
                )
            except (OSError, SetupError) as error:
                problem = str(error)
        elif reader is not None:
            reader.let(0)
        problems = [f"rank {number}: {said}" for number, said in enumerate(swap(problem)) if said]
    if problems:
        if made is not None:
            made.close()
        raise SetupError(f"ranks of one host could not connect ({'; '.join(problems)}); use tv.init(nearby=False)")
    return made


def _ways(num_neighbours: int) -> tuple[Reader, socket.socket] | tuple[None, None]:
    """A reader, and a socket at which others knock under a name that the kernel chooses, in no file system."""
    if sys.platform != "linux":
        return None, None
    with contextlib.ExitStack() as stack:
        try:
            reader = Reader()
            door = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            door.bind("")
            door.listen(num_neighbours + 8)
        except OSError:
            return None, None
        if os.getppid() > 1:
            reader.let(os.getppid())  # the launcher, whose other children the neighbours are
        stack.pop_all()
        return reader, door


def _can_read(reader: Reader, pid: int, address: int) -> bool:
    """Whether the kernel lets this process see the probe of process ``pid``."""
    found = torch.zeros(1, dtype=torch.int64)
    try:
        reader.read(pid, address, found)
    except OSError:
        return False
    return int(found) == _PROBE


def _connect(
    rank: int, near: Mapping[int, int], names: Mapping[int, bytes], door: socket.socket, timeout_s: float
) -> dict[int, socket.socket]:
    """A socket to each of ``near``: this rank knocks at those below it, and opens to those above."""
    sockets: dict[int, socket.socket] = {}
    until_s = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        selector.register(door, selectors.EVENT_READ)
        for other, pid in near.items():
            process = os.pidfd_open(pid)
            stack.callback(os.close, process)
            selector.register(process, selectors.EVENT_READ, f"rank {other} (process {pid}) ended")
        kept = stack.enter_context(contextlib.ExitStack())
        for other in sorted(near):
            if other < rank:
                sockets[other] = kept.enter_context(_knock(names[other], near[other], timeout_s))
        while len(sockets) < len(near):
            ready = selector.select(max(0.0, until_s - time.monotonic()))
            ended = [key.data for key, _ in ready if key.data]
            if ended or not ready:
                late = ", ".join(
                    f"rank {other} (process {near[other]})" for other in sorted(near.keys() - sockets.keys())
                )
                raise SetupError(" and ".join(ended) or f"{late} did not connect within {timeout_s:g} s")
            one, _ = door.accept()
            one.setblocking(True)
            callers = [other for other in near if near[other] == _process_behind(one) and other > rank]
            if callers:
                sockets[callers[0]] = kept.enter_context(one)
            else:
                one.close()
        kept.pop_all()
    return sockets


def _knock(name: bytes, pid: int, timeout_s: float) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        # Not `settimeout`: a door with many before it would refuse at once.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6)))
        one.connect(name)
        if _process_behind(one) != pid:
            raise SetupError(f"process {_process_behind(one)} answers in place of process {pid}, a rank of this run")
    except OSError as error:
        one.close()
        raise SetupError(f"process {pid} does not answer: {error}") from error
    except SetupError:
        one.close()
        raise
    return one


def _process_behind(one: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
