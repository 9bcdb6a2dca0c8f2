"""One client's connection: uvicorn's HTTP protocol with deadlines and caps on all that a client can send or withhold.

A refused client gets an answer in OpenAI's shape where one can still be sent, and is then read no further.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from trivium.serve.errors import ApiError
from trivium.serve.limits import Limits

SCOPE_KEY = "trivium.connection"
_SEND_BUFFER_BYTES = 64 << 10
_LINGER_S = 1.0
_LINGER_BYTES = 8 << 20
_PIPELINED = 16


class GuardedProtocol(HttpToolsProtocol):
    """A connection within ``limits``; ``count`` is told why one was refused.

    A request's scope holds the connection under `SCOPE_KEY`; a handler adds to ``on_lost`` what to do when it is gone.
    """

    limits: Limits = Limits()
    count: Callable[[str], None] = staticmethod(lambda why: None)

    def __init__(self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: Any = None) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.on_lost: set[Callable[[], None]] = set()
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._reading_head = True
        self._head_bytes = 0
        self._head_count = 0
        self._body_bytes = 0
        self._refused = self._declining = False
        self._asked = b""
        self._drained_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or refuse it where there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=_SEND_BUFFER_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # a socket that is gone already says so when it is read
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if len(self.connections) > self.limits.connections:
            message = f"all {self.limits.connections} connections are taken"
            self._refuse(ApiError(503, "too_many_connections", message, headers={"Retry-After": "1"}))
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell whoever works for this client that it is gone."""
        self._set_deadline(None)
        self._unset_stall()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        for callback in list(self.on_lost):
            callback()
        self.on_lost.clear()
        self.pipeline.clear()

    def data_received(self, data: bytes) -> None:
        """Feed the parser no more of a head than is allowed."""
        if self._refused:
            self._drained_bytes += len(data)
            if self._drained_bytes > _LINGER_BYTES:
                self.transport.abort()
            return
        self._unset_keepalive_if_required()
        if self._reading_head and self._deadline is None:
            self._expect_head()
        view = memoryview(data)
        while view and not self._refused and not self.transport.is_closing():
            take = len(view)
            if self._reading_head:
                room = self.limits.header_bytes - self._head_bytes
                if room <= 0:
                    self._refuse_head()
                    return
                take = min(take, room)
            self._feed(bytes(view[:take]), take)
            view = view[take:]

    def _feed(self, data: bytes, size: int) -> None:
        in_head = self._reading_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
            return
        except httptools.HttpParserError as error:
            if not self._refused:
                self._refuse(ApiError(400, "invalid_http", f"not a valid HTTP/1.1 request: {error}"))
        if in_head and self._reading_head:
            self._head_bytes += size

    def _decline_upgrade(self, rest: bytes) -> None:
        """Read the request again without its wish for another protocol: a server may go on as if there were none."""
        self._declining = False
        if self._refused:
            return
        if self._asked == b"CONNECT":
            self._refuse(ApiError(400, "invalid_http", "this is no proxy"))
            return
        hop = (b"connection", b"upgrade", b"http2-settings")
        lines = [name + b": " + value for name, value in self.headers if name not in hop]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            lines.append(b"connection: close")
        self.parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join([self._asked + b" " + self.url + b" HTTP/1.1", *lines, b"", b""]), 0)
        if rest and not self._refused:
            self._feed(rest, len(rest))

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._reading_head = True
        self._head_count = 0
        if self._deadline is None:
            self._expect_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header."""
        self._head_count += 1
        if self._head_count > self.limits.header_count:
            if not self._refused:
                message = f"more than {self.limits.header_count} headers"
                self._refuse(ApiError(431, "headers_too_large", message))
            return
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Check what the head says of the body, then hand the request to the application."""
        if self.parser.should_upgrade():
            self._declining, self._asked = True, self.parser.get_method()
            return
        self._reading_head = False
        self._head_bytes = self._body_bytes = 0
        if self._refused:
            return
        fault = self._fault_of_head()
        if fault is not None:
            self._refuse(fault)
            return
        self._set_deadline(self.limits.body_s, self._body_late)
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]
        scope[SCOPE_KEY] = self
        try:
            super().on_headers_complete()
        except (httptools.HttpParserError, UnicodeError, ValueError):
            self._refuse(ApiError(400, "invalid_url", "the request's target is not a valid URL"))
            return
        if self.pipeline:
            # Reading goes on, so that a client that leaves is noticed while an earlier request is answered.
            self.flow.resume_reading()
            if len(self.pipeline) > _PIPELINED:
                self.transport.abort()

    def _fault_of_head(self) -> ApiError | None:
        lengths = [value for name, value in self.headers if name == b"content-length"]
        if len(set(lengths)) > 1 or any(not value.isdigit() for value in lengths):
            return ApiError(400, "invalid_http", "Content-Length is not one number")
        if lengths and int(lengths[0][:20]) > self.limits.body_bytes:
            return self._too_large(f"the body has {lengths[0][:20].decode()} bytes")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1:
            return ApiError(400, "invalid_http", "more than one Host header")
        return None

    def on_body(self, body: bytes) -> None:
        """Count the body."""
        if self._refused or self._declining or self.cycle is None:
            return
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.body_bytes:
            self._refuse(self._too_large("the body is larger"))
            return
        super().on_body(body)

    def on_message_complete(self) -> None:
        """A request is whole."""
        if self._declining:
            return
        self._reading_head = True
        self._head_bytes = 0
        self._set_deadline(None)
        if not self._refused and self.cycle is not None:
            super().on_message_complete()

    def pause_writing(self) -> None:
        """The client reads slower than it is written to: it has until the stall limit to read some."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.limits.stall_s, self._stalled)

    def resume_writing(self) -> None:
        """The client has read."""
        self._unset_stall()
        super().resume_writing()

    def shutdown(self) -> None:
        """Close when nothing is being answered, or after the answer."""
        super().shutdown()
        self._set_deadline(None)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn says of a request it cannot read, in our shape."""
        self._refuse(ApiError(400, "invalid_http", msg))

    def body_taken(self) -> None:
        """The application has the whole body: read on, to notice a client that leaves."""
        self.flow.resume_reading()

    def write_chunk(self, data: bytes) -> bool:
        """Write a chunk of the running answer's body, as uvicorn would; False where it has to go the long way.

        A streamed token costs half as much like this.
        """
        cycle = self.cycle
        if self.flow.write_paused or self.pipeline or not data:
            return False
        if not (cycle.response_started and cycle.chunked_encoding) or cycle.response_complete or cycle.disconnected:
            return False
        if cycle.scope["method"] == "HEAD":
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def _expect_head(self) -> None:
        self._set_deadline(self.limits.header_s, self._head_late)

    def _set_deadline(self, seconds: float | None, late: Callable[[], None] | None = None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if seconds is not None and late is not None:
            self._deadline = self.loop.call_later(seconds, late)

    def _unset_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _head_late(self) -> None:
        self._deadline = None
        message = f"the request's head did not arrive within {self.limits.header_s:g} s"
        self._refuse(ApiError(408, "header_timeout", message))

    def _body_late(self) -> None:
        self._deadline = None
        message = f"the request's body did not arrive within {self.limits.body_s:g} s"
        self._refuse(ApiError(408, "body_timeout", message))

    def _stalled(self) -> None:
        self._stall = None
        self.count("write_stall")
        self.transport.abort()

    def _refuse_head(self) -> None:
        if not self.headers and len(self.url or b"") > self.limits.header_bytes // 2:
            message = f"the URL is longer than {self.limits.header_bytes // 2} bytes"
            self._refuse(ApiError(414, "url_too_long", message))
        else:
            message = f"the request's head is larger than {self.limits.header_bytes} bytes"
            self._refuse(ApiError(431, "headers_too_large", message))

    def _too_large(self, what: str) -> ApiError:
        return ApiError(413, "body_too_large", f"{what}; at most {self.limits.body_bytes} bytes are taken")

    def _refuse(self, error: ApiError) -> None:
        """Answer at once unless an answer has begun, then close: what still comes is dropped, and not for long."""
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self._set_deadline(None)
        self._unset_keepalive_if_required()
        self.count(error.code)
        cycle = self.cycle
        busy = cycle is not None and cycle.response_started and not cycle.response_complete
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            for callback in list(self.on_lost):
                callback()
        if busy:
            self.transport.abort()
            return
        request_id = f"req-{secrets.token_hex(8)}"
        body = error.encoded(request_id)
        head = [STATUS_LINE[error.status], b"content-type: application/json\r\nconnection: close\r\n"]
        for name, value in (error.headers | {"X-Request-Id": request_id, "Content-Length": str(len(body))}).items():
            head.append(f"{name.lower()}: {value}\r\n".encode("ascii"))
        self.transport.write(b"".join([*head, b"\r\n", body]))
        self.flow.resume_reading()
        try:
            self.transport.write_eof()
        except OSError:  # the client is gone already
            self.transport.abort()
            return
        self._deadline = self.loop.call_later(_LINGER_S, self.transport.abort)
