"""What a client is told when a request fails: OpenAI's shape, with the field and a code; never a trace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trivium.base.errors import TriviumError

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


class ApiError(TriviumError):
    """A request that is answered with an error; it concerns that request alone."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        close: bool = False,
    ) -> None:
        """``param`` names the field at fault; ``close`` ends the connection after the answer."""
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.close = close

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The answer: ``{"error": {"message", "type", "param", "code"}}``; a failure of ours also tells the id."""
        message = str(self)
        if self.status >= 500 and request_id:
            message = f"{message} (request {request_id})"
        kind = _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def encoded(self, request_id: str | None = None) -> bytes:
        """`body` as JSON."""
        return json.dumps(self.body(request_id), ensure_ascii=True).encode()


def invalid(param: str | None, message: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names the field."""
    return ApiError(400, code, message, param=param)


def shown(value: Any, limit: int = 60) -> str:
    """What was given, short enough for a message and safe to print."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
