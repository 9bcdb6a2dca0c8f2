"""Copies between the ranks of one host: each reads what the others offer straight from their memory.

ZeRO section 7 counts bytes between devices; between processes of one machine these need no network.

[Note: reading a neighbour]
Over loopback a byte is copied into the kernel and out again, by threads of both ranks, in pieces of a socket's buffer:
more than ten times the processor time of one copy. So a rank that sends to one on its host *offers* an address, and the
receiver copies from there with ``process_vm_readv``, then says *done*. Offers and answers are small messages on a
socket between the two processes; the kernel tells at once when the other process is gone (a child of it may still hold
the socket, so that this alone would not tell). A thread answers, so that a collective proceeds while its owner computes.
Linux only, and only where every pair of ranks proved at the start that the kernel lets it read; the others send through
gloo.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trivium.base.errors import MismatchError, SetupError

_MESSAGE = struct.Struct("<BQQQQ")
_TIMEVAL = struct.Struct("ll")
_OFFER, _DONE, _REFUSED = 0, 1, 2
_PROBE = 0x7472697669756D
_PR_SET_PTRACER = 0x59616D61
_CONNECT_TIMEOUT_S = 60.0

Key = tuple[int, int, int]  # rank, channel, number


class _Span(ctypes.Structure):
    """One range of memory, as the kernel's ``iovec``."""

    _fields_ = (("address", ctypes.c_void_p), ("num_bytes", ctypes.c_size_t))


@dataclass(kw_only=True, eq=False)
class Ticket:
    """Rows under way between this rank and its neighbours; ``wait`` returns when all were read on both sides.

    ``pending``: the neighbour of each row that was not.
    """

    nearby: Nearby
    pending: list[int] = field(default_factory=list)
    error: Exception | None = None

    def wait(self) -> None:
        """Block until done. Raises RuntimeError where a peer is gone or silent, MismatchError where it sends more."""
        self.nearby.wait_for(self)


@dataclass(frozen=True, kw_only=True)
class _Side:
    """What this rank gives to or expects from a neighbour; the tensor stays alive until it was read."""

    row: torch.Tensor
    ticket: Ticket


class Nearby:
    """The neighbours of this rank, ``pids`` by rank, and what is under way between them and it.

    ``sockets``: one connected SOCK_SEQPACKET socket for each neighbour. Messages of one channel and pair of ranks are
    matched in the order in which they were started. ``timeout_s``: how long a wait, or a message to a neighbour that
    does not listen, may last.
    """

    def __init__(
        self, pids: Mapping[int, int], sockets: Mapping[int, socket.socket], reader: Reader | None, timeout_s: float
    ) -> None:
        self._pids, self._sockets, self._reader, self._timeout_s = dict(pids), dict(sockets), reader, timeout_s
        self._changed = threading.Condition()
        self._given: dict[Key, _Side] = {}
        self._expected: dict[Key, _Side] = {}
        self._offers: dict[Key, tuple[int, int]] = {}
        self._num_given: dict[tuple[int, int], int] = {}
        self._num_expected: dict[tuple[int, int], int] = {}
        self._gone: set[int] = set()
        self._closed = False
        self._process = os.getpid()
        self._processes: dict[int, int] = {}
        for rank, one in sockets.items():
            try:
                self._processes[rank] = os.pidfd_open(pids[rank])
            except ProcessLookupError:
                self._gone.add(rank)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6)))
        self._thread = threading.Thread(target=self._listen, name="trivium-nearby", daemon=True)
        if sockets:
            self._thread.start()

    @property
    def ranks(self) -> frozenset[int]:
        """The ranks whose memory this one reads, and that read this one's."""
        return frozenset(self._sockets)

    def begin(self) -> Ticket:
        """A ticket for one collective."""
        return Ticket(nearby=self)

    def expect(self, ticket: Ticket, rank: int, channel: int, row: torch.Tensor) -> None:
        """Fill ``row`` (contiguous, on the CPU) with what ``rank`` gives next on this channel."""
        with self._changed:
            key = self._next(self._num_expected, ticket, rank, channel, row)
            self._expected[key] = _Side(row=row, ticket=ticket)
            ready = key in self._offers
        if ready:
            self._read(key)

    def give(self, ticket: Ticket, rank: int, channel: int, row: torch.Tensor) -> None:
        """Let ``rank`` read ``row`` (contiguous, on the CPU), which must not change until the ticket was waited for."""
        with self._changed:
            key = self._next(self._num_given, ticket, rank, channel, row)
            self._given[key] = _Side(row=row, ticket=ticket)
        self._say(rank, _OFFER, channel, key[2], row.data_ptr(), row.nbytes)

    def wait_for(self, ticket: Ticket) -> None:
        """See `Ticket.wait`."""
        if not ticket.pending:
            return
        with self._changed:
            done = self._changed.wait_for(
                lambda: not ticket.pending or self._failure(ticket) is not None, self._timeout_s
            )
            if not ticket.pending:
                return
            error = self._failure(ticket)
        if error is not None:
            raise error
        if not done:
            raise RuntimeError(f"timed out after {self._timeout_s:g} s")

    def close(self) -> None:
        """Part from the neighbours; the thread ends. A forked child lets go of its copies alone."""
        self._closed = True
        if os.getpid() == self._process:
            for one in self._sockets.values():
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            if self._thread.is_alive():
                self._thread.join(timeout=5)
            if self._reader is not None:
                self._reader.let(0)
        for one in self._sockets.values():
            one.close()
        for process in self._processes.values():
            os.close(process)
        self._processes.clear()

    def _next(
        self, numbers: dict[tuple[int, int], int], ticket: Ticket, rank: int, channel: int, row: torch.Tensor
    ) -> Key:
        if not row.is_contiguous() or row.device.type != "cpu":
            raise ValueError(f"a row of strides {row.stride()} on {row.device}: expected a contiguous one on the CPU")
        ticket.pending.append(rank)
        number = numbers.get((rank, channel), 0)
        numbers[rank, channel] = number + 1
        return rank, channel, number

    def _failure(self, ticket: Ticket) -> Exception | None:
        lost = self._gone.intersection(ticket.pending)
        return ticket.error or (RuntimeError(f"rank {min(lost)} closed its connection") if lost else None)

    def _listen(self) -> None:
        left: set[int] = set()
        with selectors.DefaultSelector() as selector:
            for rank, process in self._processes.items():
                selector.register(self._sockets[rank], selectors.EVENT_READ, rank)
                selector.register(process, selectors.EVENT_READ, rank)
            while selector.get_map():
                for ready, _ in selector.select():
                    rank = ready.data
                    ended = ready.fileobj == self._processes[rank]
                    if rank in left or (not ended and self._hear(rank)):
                        continue
                    while ended and self._hear(rank):
                        pass  # what it said before it ended
                    left.add(rank)
                    selector.unregister(self._sockets[rank])
                    selector.unregister(self._processes[rank])
                    self._lose(rank)

    def _hear(self, rank: int) -> bool:
        """Take one message of ``rank`` that is there; False when there is none, because it is gone."""
        try:
            data = self._sockets[rank].recv(_MESSAGE.size, socket.MSG_DONTWAIT)
        except ConnectionResetError:  # the peer closed with something unread; what it sent before is still to come
            return not self._closed
        except OSError:
            return False
        if len(data) < _MESSAGE.size:
            return False
        kind, channel, number, address, num_bytes = _MESSAGE.unpack(data)
        key = (rank, channel, number)
        if kind == _OFFER:
            with self._changed:
                self._offers[key] = (address, num_bytes)
                expected = key in self._expected
            if expected:
                self._read(key)
        else:
            side = self._given.pop(key, None)
            if side is None:
                return False  # an answer to nothing: this is no peer of ours any more
            error: Exception | None = None
            if num_bytes != side.row.nbytes:
                error = _of_other_length(rank, side.row.nbytes, num_bytes)
            elif kind == _REFUSED:
                error = RuntimeError(f"rank {rank} could not read the memory of this rank")
            self._settle(rank, side, error)
        return True

    def _read(self, key: Key) -> None:
        """Copy what was offered, by whichever thread comes first."""
        with self._changed:
            offer = self._offers.pop(key, None)
            if offer is None:
                return
            side = self._expected.pop(key)
        rank, channel, number = key
        address, num_bytes = offer
        error: Exception | None = None
        if num_bytes != side.row.nbytes:
            error = _of_other_length(rank, side.row.nbytes, num_bytes)
        elif self._reader is not None:
            try:
                self._reader.read(self._pids[rank], address, side.row)
            except OSError as failed:
                error = RuntimeError(f"the memory of rank {rank} cannot be read: {failed}")
        self._say(rank, _DONE if error is None else _REFUSED, channel, number, 0, side.row.nbytes)
        self._settle(rank, side, error)

    def _settle(self, rank: int, side: _Side, error: Exception | None) -> None:
        with self._changed:
            side.ticket.error = side.ticket.error or error
            if error is None:
                side.ticket.pending.remove(rank)
            if not side.ticket.pending or error is not None:
                self._changed.notify_all()

    def _say(self, rank: int, kind: int, channel: int, number: int, address: int, num_bytes: int) -> None:
        try:
            self._sockets[rank].send(_MESSAGE.pack(kind, channel, number, address, num_bytes))
        except OSError:
            self._lose(rank)

    def _lose(self, rank: int) -> None:
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()


def channel_of(name: str) -> int:
    """The number of the channel of this name; see `Nearby`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class Reader:
    """The kernel's way to copy out of another process. Raises OSError where there is none."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(None, use_errno=True)
            self._call, self._control = library.process_vm_readv, library.prctl
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, TypeError) as error:
            raise OSError("this system has no process_vm_readv or pidfd_open") from error
        self._call.restype = ctypes.c_ssize_t

    def let(self, pid: int) -> None:
        """Where Yama guards processes: let ``pid`` and its children read this one; 0: nobody any more."""
        self._control(_PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0)

    def read(self, pid: int, address: int, row: torch.Tensor) -> None:
        """Fill ``row`` (contiguous, on the CPU) from ``address`` in process ``pid``. Raises OSError."""
        at, end = row.data_ptr(), row.data_ptr() + row.nbytes
        while at < end:
            mine, theirs = _Span(at, end - at), _Span(address, end - at)
            count = self._call(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0)
            if count <= 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            at, address = at + count, address + count

    def can_read(self, pid: int, address: int) -> bool:
        """Whether the kernel lets this process see the probe of process ``pid``."""
        found = torch.zeros(1, dtype=torch.int64)
        try:
            self.read(pid, address, found)
        except OSError:
            return False
        return int(found) == _PROBE


def meet(
    rank: int,
    neighbours: Mapping[int, int],
    swap: Callable[[Any], Sequence[Any]],
    timeout_s: float,
) -> Nearby:
    """Try to read ``neighbours`` (rank → process on this host), and connect to those where it works both ways.

    Collective: ``swap`` gives every rank's JSON value by rank.
    """
    reader = _reader() if neighbours else None
    door = _open_door() if reader is not None else None
    probe = torch.full((1,), _PROBE, dtype=torch.int64)
    net = os.readlink("/proc/self/ns/net") if door is not None else ""  # which names of sockets are known in
    told = swap([probe.data_ptr(), door.getsockname().hex() if door is not None else "", net])
    seen: list[int] = []
    if reader is not None:
        alike = [other for other in neighbours if told[other][1] and told[other][2] == net]
        seen = [other for other in alike if reader.can_read(neighbours[other], told[other][0])]
    everyone = swap(seen)
    near = {other: neighbours[other] for other in seen if rank in everyone[other]}
    sockets: dict[int, socket.socket] = {}
    if door is not None:
        with door:
            for other in near:
                if other < rank:
                    sockets[other] = _knock(bytes.fromhex(told[other][1]), near[other])
            while len(sockets) < len(near):
                one, pid = _answer(door)
                caller = [other for other in near if near[other] == pid and other > rank]
                if caller:
                    sockets[caller[0]] = one
                else:
                    one.close()
    swap(None)
    return Nearby(near, sockets, reader, timeout_s)


def _reader() -> Reader | None:
    if sys.platform != "linux":
        return None
    try:
        reader = Reader()
        reader.let(os.getppid())  # the launcher, whose other children the neighbours are
    except OSError:
        return None
    return reader


def _open_door() -> socket.socket:
    """A socket under a name that the kernel chooses, in no file system."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    door.bind("")
    door.listen(128)
    door.settimeout(_CONNECT_TIMEOUT_S)
    return door


def _knock(name: bytes, pid: int) -> socket.socket:
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.settimeout(_CONNECT_TIMEOUT_S)
    one.connect(name)
    one.settimeout(None)
    if _process_behind(one) != pid:
        raise SetupError(f"process {_process_behind(one)} answers in place of process {pid}, a rank of this run")
    return one


def _answer(door: socket.socket) -> tuple[socket.socket, int]:
    try:
        one, _ = door.accept()
    except TimeoutError:
        raise SetupError(f"a rank on this host did not connect within {_CONNECT_TIMEOUT_S:g} s") from None
    one.settimeout(None)
    return one, _process_behind(one)


def _process_behind(one: socket.socket) -> int:
    pid, _, _ = struct.unpack("3i", one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def _of_other_length(rank: int, mine: int, theirs: int) -> MismatchError:
    return MismatchError(
        f"rank {rank} came with {theirs} bytes where {mine} were expected; make every rank issue its collectives in "
        "the same order, on the same model"
    )
