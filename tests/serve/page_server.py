"""A stub of the server for the page's tests: its endpoints and headers, scripted answers, and a switch to kill it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

import trivium.serve
from tests.worlds import free_port
from trivium.serve.page import POLICY

PAGE = Path(trivium.serve.__file__).parent / "page"
LOADS = [[5, 1, 3, 9, 2, 2, 4, 6], [1, 1, 1, 1, 1, 1, 1, 25], [4, 4, 4, 4, 4, 4, 4, 4], [0, 0, 0, 0, 0, 0, 0, 0]]


@dataclass(kw_only=True)
class Reply:
    """One scripted answer: its pieces, the seconds between them, and what comes after the last."""

    pieces: list[str] = field(default_factory=lambda: ["Hello", " from", " the", " stub", "."])
    gap_s: float = 0.0
    then: str = "stop"  # a finish reason, or "hang", "die" (the connection breaks) or "error" (an error event)
    status: int = 200
    message: str = "refused"
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)


SLOW = Reply(pieces=[f"word{i} " for i in range(400)], gap_s=0.02)


def failure(status: int, message: str, *, param: str | None = None, headers: dict[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": None}}
    return JSONResponse(body, status_code=status, headers=headers)


class _Killable(uvicorn.Server):
    """Breaks its connections when it ends, also those that come while it does; none is left to the collector."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._break()
        await super().shutdown(sockets)
        self._break()
        await asyncio.sleep(0.01)

    def _break(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class PageServer:
    """The stub on one port of the loopback; its fields are the script and may be changed between requests."""

    def __init__(self) -> None:
        self.port = free_port()
        self.reset()
        self._server: _Killable | None = None
        self._thread: threading.Thread | None = None

    def reset(self) -> None:
        self.replies: list[Reply] = []  # taken from the front; then the plain Reply()
        self.requests: list[dict[str, Any]] = []
        self.key: str | None = None
        self.loading = False
        self.models = ["stub-1"]
        self.experts: list[list[int]] | None = LOADS
        self.waiting = 0
        self.running = 0
        self.status_calls = 0
        self.left = 0  # streams that the client left before their end

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        config = uvicorn.Config(
            self._app(),
            host="127.0.0.1",
            port=self.port,
            log_level="critical",
            lifespan="off",
            ws="none",
            loop="asyncio",
            timeout_graceful_shutdown=1,
        )
        self._server = _Killable(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + 20
        while not self._server.started:
            if time.monotonic() > until or not self._thread.is_alive():
                raise RuntimeError(f"the stub server did not start on port {self.port}")
            time.sleep(0.01)

    def kill(self) -> None:
        """Breaks every connection and stops listening, as a killed process does."""
        server, thread = self._server, self._thread
        if server is None or thread is None:
            return
        server.should_exit = server.force_exit = True
        thread.join(timeout=120)
        assert not thread.is_alive(), "the stub server did not end"
        self._server = self._thread = None

    def _app(self) -> Starlette:
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/status", self._status),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/tokenize", self._tokenize, methods=["POST"]),
            Route("/metrics", self._metrics),
            Route("/livez", self._live),
            Route("/readyz", self._ready),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ]
        return _Strict(Starlette(routes=routes))  # type: ignore[return-value]

    def _refusal(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return failure(401, "The API key is missing or wrong.")
        if self.loading:
            return failure(503, "The model is still loading.")
        return None

    async def _models(self, request: Request) -> Response:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "stub"} for name in self.models]
        return self._refusal(request) or JSONResponse({"object": "list", "data": data})

    async def _status(self, request: Request) -> Response:
        self.status_calls += 1
        body = {
            "model": self.models[0],
            "running": self.running,
            "waiting": self.waiting,
            "cache_usage": 0.37,
            "tokens_per_s": 41.5 + 9 * (self.status_calls % 3),
            "experts": self.experts,
        }
        return self._refusal(request) or JSONResponse(body)

    async def _tokenize(self, request: Request) -> Response:
        words = str((await request.json())["prompt"]).split()
        return self._refusal(request) or JSONResponse({"count": len(words), "tokens": list(range(len(words)))})

    async def _metrics(self, request: Request) -> Response:
        return self._refusal(request) or PlainTextResponse("trivium_requests_running 0\n")

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _ready(self, request: Request) -> Response:
        return failure(503, "The model is still loading.") if self.loading else JSONResponse({"status": "ok"})

    async def _chat(self, request: Request) -> Response:
        refused = self._refusal(request)
        if refused:
            return refused
        self.requests.append(await request.json())
        reply = self.replies.pop(0) if self.replies else Reply()
        if reply.status != 200:
            return failure(reply.status, reply.message, param=reply.param, headers=reply.headers)
        return StreamingResponse(self._stream(reply), media_type="text/event-stream")

    async def _stream(self, reply: Reply) -> AsyncIterator[str]:
        self.running += 1
        done = False
        try:
            yield event(
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            )
            for piece in reply.pieces:
                await asyncio.sleep(reply.gap_s)
                yield event({"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if reply.then == "hang":
                await asyncio.sleep(60)
            if reply.then == "die":
                done = True
                raise ConnectionResetError("scripted: the connection breaks")
            if reply.then == "error":
                yield event({"error": {"message": reply.message, "type": "server_error"}})
            else:
                yield event({"choices": [{"index": 0, "delta": {}, "finish_reason": reply.then}]})
                usage = {
                    "prompt_tokens": 7,
                    "completion_tokens": len(reply.pieces),
                    "total_tokens": 7 + len(reply.pieces),
                }
                yield event({"choices": [], "usage": usage})
            done = True
            yield "data: [DONE]\n\n"
        finally:
            self.running -= 1
            self.left += not done


def event(chunk: dict[str, Any]) -> str:
    return f"data: {json.dumps(chunk)}\n\n"


class _Strict:
    """Puts the real server's security headers on every response."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def strict(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {
                    "content-security-policy": POLICY,
                    "x-content-type-options": "nosniff",
                    "cache-control": "no-store",
                }
                message["headers"] += [(k.encode(), v.encode()) for k, v in extra.items()]
            await send(message)

        await self.app(scope, receive, strict)


@contextmanager
def page_server() -> Iterator[PageServer]:
    server = PageServer()
    server.start()
    try:
        yield server
    finally:
        server.kill()
