"""What a client can do to its connection: too much, too slow, too often, or leave (H8 to H14, H32).

Nothing happens before its deadline, and in the end it does; how soon is measured by ``trivium bench serve --promises``.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serve.process import Spawner
from tests.serve.running import Answer, Running, eventually, read_all, running, user
from tests.serve.stub import BLOCKS, StubEngine
from trivium.serve.limits import Limits

pytestmark = pytest.mark.timeout(150)
QUICK = Limits(header_s=0.6, body_s=1.0, idle_s=1.0, stall_s=0.8, connections=40, drain_s=0.2)


@pytest.fixture(scope="module")
def quick() -> Iterator[Running]:
    """A server with short deadlines and a slow engine: 20 tokens a second."""
    with running(StubEngine(step_s=0.05), limits=QUICK) as handle:
        yield handle


def head(path: str = "/v1/chat/completions", method: str = "POST", **headers: str) -> bytes:
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{lines}\r\n".encode()


def chat_bytes(**more: Any) -> bytes:
    body = json.dumps({"model": "stub", "messages": [user("hi")], "max_tokens": 200} | more).encode()
    return head(Content_Type="application/json", Content_Length=str(len(body))) + body


def connect(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=60)


def open_connections(server: Running) -> int:
    return sum(
        c.status == psutil.CONN_ESTABLISHED and c.laddr.port == server.port
        for c in psutil.Process().net_connections(kind="tcp")
    )


def test_a_body_over_the_cap(server: Running) -> None:  # H8
    answer = server.post("/v1/chat/completions", b"x" * (2 * 1024 * 1024 + 1))
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


def test_a_gigabyte_in_chunks_is_read_to_the_cap_only(server: Running) -> None:  # H8
    chunk = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    before = psutil.Process().memory_info().rss
    with connect(server) as sock:
        sock.sendall(head(Transfer_Encoding="chunked", Content_Type="application/json"))
        sent = 0
        with contextlib.suppress(OSError):
            for _ in range(1024):
                sock.sendall(chunk)
                sent += 1
        answer = Answer(read_all(sock))
    assert sent < 32
    assert answer.status in (413, 0)  # 0: the answer was lost with the connection
    assert psutil.Process().memory_info().rss - before < 24 << 20


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head(Content_Length="5", Transfer_Encoding="chunked") + b"0\r\n\r\n", 400),
        (head(Content_Length="-1"), 400),
        (head(Content_Length="1e3"), 400),
        (head(Content_Length="9" * 30), 400),
        (head(Content_Length="99999999999"), 413),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
        (b"GET /livez HTTP/9.9\r\nHost: localhost\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nBad Header: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n", 400),
        (b"CONNECT evil:443 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"TRACE /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    ],
)
def test_malformed_requests(server: Running, raw: bytes, status: int) -> None:  # H8
    answer = Answer(server.raw(raw))
    assert answer.status == status, answer.raw
    assert answer.error["message"]
    assert answer.headers["connection"] == "close"


def test_a_body_shorter_than_it_says_is_waited_for_to_the_deadline(quick: Running) -> None:  # H8, H11
    started = time.monotonic()
    answer = Answer(quick.raw(head(Content_Length="100", Content_Type="application/json") + b'{"a"'))
    assert (answer.status, answer.error["code"]) == (408, "body_timeout")
    assert time.monotonic() - started > 0.9


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (head("/" + "x" * 20_000, "GET"), 414),
        (head("/livez", "GET", X="y" * 20_000), 431),
        (head("/livez", "GET", **{f"X_{i}": "y" for i in range(500)}), 431),
    ],
    ids=["url", "size", "count"],
)
def test_a_head_over_the_cap(server: Running, raw: bytes, status: int) -> None:  # H9
    answer = Answer(server.raw(raw))
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    assert answer.error["code"]


STARTS = (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /", b"\r\n")


def test_endless_heads_cost_no_memory() -> None:  # H9: 8 MB header, 1 MB URL, at the server's highest
    spawner = Spawner()
    pid, port = spawner.start()

    def send(start: bytes) -> None:
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock, contextlib.suppress(OSError):
            sock.sendall(start)
            for _ in range(8):
                sock.sendall((b"\r\n" * 500_000) if start == b"\r\n" else b"y" * 1_000_000)
            read_all(sock)

    try:
        for start in STARTS:
            send(start)  # what is made once, with the first of its kind
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the highest is measured anew
        before = resident_kib(pid, "VmRSS")
        for start in STARTS * 3:
            send(start)
        assert resident_kib(pid, "VmHWM") - before < 2_000_000 // 1024
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
            sock.sendall(head("/livez", "GET", Connection="close"))
            assert Answer(read_all(sock)).status == 200
    finally:
        os.kill(pid, 15)
        assert (spawner.line(), spawner.line()) == ("stopped", "0")
        spawner.close()


def resident_kib(pid: int, which: str) -> int:
    """A process's resident memory now (VmRSS), or the highest since it was set back (VmHWM)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(which)).split()[1])


def test_slow_heads_are_closed_and_hurt_nobody(quick: Running) -> None:  # H10
    slow = []
    started = time.monotonic()
    for _ in range(30):
        sock = connect(quick)
        sock.sendall(b"GET /livez HTTP/1.1\r\n")
        slow.append(sock)
    try:

        def all_closed() -> bool:
            for sock in slow:
                with contextlib.suppress(OSError):
                    sock.send(b"a")
            assert quick.get("/livez").status == 200
            closed = sum(_ended(sock) for sock in slow)
            assert not closed or time.monotonic() - started > QUICK.header_s - 0.2
            time.sleep(0.02)
            return closed == len(slow)

        eventually(all_closed)
    finally:
        for sock in slow:
            sock.close()


def _ended(sock: socket.socket) -> bool:
    sock.setblocking(False)
    try:
        while part := sock.recv(4096):
            if b" 408 " in part:
                return True
        return True
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        sock.setblocking(True)


def test_idle_connections_are_closed(quick: Running) -> None:
    with connect(quick) as sock:
        started = time.monotonic()
        sock.sendall(head("/livez", "GET"))
        data = read_all(sock)
    assert b"200 OK" in data
    assert time.monotonic() - started > 0.5


def test_blank_lines_keep_no_connection_open(quick: Running) -> None:
    with connect(quick) as sock:

        def closed() -> bool:
            with contextlib.suppress(OSError):
                sock.sendall(b"\r\n")
            time.sleep(0.1)
            return _ended(sock)

        eventually(closed)


def test_more_connections_than_allowed(quick: Running) -> None:
    eventually(lambda: open_connections(quick) == 0)
    socks = [connect(quick) for _ in range(QUICK.connections)]
    try:
        with connect(quick) as one_more:
            answer = Answer(read_all(one_more))
        assert (answer.status, answer.error["code"]) == (503, "too_many_connections")
        assert answer.headers["retry-after"]
    finally:
        for sock in socks:
            sock.close()
    eventually(lambda: quick.get("/livez").status == 200)


def test_a_client_that_stops_reading_is_dropped() -> None:  # H12
    engine = StubEngine(reply="x" * 16)
    with running(engine, limits=QUICK) as server, connect(server) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(chat_bytes(stream=True, max_tokens=4000, n=8))
        eventually(lambda: engine.stats.running == 8)
        engine.step_s = 0.001
        eventually(lambda: engine.stats.running == 0)
        assert engine.stats.blocks_free == BLOCKS
        assert engine.cancels, "the answer ended by itself"
        assert server.gauge('trivium_connections_refused_total{reason="write_stall"}') == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("when", ["before", "middle", "late"])
def test_a_client_that_leaves_frees_its_place(quick: Running, stream: bool, when: str) -> None:  # H13, P7
    engine = quick.engine
    before = len(engine.cancels)
    engine.prefill_s = 0.3 if when == "before" else 0.0
    with connect(quick) as sock:
        sock.sendall(chat_bytes(stream=stream))
        eventually(lambda: engine.stats.running == 1)
        time.sleep({"before": 0.0, "middle": 0.3, "late": 0.8}[when])
        if when == "late":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")  # a reset
    eventually(lambda: engine.stats.running == 0)
    engine.prefill_s = 0.0
    assert len(engine.cancels) == before + 1
    assert engine.stats.blocks_free == BLOCKS
    assert engine.steps_to_abort[-1] <= 1
    assert quick.server._service.bridge.active == 0
    eventually(lambda: '"cancelled": true' in quick.log[-1])


def test_a_client_that_leaves_while_it_waits(quick: Running) -> None:
    engine = quick.engine
    engine.slots, slots = 1, engine.slots
    try:
        with connect(quick) as first, connect(quick) as second:
            first.sendall(chat_bytes(max_tokens=4000))
            eventually(lambda: engine.stats.running == 1)
            second.sendall(chat_bytes())
            eventually(lambda: engine.stats.waiting == 1)
            second.close()
            eventually(lambda: engine.stats.waiting == 0)
            assert engine.stats.running == 1
    finally:
        engine.slots = slots
    eventually(lambda: engine.stats.running == 0)


def test_many_who_connect_and_leave_during_anothers_answer() -> None:  # H14, and section 4's random cancels
    engine = StubEngine(step_s=0.02, slots=16)
    engine.prefill_s = 0.2
    with running(engine) as server:
        for _ in range(20):  # warm up
            with connect(server) as sock:
                sock.sendall(chat_bytes(stream=True))
        eventually(lambda: server.server._service.bridge.active == 0)
        descriptors = len(os.listdir("/proc/self/fd"))
        memory = psutil.Process().memory_info().rss
        result: list[Answer] = []
        other = threading.Thread(target=lambda: result.append(server.chat(max_tokens=30)))
        other.start()
        engine.prefill_s = 0.0
        for index in range(1000):
            with connect(server) as sock:
                if index % 3:
                    sock.sendall(chat_bytes(stream=index % 2 == 0)[: 40 if index % 7 == 0 else None])
        other.join(timeout=300)
        assert result and result[0].status == 200
        eventually(lambda: engine.stats.running == engine.stats.waiting == 0)
        assert engine.stats.blocks_free == BLOCKS
        assert server.get("/readyz").status == 200
        eventually(lambda: len(os.listdir("/proc/self/fd")) <= descriptors + 2)
        assert psutil.Process().memory_info().rss - memory < 10 << 20
        server.server.stop()
        eventually(lambda: server.code == 0)


def test_http_1_0(server: Running) -> None:  # H32
    answer = Answer(server.raw(b"GET /livez HTTP/1.0\r\nHost: localhost\r\n\r\n"))
    assert (answer.status, answer.json()) == (200, {"status": "alive"})
    body = json.dumps({"model": "stub", "prompt": "x", "stream": True}).encode()
    raw = f"POST /v1/completions HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    refused = Answer(server.raw(raw))
    assert (refused.status, refused.error["param"]) == (400, "stream")
    assert Answer(server.raw(b"GET /livez HTTP/1.0\r\n\r\n")).status == 421


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:  # H32
    body = json.dumps({"model": "stub", "prompt": "x", "max_tokens": 3}).encode()
    one = head("/v1/completions", Content_Length=str(len(body)), X_Request_Id="first") + body
    last = head("/livez", "GET", X_Request_Id="second", Connection="close")
    data = server.raw(one + one.replace(b"first", b"again") + last)
    assert data.count(b"HTTP/1.1 200 OK") == 3
    assert data.index(b"x-request-id: first") < data.index(b"x-request-id: again") < data.index(b"x-request-id: second")


def test_a_pipelining_client_that_leaves_is_noticed(quick: Running) -> None:
    with connect(quick) as sock:
        sock.sendall(chat_bytes() + chat_bytes())
        eventually(lambda: quick.engine.stats.running == 1)
    eventually(lambda: quick.server._service.bridge.active == 0)
    eventually(lambda: quick.engine.stats.running == 0)


def test_head_and_options(server: Running) -> None:  # H32
    answer = Answer(server.raw(head("/livez", "HEAD", Connection="close")))
    assert (answer.status, answer.body, answer.headers["content-length"]) == (200, b"", "19")
    for method in ("OPTIONS", "HEAD", "PUT", "DELETE"):
        refused = Answer(server.raw(head("/v1/completions", method, Connection="close")))
        assert (refused.status, refused.headers["allow"]) == (405, "POST")


def test_expect_100_continue(server: Running) -> None:  # H32
    body = json.dumps({"model": "stub", "prompt": "x", "max_tokens": 2}).encode()
    with connect(server) as sock:
        sock.sendall(head("/v1/completions", Content_Length=str(len(body)), Expect="100-continue", Connection="close"))
        assert sock.recv(100).startswith(b"HTTP/1.1 100 Continue\r\n\r\n")
        sock.sendall(body)
        assert Answer(read_all(sock)).status == 200
    refused = server.raw(head("/v1/completions", Content_Length="9999999", Expect="100-continue"))
    assert Answer(refused).status == 413


def test_an_upgrade_is_not_taken_and_its_body_not_lost(server: Running) -> None:
    body = json.dumps({"model": "stub", "prompt": "x", "max_tokens": 2}).encode()
    asked = head("/v1/completions", Content_Length=str(len(body)), Connection="Upgrade, close", Upgrade="h2c") + body
    assert Answer(server.raw(asked)).json()["usage"]["completion_tokens"] == 2
    assert Answer(server.raw(head("/livez", "GET", Connection="close, Upgrade", Upgrade="websocket"))).status == 200
