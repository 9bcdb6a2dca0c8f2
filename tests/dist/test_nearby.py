"""Rows between ranks of one host: read from memory to memory, in order, with an error where something is wrong."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.clock import Since
from tests.worlds import ROOT, Worlds, child_environment, free_port
from trivium.base.errors import MismatchError
from trivium.dist.meeting import meet
from trivium.dist.nearby import Nearby, Reader, channel_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory of other processes is read on Linux only")


@pytest.fixture
def pair() -> Iterator[tuple[Nearby, Nearby]]:
    """Ranks 0 and 1 in one process, each the other's neighbour."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    both = tuple(Nearby({1 - rank: os.getpid()}, {1 - rank: end}, Reader(), 60.0) for rank, end in enumerate(ends))
    yield both[0], both[1]
    for one in both:
        one.close()


def test_rows_arrive_in_the_order_of_their_channel(pair: tuple[Nearby, Nearby]) -> None:
    zero, one = pair
    given = [torch.full((1000,), float(number)) for number in range(4)]
    found = [torch.empty(1000) for _ in range(4)]
    sent = [zero.begin() for _ in given]
    for number in (2, 0, 3, 1):  # two on each of the channels 0 and 1, those of one channel in turn
        zero.give(sent[number], 1, number // 2, given[number])
    tickets = [one.begin() for _ in found]
    for number in (0, 1, 2, 3):
        one.expect(tickets[number], 0, number // 2, found[number])
    for ticket in (*reversed(tickets), *sent):
        ticket.wait()
        ticket.wait()
    assert [row.unique().tolist() for row in found] == [[0.0], [1.0], [2.0], [3.0]]


def test_a_row_may_be_expected_before_it_is_given_and_be_empty(pair: tuple[Nearby, Nearby]) -> None:
    zero, one = pair
    for numel in (0, 3, 1 << 20):
        found, expecting, giving = torch.empty(numel), one.begin(), zero.begin()
        one.expect(expecting, 0, 7, found)
        assert expecting.pending == [0]
        zero.give(giving, 1, 7, torch.arange(float(numel)))
        expecting.wait()
        giving.wait()
        assert torch.equal(found, torch.arange(float(numel)))


def test_rows_of_other_lengths_are_an_error_on_both_sides_and_the_next_arrive(pair: tuple[Nearby, Nearby]) -> None:
    zero, one = pair
    expecting, giving = one.begin(), zero.begin()
    one.expect(expecting, 0, 7, torch.empty(3))
    zero.give(giving, 1, 7, torch.empty(5))
    with pytest.raises(MismatchError, match="rank 0 came with 20 bytes where 12 were expected"):
        expecting.wait()
    with pytest.raises(MismatchError, match="rank 1 came with 12 bytes where 20 were expected"):
        giving.wait()
    again, giving = one.begin(), zero.begin()
    found = torch.empty(3)
    zero.give(giving, 1, 7, torch.ones(3))
    one.expect(again, 0, 7, found)
    again.wait()
    giving.wait()
    assert found.tolist() == [1.0] * 3


def test_a_peer_that_is_gone_ends_the_wait(pair: tuple[Nearby, Nearby]) -> None:
    zero, one = pair
    expecting, giving = one.begin(), one.begin()
    one.expect(expecting, 0, 7, torch.empty(3))
    one.give(giving, 0, 7, torch.empty(3))
    threading.Timer(0.2, zero.close).start()
    for ticket in (expecting, giving):
        with pytest.raises(RuntimeError, match="rank 0 closed its connection"):
            ticket.wait()
    late = one.begin()
    one.give(late, 0, 7, torch.empty(3))
    with pytest.raises(RuntimeError, match="rank 0 closed"):
        late.wait()


def test_a_peer_that_is_killed_ends_the_wait_though_a_child_of_it_holds_its_socket() -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    program = "import os, sys\nchild = os.fork()\nif child: print('both are there', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program],
        pass_fds=[ends[1].fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as peer:
        ends[1].close()
        assert peer.stdout is not None and peer.stdout.readline() == "both are there\n"
        one = Nearby({1: peer.pid}, {1: ends[0]}, Reader(), 240.0)
        expecting = one.begin()
        one.expect(expecting, 1, 7, torch.empty(3))
        since = Since()
        peer.kill()
        with pytest.raises(RuntimeError, match="rank 1 closed its connection"):
            expecting.wait()
        assert since.seconds() < 5
        one.close()


def test_a_peer_that_answers_what_was_never_given_is_parted_from() -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one = Nearby({0: os.getpid()}, {0: ends[0]}, Reader(), 60.0)
    expecting = one.begin()
    one.expect(expecting, 0, 7, torch.empty(3))
    ends[1].send(struct.pack("<BQQQQ", 1, 7, 12345, 0, 12))
    with pytest.raises(RuntimeError, match="rank 0 closed its connection"):
        expecting.wait()
    one.close()
    ends[1].close()


def test_rows_with_gaps_are_refused(pair: tuple[Nearby, Nearby]) -> None:
    one = pair[1]
    ticket = one.begin()
    for call in (one.expect, one.give):
        with pytest.raises(ValueError, match=r"strides \(2,\) on cpu: expected a contiguous one"):
            call(ticket, 0, 7, torch.empty(6)[::2])
    ticket.wait()  # nothing is under way


def test_a_silent_peer_is_waited_for_so_long_only() -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one = Nearby({0: os.getpid()}, {0: ends[0]}, Reader(), 0.1)
    ticket = one.begin()
    one.expect(ticket, 0, 7, torch.empty(3))
    with pytest.raises(RuntimeError, match=r"timed out after 0\.1 s"):
        ticket.wait()
    one.close()
    ends[1].close()


def test_memory_that_cannot_be_read_is_told_on_both_sides() -> None:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    zero = Nearby({1: os.getpid()}, {1: ends[0]}, Reader(), 60.0)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        one = Nearby({0: other.pid}, {0: ends[1]}, Reader(), 60.0)
        expecting, giving = one.begin(), zero.begin()
        one.expect(expecting, 0, 7, torch.empty(3))
        zero.give(giving, 1, 7, torch.empty(3))  # an address of this process, where the other has nothing
        with pytest.raises(RuntimeError, match="the memory of rank 0 cannot be read"):
            expecting.wait()
        with pytest.raises(RuntimeError, match="rank 1 could not read"):
            giving.wait()
        other.kill()
    one.close()
    zero.close()


def test_a_neighbour_that_ended_before_the_start_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one = Nearby({0: child.pid}, {0: ends[0]}, Reader(), 60.0)
    ticket = one.begin()
    one.expect(ticket, 0, 7, torch.empty(3))
    with pytest.raises(RuntimeError, match="rank 0 closed its connection"):
        ticket.wait()
    one.close()
    ends[1].close()


def test_containers_with_one_numbering_and_networks_of_their_own_are_no_neighbours() -> None:
    """Their memory may be read, but a socket's name means nothing in the other's network."""
    asked: list[object] = []

    def swap(value: object) -> list[object]:
        asked.append(value)
        other = [value[0], "00", "net:[1]"] if isinstance(value, list) and len(value) == 3 else value
        return [other, value]

    assert meet(1, {0: os.getpid()}, swap, 5.0) is None
    assert asked[1:] == [[], ""]


def test_a_forked_child_that_ends_leaves_its_parent_s_neighbours() -> None:
    program = """
import os, socket, torch
from trivium.dist.nearby import Nearby, Reader
ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
zero, one = (Nearby({1 - rank: os.getpid()}, {1 - rank: end}, Reader(), 60.0) for rank, end in enumerate(ends))
child = os.fork()
if child == 0:
    zero.close()
    os._exit(0)
os.waitpid(child, 0)
found, expecting, giving = torch.empty(3), one.begin(), zero.begin()
zero.give(giving, 1, 7, torch.ones(3))
one.expect(expecting, 0, 7, found)
expecting.wait()
giving.wait()
print(found.tolist())
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout == "[1.0, 1.0, 1.0]\n", done.stderr


def test_names_of_channels_are_told_apart() -> None:
    assert len({channel_of(str(number)) for number in range(1000)}) == 1000


@pytest.mark.parametrize("size", [2, 4])
def test_near_and_far_ranks_move_the_same(world: Worlds, size: int) -> None:
    """Every pair of neighbours, only some of them, and none: the rest goes through gloo, the ledger counts the same."""
    for rank, found in enumerate(world(size).run("tests.dist.cases", "near_and_far")):
        assert found["near"] == sorted(set(range(size)) - {rank})
        assert found["some"] == sorted(other for other in found["near"] if other // 2 == rank // 2)
        assert found["none"] == []
        gathered, received = found["values"][0]
        assert gathered == [float(other) for other in range(size) for _ in range(3)]
        assert received == [[100.0 * other + rank if other != rank else -1.0] * 5 for other in range(size)]
        assert found["values"] == [found["values"][0]] * 3
        assert found["bytes"] == [(size - 1) * (3 + 5) * 4] * 3


def test_far_more_rows_than_a_socket_holds_may_be_under_way(world: Worlds) -> None:
    """All are started before one is waited for, on both ranks, as a model of many units does at stage 0."""
    assert world(2).run("tests.dist.cases", "many_under_way", 2000) == [[0.0, 1.0]] * 2


def test_a_rank_that_dies_while_they_connect_is_named() -> None:
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.dist.killed_meeting"],
            cwd=ROOT,
            env=child_environment(
                {"RANK": str(rank), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [1, 1, -9]
    assert any(f"rank 2 (process {ranks[2].pid}" in told and "which is the cause" in told for told in said[:2])
    assert all("a peer was lost" in told for told in said[:2])
