"""Copies between the ranks of one host: each reads what the others offer straight from their memory.

ZeRO section 7 counts bytes between devices; between processes of one machine these need no network.

[Note: reading a neighbour]
Over loopback a byte is copied into the kernel and out again, by threads of both ranks, in pieces of a socket's buffer:
more than ten times the processor time of one copy. So a rank that sends to one on its host *offers* an address, and the
receiver copies from there with ``process_vm_readv``, then says *done*. Offers and answers are small messages on a
socket between the two processes; the kernel tells at once when the other process is gone (a child of it may still hold
the socket, so that this alone would not tell). A thread answers, so that a collective proceeds while its owner
computes. Linux only, and only where every pair of ranks proved at the start that the kernel lets it read
(`dist.meeting`); the others send through gloo.

[Note: listeners never wait]
A socket holds a few hundred messages, and a rank that offers more waits until its neighbour's listener has taken some.
Two listeners that waited for each other would hold everything: an answer that finds no room is kept until there is.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import selectors
import socket
import struct
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from trivium.base.errors import MismatchError

_MESSAGE = struct.Struct("<BQQQQ")
_TIMEVAL = struct.Struct("ll")
_CLOSED = "closed its connection"
_OFFER, _DONE, _REFUSED = 0, 1, 2
_PR_SET_PTRACER = 0x59616D61

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
    matched in the order in which they were started. ``timeout_s``: how long a wait, or an offer to a neighbour that
    does not listen, may last. Raises OSError where the system has no descriptor left.
    """

    def __init__(
        self, pids: Mapping[int, int], sockets: Mapping[int, socket.socket], reader: Reader, timeout_s: float
    ) -> None:
        self._pids, self._sockets, self._reader, self._timeout_s = dict(pids), dict(sockets), reader, timeout_s
        self._changed = threading.Condition()
        self._given: dict[Key, _Side] = {}
        self._expected: dict[Key, _Side] = {}
        self._offers: dict[Key, tuple[int, int]] = {}
        self._num_given: dict[tuple[int, int], int] = {}
        self._num_expected: dict[tuple[int, int], int] = {}
        self._gone: dict[int, str] = {}  # and how
        self._unsaid: dict[int, deque[bytes]] = {rank: deque() for rank in sockets}
        self._closed = False
        self._process = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._processes: dict[int, int] = {}
        for rank, one in sockets.items():
            one.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s), int(timeout_s % 1 * 1e6))
            )
            try:
                self._processes[rank] = os.pidfd_open(pids[rank])
            except ProcessLookupError:
                self._gone[rank] = _CLOSED
                continue
            self._selector.register(one, selectors.EVENT_READ, rank)
            self._selector.register(self._processes[rank], selectors.EVENT_READ, rank)
        self._thread = threading.Thread(target=self._listen, name="trivium-nearby", daemon=True)
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
        if self._closed:
            return
        self._closed = True
        if os.getpid() == self._process:
            for one in self._sockets.values():
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            self._thread.join(timeout=5)
            if self._thread.is_alive():
                return  # it copies a row: what it uses stays open until the process ends
        for one in self._sockets.values():
            one.close()
        for process in self._processes.values():
            os.close(process)
        self._selector.close()

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
        lost = sorted(set(self._gone).intersection(ticket.pending))
        return ticket.error or (RuntimeError(f"rank {lost[0]} {self._gone[lost[0]]}") if lost else None)

    def _listen(self) -> None:
        left = set(self._gone)
        try:
            while len(left) < len(self._sockets):
                for ready, events in self._selector.select():
                    if ready.data not in left and not self._attend(ready, events):
                        left.add(ready.data)
                        self._selector.unregister(self._sockets[ready.data])
                        self._selector.unregister(self._processes[ready.data])
                        self._lose(ready.data, _CLOSED)
        except Exception as error:  # nobody would answer any more: whoever waits is told why
            for rank in self._sockets:
                self._lose(rank, f"is heard no more: {error!r}")
            raise

    def _attend(self, ready: selectors.SelectorKey, events: int) -> bool:
        """Hear or answer the rank that is ready; False when it is gone."""
        rank = ready.data
        if ready.fileobj == self._processes[rank]:
            while self._hear(rank):
                pass  # what it said before it ended
            return False
        if events & selectors.EVENT_WRITE:
            self._say_unsaid(rank)
        return not events & selectors.EVENT_READ or self._hear(rank)

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
        else:
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
        """See [Note: listeners never wait]."""
        message = _MESSAGE.pack(kind, channel, number, address, num_bytes)
        if threading.current_thread() is self._thread:
            self._unsaid[rank].append(message)
            self._say_unsaid(rank)
            return
        try:
            self._sockets[rank].send(message)
        except BlockingIOError:
            self._lose(rank, f"took no message for {self._timeout_s:g} s")
        except OSError:
            self._lose(rank, _CLOSED)

    def _say_unsaid(self, rank: int) -> None:
        """Send answers as long as there is room, and come again when there is more."""
        unsaid, one = self._unsaid[rank], self._sockets[rank]
        try:
            while unsaid:
                one.send(unsaid[0], socket.MSG_DONTWAIT)
                unsaid.popleft()
        except BlockingIOError:
            pass
        except OSError:
            unsaid.clear()  # gone, as reading from it will tell
        if one.fileno() in self._selector.get_map():
            self._selector.modify(one, selectors.EVENT_READ | (selectors.EVENT_WRITE if unsaid else 0), rank)

    def _lose(self, rank: int, how: str) -> None:
        with self._changed:
            self._gone.setdefault(rank, how)
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
                code = ctypes.get_errno() if count else errno.EFAULT
                raise OSError(code, os.strerror(code))
            at, address = at + count, address + count


def _of_other_length(rank: int, mine: int, theirs: int) -> MismatchError:
    return MismatchError(
        f"rank {rank} came with {theirs} bytes where {mine} were expected; make every rank issue its collectives in "
        "the same order, on the same model"
    )
