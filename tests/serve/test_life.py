"""Loading, full, stopping, dying (H18 to H23, H30); how fast is measured by ``trivium bench serve --promises``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from tests.serve.process import Spawner
from tests.serve.running import Answer, Running, eventually, read_all, running
from tests.serve.stub import StubEngine, served
from tests.serve.test_connections import chat_bytes, connect
from trivium.base.errors import CheckpointError, ConfigError
from trivium.serve import health
from trivium.serve.limits import Limits
from trivium.serve.server import Server, ServerConfig

pytestmark = pytest.mark.timeout(150)


@contextmanager
def streams(server: Running, count: int, **more: Any) -> Iterator[list[socket.socket]]:
    """Open streams that have had a first token or wait for one."""
    socks = [connect(server) for _ in range(count)]
    try:
        for sock in socks:
            sock.sendall(chat_bytes(stream=True, **more))
        yield socks
    finally:
        for sock in socks:
            sock.close()


def test_the_first_beyond_the_queue_is_refused() -> None:  # H18, P8
    engine = StubEngine(step_s=0.05, slots=2)
    with running(engine, limits=Limits(queue=64, drain_s=0)) as server, streams(server, 66):
        eventually(lambda: (engine.stats.running, engine.stats.waiting) == (2, 64))
        for _ in range(10):
            answer = server.chat()
            assert (answer.status, answer.error["code"]) == (429, "queue_full")
            assert int(answer.headers["retry-after"]) >= 1
        assert engine.stats.waiting == 64  # none had to wait for a place
        assert server.gauge('trivium_requests_rejected_total{reason="queue"}') == 10


def test_choices_count_in_the_queue() -> None:
    engine = StubEngine(step_s=0.05, slots=2)
    with running(engine, limits=Limits(queue=4, drain_s=0)) as server, streams(server, 1, n=4):
        eventually(lambda: engine.stats.running == 2)
        assert server.chat(n=3).status == 429
        with streams(server, 1, n=2):
            eventually(lambda: engine.stats.waiting == 4)
            assert server.chat().status == 429
        eventually(lambda: engine.stats.waiting == 2)


def test_more_than_can_ever_be_admitted_is_not_asked_to_come_again() -> None:
    with running(StubEngine(slots=2), limits=Limits(queue=4, drain_s=0)) as server:
        answer = server.chat(n=7)
        assert (answer.status, answer.error["code"]) == (400, "too_many_answers")
        assert server.chat(n=6).status == 200


def test_a_failed_answer_gives_its_place_back_once(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = server.server._service.bridge
    with monkeypatch.context() as broken:
        broken.setattr("tests.serve.stub._Choice.token", lambda choice: -1)
        for stream in (False, True):
            assert server.chat(n=2, stream=stream).status == 500
    assert bridge.active == 0
    assert server.chat(n=2).status == 200
    assert bridge.active == 0


def test_one_key_cannot_take_all_places() -> None:  # H19
    engine = StubEngine(step_s=0.005, slots=8)
    keys = ("key-of-the-flood", "key-of-the-other")
    with running(engine, keys=keys, limits=Limits(per_key=4, drain_s=0)) as server:
        other = {"Authorization": f"Bearer {keys[1]}"}
        body = {"model": "stub", "prompt": "x", "max_tokens": 10}

        bridge = server.server._service.bridge
        stop = threading.Event()
        statuses: list[int] = []

        def flood() -> None:
            while not stop.is_set():
                answer = server.post(
                    "/v1/completions", body | {"max_tokens": 40}, {"Authorization": f"Bearer {keys[0]}"}
                )
                statuses.append(answer.status)
                time.sleep(0.01)

        with ThreadPoolExecutor(12) as pool:
            for _ in range(12):
                pool.submit(flood)
            try:
                eventually(lambda: {200, 429} <= set(statuses))
                for _ in range(15):
                    assert server.post("/v1/completions", body, other).status == 200
                    assert bridge.active <= 4  # of eight places: what is left for others is free
            finally:
                stop.set()
        assert set(statuses) == {200, 429}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"model": "stub", "prompt": "x" * 3000, "max_tokens": 3}),
        ("/v1/chat/completions", {"model": "stub", "messages": [{"role": "user", "content": "x"}], "stream": True}),
        ("/v1/embeddings", {"model": "stub", "input": "x" * 3000}),
        ("/tokenize", {"prompt": "x" * 3000}),
        ("/detokenize", {"tokens": [65] * 3000}),
    ],
)
def test_a_key_s_requests_count_from_their_arrival(path: str, body: dict[str, Any]) -> None:  # H19
    """Two are allowed: while two of the key's requests are being read, all its others are refused; then none is."""
    key, other = ({"Authorization": f"Bearer {name}"} for name in ("key-of-the-flood", "key-of-the-other"))
    engine = StubEngine()
    go = threading.Event()
    engine.tokenizer.gate = go
    keys = ("key-of-the-flood", "key-of-the-other")
    with running(engine, keys=keys, limits=Limits(per_key=2, drain_s=0)) as server:
        with ThreadPoolExecutor(2) as pool:
            first = [pool.submit(lambda: server.post(path, body, key).status) for _ in range(2)]
            try:
                eventually(lambda: len(engine.tokenizer.held) == 2)
                for answer in (server.post(path, body, key), server.post("/tokenize", {"prompt": "x"}, key)):
                    assert (answer.status, answer.error["code"]) == (429, "concurrency_limit_exceeded")
                    assert int(answer.headers["retry-after"]) >= 1
                assert server.post("/tokenize", {"prompt": "x"}, other).status == 200
                assert server.get("/v1/models", key).status == 200
            finally:
                go.set()
            assert [one.result() for one in first] == [200, 200]
        for wrong in (b"{", json.dumps(body).encode()):  # however one ends, its place is free
            for _ in range(3):
                assert server.post(path, wrong, key).status in (200, 400)
        text = server.get("/metrics", key).body.decode()
        assert 'trivium_requests_rejected_total{reason="per_key"} 2.0' in text


def test_a_stream_keeps_its_key_s_place_until_it_ends_or_is_left() -> None:  # H19
    key = {"Authorization": "Bearer key-of-the-flood"}
    body = {"model": "stub", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 4000}
    engine = StubEngine(step_s=0.02)
    with running(engine, keys=("key-of-the-flood",), limits=Limits(per_key=1, drain_s=0)) as server:
        raw = json.dumps(body).encode()
        lines = [f"{name}: {value}" for name, value in key.items()] + [f"Content-Length: {len(raw)}"]
        head = "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: localhost", *lines, "", ""])
        with connect(server) as sock:
            sock.sendall(head.encode() + raw)
            assert b"200 OK" in sock.recv(100_000)
            assert server.post("/tokenize", {"prompt": "x"}, key).status == 429
        eventually(lambda: server.post("/tokenize", {"prompt": "x"}, key).status == 200)


def test_while_the_model_loads() -> None:  # H20
    engine = StubEngine()
    go = threading.Event()

    def load() -> Any:
        go.wait(20)
        return served(engine)

    with running(engine, load=load, wait=False) as server:
        assert server.get("/livez").status == 200
        for path in ("/readyz", "/v1/status"):
            assert server.get(path).status == 503
        answer = server.chat()
        assert (answer.status, answer.error["type"], answer.error["code"]) == (
            503,
            "unavailable_error",
            "model_loading",
        )
        assert server.get("/v1/models").json()["data"][0]["id"] == "stub"
        assert server.gauge("trivium_ready") == 0
        go.set()
        eventually(lambda: server.get("/readyz").status == 200)
        assert server.chat().status == 200
        assert server.gauge("trivium_ready") == 1


def test_a_model_that_cannot_be_loaded() -> None:
    def load() -> Any:
        raise CheckpointError("model.safetensors is short of 17 bytes")

    with pytest.raises(CheckpointError, match="17 bytes"):
        Server(ServerConfig(name="x", port=0), load).run(signals=False)


def test_ready_only_where_tokens_come(monkeypatch: pytest.MonkeyPatch) -> None:  # P10
    assert health._FRESH_S + health._PROBE_S < 2
    engine = StubEngine()
    with running(engine) as server:
        assert server.get("/readyz").status == 200
        assert engine.submitted == 1  # nothing had been generated: it was tried
        monkeypatch.setattr(health, "_FRESH_S", 600)
        assert server.chat().status == 200
        assert server.get("/readyz").status == 200
        assert engine.submitted == 2  # a token had just come: that is proof
        engine.slots = 0
        monkeypatch.setattr(health, "_FRESH_S", 0)
        answer = server.get("/readyz")
        assert (answer.status, answer.error["code"]) == (503, "no_token")
        engine.slots = 4
        eventually(lambda: server.get("/readyz").status == 200)


@pytest.mark.parametrize("how", ["dies", "wedges"])
def test_the_engine_dies_or_stands_still(how: str) -> None:  # H21
    engine = StubEngine(step_s=0.02)
    with (
        running(engine, limits=Limits(step_s=4.0)) as server,
        streams(server, 2) as (first, second),
        connect(server) as whole,
    ):
        whole.sendall(chat_bytes())
        eventually(lambda: engine.stats.running == 3)
        time.sleep(0.3)
        (engine.die if how == "dies" else engine.wedge)()
        eventually(lambda: server.get("/readyz").status == 503)
        assert server.chat().status == 503
        answer = Answer(read_all(whole))
        assert answer.status == 503
        assert answer.headers["x-request-id"] in answer.error["message"]
        for sock in (first, second):
            events = Answer(read_all(sock)).events()
            assert events[-1]["error"]["code"] == "engine_stopped"
            assert "req-" in events[-1]["error"]["message"]
        eventually(lambda: server.code == 1)


def test_a_request_that_fails_in_the_engine_fails_alone(server: Running) -> None:
    # A grammar whose failure shows only while it is used allows no token: a 400, and the engine lives.
    answer = server.chat(regex="(" + "|".join("ab?" * 12 + str(i) for i in range(60)) + "){1,400}", max_tokens=50)
    assert answer.status in (200, 400)
    assert server.chat().status == 200


def test_stopping_lets_streams_finish() -> None:  # H22
    engine = StubEngine(step_s=0.5)
    with running(engine, limits=Limits(drain_s=100)) as server, streams(server, 2, max_tokens=40) as socks:
        eventually(lambda: engine.stats.running == 2)
        with connect(server) as idle:
            idle.sendall(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(4096)
            server.server.stop()
            eventually(lambda: server.server._service.bridge.draining)
            refused = server.chat()
            assert (refused.status, refused.error["code"]) == (503, "shutting_down")
            assert refused.headers["connection"] == "close"
            assert server.get("/readyz").status == 503
            idle.sendall(chat_bytes())
            assert b" 503 " in idle.recv(4096)
        engine.step_s = 0.0
        for sock in socks:
            events = Answer(read_all(sock)).events()
            assert events[-1] == "[DONE]"
            assert events[-2]["choices"][0]["finish_reason"] == "length"
        eventually(lambda: server.code == 0)


def test_what_does_not_finish_in_time_is_aborted() -> None:  # H22
    engine = StubEngine(step_s=0.02)
    with (
        running(engine, limits=Limits(drain_s=0.3)) as server,
        streams(server, 1, max_tokens=4000) as (sock,),
        connect(server) as whole,
    ):
        whole.sendall(chat_bytes(max_tokens=4000))
        eventually(lambda: engine.stats.running == 2)
        server.server.stop()
        events = Answer(read_all(sock)).events()
        assert events[-2]["choices"][0]["finish_reason"] == "abort"
        assert events[-1] == "[DONE]"
        answer = Answer(read_all(whole))
        assert answer.json()["choices"][0]["finish_reason"] == "abort"
        eventually(lambda: server.code == 0)


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    """Starts servers as processes of their own."""
    found = Spawner()
    yield found
    found.close()


@pytest.mark.parametrize(
    ("signals", "streaming", "code"),
    [
        ([signal.SIGTERM], False, 0),
        ([signal.SIGINT], False, 130),
        ([signal.SIGTERM], True, 0),
        ([signal.SIGTERM, signal.SIGTERM], True, 143),
    ],
    ids=["idle", "ctrl-c", "streaming", "twice"],
)
def test_signals(spawner: Spawner, signals: list[signal.Signals], streaming: bool, code: int) -> None:  # H22
    """The server would wait 90 s for its streams: what ends before did not wait."""
    pid, port = spawner.start()
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        if streaming:
            sock.sendall(chat_bytes(stream=True, max_tokens=100 if len(signals) == 1 else 4000))
            assert b"200 OK" in sock.recv(100_000)
        started = time.monotonic()
        for number in signals:
            os.kill(pid, number)
            time.sleep(0.2)
        while code == 143 and psutil.pid_exists(pid):  # those that come before it looks are one
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signals[-1])
            assert time.monotonic() - started < 80
            time.sleep(0.2)
        if code != 143:
            assert spawner.line() == "stopped"
            if streaming:
                assert b"[DONE]" in read_all(sock)
        assert int(spawner.line()) == code
        assert time.monotonic() - started < 80


def test_a_port_that_is_taken() -> None:  # H23
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .* is taken by process {os.getpid()}") as caught:
            Server(ServerConfig(name="x", port=port), lambda: pytest.fail("nothing is loaded"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"port": 65536}, "0 to 65535"),
        ({"port": -1}, "0 to 65535"),
        ({"host": "203.0.113.7", "keys": ("long-enough-key",)}, "not an address of this machine"),
        ({"host": "no such host", "keys": ("long-enough-key",)}, "cannot be resolved"),
    ],
)
def test_a_place_where_one_cannot_listen(config: dict[str, Any], said: str) -> None:  # H23
    with pytest.raises(ConfigError, match=said):
        Server(ServerConfig(**({"name": "x"} | config)), lambda: pytest.fail("nothing is loaded"))


def test_a_privileged_port(monkeypatch: pytest.MonkeyPatch) -> None:  # H23: tests may run as root, who may do this
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "bind", refuse)
    with pytest.raises(ConfigError, match="port 80 is privileged; choose one above 1023"):
        Server(ServerConfig(name="x", port=80), lambda: pytest.fail("nothing is loaded"))
