"""Run the server: listen, load, watch the engine, stop with manners.

Life: listening and loading (503) → ready → draining (503 for what is new, the rest finishes or is aborted) → gone. An
engine that dies or makes no progress ends the process with code 1, after all who wait were told.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn

from trivium.base import log
from trivium.serve.access_log import AccessLog
from trivium.serve.app import App
from trivium.serve.auth import Gate
from trivium.serve.errors import ApiError
from trivium.serve.guard import GuardedProtocol
from trivium.serve.health import Health
from trivium.serve.limits import Limits
from trivium.serve.listen import listen
from trivium.serve.page import assets
from trivium.serve.served import Served
from trivium.serve.service import Service

_TICK_S = 0.1
_FAREWELL_S = 2.0  # how long an engine's death can still be read at /readyz
_ABORT_S = 2.0
_CLOSE_S = 2.0
# Threads share the interpreter in turns of this length; Python's own 5 ms would be felt in every step.
_SWITCH_S = 0.0005


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Where to listen and whom to let in. ``name`` is the model's name in the API."""

    name: str
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)


class Server:
    """One server, run once. ``load`` is called on a thread of its own while the port already answers."""

    def __init__(
        self, config: ServerConfig, load: Callable[[], Served], *, access: Callable[[str], object] | None = None
    ) -> None:
        """Take the port. Raises ConfigError where that, or the setting of keys, is wrong."""
        self.config = config
        self._load = load
        self._gate = Gate(host=config.host, keys=config.keys, hosts=config.allowed_hosts)
        self._socket = listen(config.host, config.port)
        self.port = int(self._socket.getsockname()[1])
        self._access = AccessLog(access)
        self._service = Service(config.limits, config.name)
        self._health = Health(self._service)
        self._service.metrics.watch(self._health.gauges, self._health.experts)
        self.app = App(self._service, self._gate, assets=assets(), health=self._health, access=self._access)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = threading.Event()
        self._signals = 0
        self._code = 0
        self._load_error: BaseException | None = None

    def run(self, *, signals: bool = True, started: Callable[[], None] | None = None) -> int:
        """Serve until told to stop; the exit code. ``started`` is called once the model is ready.

        Raises:
            TriviumError: the model could not be loaded.
        """
        before = sys.getswitchinterval()
        sys.setswitchinterval(_SWITCH_S)
        try:
            loop = _new_loop()
            asyncio.set_event_loop(loop)
            try:
                code = loop.run_until_complete(self._serve(signals, started))
            finally:
                asyncio.set_event_loop(None)
                loop.close()
        finally:
            sys.setswitchinterval(before)
            gc.unfreeze()
            self._socket.close()
            self._service.close()
            self._access.close()
        if self._load_error is not None:
            raise self._load_error
        return code

    def stop(self) -> None:
        """Begin to drain; from any thread."""
        self._stopping.set()

    async def _serve(self, signals: bool, started: Callable[[], None] | None) -> int:
        self._loop = asyncio.get_running_loop()
        if signals:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._loop.add_signal_handler(number, self._signalled, number)
        server = uvicorn.Server(self._uvicorn())
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup(sockets=[self._socket])
        loading = threading.Thread(target=self._loading, args=(started,), name="load-model", daemon=True)
        loading.start()
        counter = 0
        while not self._stopping.is_set():
            await server.on_tick(counter)
            counter += 1
            if counter % 2 == 0:
                self._health.mark()
            failure = self._failure()
            if failure is not None:
                await self._fail(failure)
                break
            await asyncio.sleep(_TICK_S)
        await self._drain()
        await server.shutdown(sockets=[self._socket])
        for connection in list(server.server_state.connections):  # what is left after the second it waits for them
            connection.transport.abort()
        await self._close_engine()
        await asyncio.sleep(0)  # the loop closes what was aborted
        return self._code

    def _uvicorn(self) -> uvicorn.Config:
        limits = self.config.limits
        refused = self._service.metrics.refused

        class Guarded(GuardedProtocol):
            """This server's connections."""

        Guarded.limits = limits
        Guarded.count = staticmethod(lambda why: refused.labels(why).inc())
        config = uvicorn.Config(
            self.app,
            http=Guarded,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=max(1, round(limits.idle_s)),
            timeout_graceful_shutdown=1,
        )
        config.load()
        return config

    def _loading(self, started: Callable[[], None] | None) -> None:
        try:
            served = self._load()
        except BaseException as error:
            self._load_error = error
            self._stopping.set()
            return
        # [Note: garbage] Requests leave circles behind. Those that reach the oldest generation wait there until it has
        # grown by a quarter, and what torch and a model bring are a million objects: so these are set aside for good.
        gc.collect()
        gc.freeze()
        gc.collect()  # counts the oldest generation anew, which is what the quarter is taken of
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):  # the loop ended meanwhile: nobody waits for the model
                self._loop.call_soon_threadsafe(self._ready, served, started)

    def _ready(self, served: Served, started: Callable[[], None] | None) -> None:
        self._service.start(served, asyncio.get_running_loop())
        if started is not None:
            started()

    def _failure(self) -> str | None:
        served = self._service.served
        if served is None:
            return None
        if not served.engine.alive:
            return "the engine has stopped"
        silent_s = time.monotonic() - served.engine.last_step_s
        if silent_s > self.config.limits.step_s:
            return f"the engine has made no progress for {silent_s:.1f} s"
        return None

    async def _fail(self, why: str) -> None:
        log.get().error("%s; the server ends", why)
        self._code = 1
        self._service.bridge.fail_all(ApiError(503, "engine_stopped", why, close=True))
        await asyncio.sleep(_FAREWELL_S)

    async def _drain(self) -> None:
        if not self._service.loaded or self._service.bridge.failed is not None:
            return
        bridge = self._service.bridge
        bridge.draining = True
        end = time.monotonic() + self.config.limits.drain_s
        while bridge.jobs and time.monotonic() < end and self._service_alive():
            await asyncio.sleep(0.02)
        if bridge.jobs:
            log.get().warning("%d requests were still running after the drain and are aborted", len(bridge.jobs))
            bridge.abort_all()
            end = time.monotonic() + _ABORT_S
            while bridge.jobs and time.monotonic() < end:
                await asyncio.sleep(0.02)
            bridge.fail_all(ApiError(503, "shutting_down", "the server is stopping", close=True))
        await asyncio.sleep(0.05)  # handlers write their last events

    def _service_alive(self) -> bool:
        failure = self._failure()
        if failure is not None:
            self._code = 1
            self._service.bridge.fail_all(ApiError(503, "engine_stopped", failure, close=True))
        return failure is None

    async def _close_engine(self) -> None:
        served = self._service.served
        if served is None:
            return
        closing = threading.Thread(target=served.engine.close, name="close-engine", daemon=True)
        closing.start()
        end = time.monotonic() + _CLOSE_S
        while closing.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)

    def _signalled(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            log.get().warning("second signal: ending now")
            self._access.close()
            os._exit(128 + number)
        self._code = 130 if number == signal.SIGINT else 0
        log.get().info("stopping: what is running may finish for %g s", self.config.limits.drain_s)
        self._stopping.set()


def _new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's where it is installed: about half the time per request."""
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def local_url(host: str, port: int) -> str:
    """Where a browser on this machine finds the server."""
    name = "127.0.0.1" if host in ("0.0.0.0", "") else "[::1]" if host == "::" else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}/"
