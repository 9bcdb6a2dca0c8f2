"""One request and its answer: the body read strictly, the answer as JSON or as server-sent events."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.types import Receive, Scope, Send

from trivium.serve.errors import ApiError
from trivium.serve.fields import Field, read_fields
from trivium.serve.guard import SCOPE_KEY, GuardedProtocol
from trivium.serve.limits import Limits
from trivium.serve.strict_json import parse

if TYPE_CHECKING:
    from trivium.serve.bridge import Job

quoted: Callable[[str], str] = json.encoder.encode_basestring  # a string as JSON, other letters than ASCII as they are
EXCHANGE_KEY = "trivium.exchange"
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class Exchange:
    """What a handler has of a request. ``noted`` goes into the access log; nothing of the prompt or answer does."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, request_id: str, limits: Limits) -> None:
        self.scope = scope
        self.request_id = request_id
        self.limits = limits
        self.key = -1
        self.status = 0
        self.started_s = time.monotonic()
        self.noted: dict[str, Any] = {}
        self._receive = receive
        self._send = send
        connection = scope.get(SCOPE_KEY)
        self._connection: GuardedProtocol | None = connection if isinstance(connection, GuardedProtocol) else None

    @property
    def began(self) -> bool:
        """Whether an answer is on its way."""
        return self.status != 0

    async def fields(self, table: Sequence[Field]) -> dict[str, Any]:
        """The body's fields, read by ``table``. Raises ApiError."""
        return read_fields(parse(await self.body(), self.limits), table)

    async def body(self) -> bytes:
        """The whole body. Raises ApiError where it is too large or is not sent as JSON."""
        for name, value in self.scope["headers"]:
            if name == b"content-type" and not value.split(b";")[0].strip().lower().endswith(b"json"):
                raise ApiError(415, "unsupported_media_type", "send the body as application/json")
            if name == b"content-encoding" and value.lower() != b"identity":
                raise ApiError(415, "unsupported_media_type", "send the body without Content-Encoding")
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Gone
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                message_text = f"the body is larger than {self.limits.body_bytes} bytes"
                raise ApiError(413, "body_too_large", message_text, close=True)
            if not message.get("more_body", False):
                break
        if self._connection is not None:
            self._connection.body_taken()
        return bytes(body)

    @contextmanager
    def watched(self, job: Job) -> Iterator[None]:
        """Cancel ``job`` the moment the client is gone, and in any case when the block is left."""
        lost = job.cancel
        connection = self._connection
        if connection is not None:
            if connection.transport is None or connection.transport.is_closing():
                lost()
            connection.on_lost.add(lost)
        try:
            yield
        finally:
            job.cancel()
            if connection is not None:
                connection.on_lost.discard(lost)

    async def reply(
        self, status: int, body: bytes, kind: bytes = b"application/json", headers: Mapping[str, str] | None = None
    ) -> None:
        """A whole answer."""
        pairs = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        pairs += [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        await self._start(status, pairs)
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def reply_json(self, value: Any, status: int = 200) -> None:
        """A whole answer in JSON."""
        await self.reply(status, json.dumps(value, ensure_ascii=False, allow_nan=False).encode())

    async def reply_error(self, error: ApiError) -> None:
        """An error, whole; after a stream has begun, as its last event."""
        if self.began:
            await self.event(error.encoded(self.request_id))
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        headers = dict(error.headers)
        if error.close:
            headers["Connection"] = "close"
        await self.reply(error.status, error.encoded(self.request_id), headers=headers)

    async def start_events(self) -> None:
        """Begin a stream. Raises ApiError for HTTP/1.0, which cannot carry one."""
        if self.scope.get("http_version") == "1.0":
            raise ApiError(400, "http_version", "streaming needs HTTP/1.1", param="stream")
        await self._start(200, list(_EVENTS))

    async def event(self, data: bytes) -> None:
        """One event."""
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})

    async def chunk(self, events: bytes) -> None:
        """Events that are already laid out; straight to the connection where it takes them now."""
        if self._connection is not None and self._connection.write_chunk(events):
            return
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def end_events(self) -> None:
        """``[DONE]``, and the end of the stream."""
        await self._send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status
        pairs = [
            *headers,
            (b"x-request-id", self.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
        ]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})


class Gone(Exception):
    """The client left before it was answered."""


Handler = Callable[[Exchange], Any]
