"""A server on a thread of the test's own process, at a port of the system's choice, gone when the block ends."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.serve.stub import StubEngine, served
from trivium.serve.limits import Limits
from trivium.serve.served import Served
from trivium.serve.server import Server, ServerConfig


class Running:
    """What a test needs of a running server."""

    def __init__(self, server: Server, engine: StubEngine, log: list[str]) -> None:
        self.server, self.engine, self.log = server, engine, log
        self.port = server.port
        self.url = f"http://127.0.0.1:{server.port}"
        self.code: int | None = None

    def raw(self, data: bytes, timeout: float = 40.0) -> bytes:
        """Send bytes, read until the server closes."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as sock:
            sock.sendall(data)
            return read_all(sock)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Answer:
        """One POST on a connection of its own."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))

    def get(self, path: str, headers: dict[str, str] | None = None) -> Answer:
        """One GET on a connection of its own."""
        return self.request("GET", path, b"", headers or {})

    def request(self, method: str, path: str, data: bytes, headers: dict[str, str]) -> Answer:
        """One request on a connection of its own."""
        lines = {"Host": f"127.0.0.1:{self.port}", "Connection": "close"} | headers
        if data:
            lines["Content-Length"] = str(len(data))
        head = f"{method} {path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in lines.items() if v) + "\r\n"
        return Answer(self.raw(head.encode("latin-1") + data))

    def chat(self, **more: Any) -> Answer:
        """A chat request to the stub."""
        return self.post("/v1/chat/completions", {"model": "stub", "messages": [user("hi")], "max_tokens": 8} | more)

    def gauge(self, name: str) -> float:
        """A number of /metrics."""
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith(name) and line[len(name)] in " {":
                return float(line.rpartition(" ")[2])
        raise KeyError(name)


class Answer:
    """A whole HTTP answer, taken apart."""

    def __init__(self, raw: bytes) -> None:
        head, _, body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.raw = raw
        self.status = int(lines[0].split()[1]) if raw else 0
        self.headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
        self.body = _unchunked(body) if self.headers.get("transfer-encoding") == "chunked" else body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, after a check of its shape."""
        body = self.json()
        assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
        return dict(body["error"])

    def events(self) -> list[Any]:
        """Server-sent events; [DONE] as it stands."""
        found = [part.removeprefix("data: ") for part in self.body.decode().split("\n\n") if part]
        return [part if part == "[DONE]" else json.loads(part) for part in found]


def _unchunked(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, rest = body.partition(b"\r\n")
        count = int(size, 16)
        out += rest[:count]
        body = rest[count + 2 :]
        if count == 0:
            break
    return out


def read_all(sock: socket.socket) -> bytes:
    """Until the other side closes."""
    data = b""
    try:
        while part := sock.recv(1 << 16):
            data += part
    except ConnectionResetError:
        pass
    return data


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def eventually(true: Callable[[], object], within_s: float = 120.0) -> None:
    """Wait for ``true``. Fails when it does not come; how soon it comes is for ``trivium bench serve`` to say."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < within_s, "it did not come true in time"
        time.sleep(0.005)


@contextmanager
def running(
    engine: StubEngine | None = None,
    *,
    limits: Limits | None = None,
    load: Callable[[], Served] | None = None,
    wait: bool = True,
    **config: Any,
) -> Iterator[Running]:
    """A server with the stub (or what ``load`` gives); its threads are gone when the block ends."""
    engine = StubEngine() if engine is None else engine
    lines: list[str] = []
    server = Server(
        ServerConfig(**{"name": "stub", "port": 0, "limits": limits or Limits(drain_s=0.2)} | config),
        load or (lambda: served(engine)),
        access=lines.append,
    )
    handle = Running(server, engine, lines)
    ready = threading.Event()

    def main() -> None:
        handle.code = server.run(signals=False, started=ready.set)

    thread = threading.Thread(target=main, name="test-server", daemon=True)
    thread.start()
    try:
        if wait:
            assert ready.wait(60), "the server did not become ready"
        yield handle
    finally:
        server.stop()
        thread.join(60)
        engine.close()
        assert not thread.is_alive(), "the server did not stop"
