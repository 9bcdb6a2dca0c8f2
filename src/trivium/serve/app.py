"""The application: one gate before all routes, the routes, and one place where every failure becomes an answer."""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Awaitable, Callable, Mapping

from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from trivium.base import log
from trivium.serve import texts
from trivium.serve.access_log import AccessLog
from trivium.serve.auth import Gate
from trivium.serve.chat import chat
from trivium.serve.completions import complete
from trivium.serve.errors import ApiError
from trivium.serve.exchange import EXCHANGE_KEY, Exchange, Gone
from trivium.serve.health import Health
from trivium.serve.metrics import REJECTIONS
from trivium.serve.page import Asset
from trivium.serve.service import Service

Handler = Callable[[Service, Exchange], Awaitable[None]]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")


class App:
    """An ASGI application. ``gate`` sees every request first; only the page's own files need no key.

    A browser cannot send a key with its first request; the page then asks for one. Its files tell nothing.
    """

    def __init__(
        self, service: Service, gate: Gate, *, assets: Mapping[str, Asset], health: Health, access: AccessLog
    ) -> None:
        self.service = service
        self.gate = gate
        self.assets = assets
        self._access = access
        self._health = health
        table: tuple[tuple[str, str, Handler], ...] = (
            ("GET", "/v1/models", texts.models),
            ("GET", "/v1/models/{name:path}", texts.model),
            ("POST", "/v1/completions", complete),
            ("POST", "/v1/chat/completions", chat),
            ("POST", "/v1/embeddings", texts.embed),
            ("POST", "/tokenize", texts.tokenize),
            ("POST", "/detokenize", texts.detokenize),
            ("GET", "/livez", health.livez),
            ("GET", "/readyz", health.readyz),
            ("GET", "/metrics", health.metrics),
            ("GET", "/v1/status", health.status),
        )
        routes = [Route(path, _Endpoint(service, handler), methods=[method]) for method, path, handler in table]
        self.router = Router(routes, redirect_slashes=False, default=_nothing_here)

    @property
    def paths(self) -> list[tuple[str, str]]:
        """Every route but the page's files: (method, path)."""
        routes = [route for route in self.router.routes if isinstance(route, Route)]
        return [(method, route.path) for route in routes for method in sorted(route.methods or ()) if method != "HEAD"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(scope, receive, send, request_id=_request_id(scope), limits=self.service.limits)
        scope[EXCHANGE_KEY] = exchange
        scope["app"] = self
        try:
            await self._answer(scope, receive, send, exchange)
        except Gone:
            pass
        finally:
            self.service.metrics.answered.labels(f"{exchange.status // 100}xx" if exchange.began else "gone").inc()
            self._access.line(exchange)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, exchange: Exchange) -> None:
        try:
            self.gate.check_place(scope["headers"])
            asset = self.assets.get(scope["path"]) if scope["method"] in ("GET", "HEAD") else None
            if asset is not None:
                await _file(exchange, asset)
                return
            exchange.key = self.gate.key_of(scope["headers"])
            await self.router(scope, receive, send)
        except ApiError as error:
            if scope["method"] == "POST" and error.status in (429, 503) and not exchange.began:
                self.service.metrics.rejected.labels(REJECTIONS.get(error.code, error.code)).inc()
            await exchange.reply_error(error)
        except HTTPException as error:
            headers = dict(error.headers or {})
            message = f"{scope['method']} is not answered here; allowed: {headers.get('Allow', 'GET')}"
            await exchange.reply_error(ApiError(405, "method_not_allowed", message, headers=headers))
        except (Gone, GeneratorExit):
            raise
        except Exception:
            log.get().error("request %s failed:\n%s", exchange.request_id, traceback.format_exc())
            await exchange.reply_error(ApiError(500, "internal_error", "the server failed"))


class _Endpoint:
    """A handler as an ASGI application."""

    def __init__(self, service: Service, handler: Handler) -> None:
        self._service = service
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope[EXCHANGE_KEY]
        if scope["method"] != "POST":
            await self._handler(self._service, exchange)
            return
        with self._service.under_way(exchange.key):
            await self._handler(self._service, exchange)


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise ApiError(404, "not_found", "there is nothing at this path")


async def _file(exchange: Exchange, asset: Asset) -> None:
    tags = [value for name, value in exchange.scope["headers"] if name == b"if-none-match"]
    if tags == [asset.tag.encode()]:
        await exchange.reply(304, b"", asset.kind, asset.headers())
    else:
        await exchange.reply(200, asset.body, asset.kind, asset.headers())


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return str(value.decode("ascii"))
    return f"req-{secrets.token_hex(12)}"
