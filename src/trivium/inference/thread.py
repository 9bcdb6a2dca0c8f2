"""The engine on a thread of its own: other threads hand in requests and are called back, and never wait for a step.

The compute of a step runs outside the interpreter's lock, so that callers' threads go on meanwhile.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from trivium.base import log
from trivium.base.errors import SetupError
from trivium.inference.engine import Engine
from trivium.inference.request import Delta, FinishReason, Request, RequestError
from trivium.inference.stats import EngineStats

OnDelta = Callable[[Delta], None]
_HEARTBEAT_S = 0.25


@dataclass
class _Listener:
    on_delta: OnDelta
    open: set[int]


class EngineThread:
    """Owns ``engine`` from now on. Every request gets deltas until one with a finish reason, whatever happens.

    ``on_delta`` is called on the engine's thread and must be quick; if it raises, its request is cancelled. ``alive``
    is False once the thread has ended, ``error`` says why if it was not asked to. ``last_step_s`` is the monotonic time
    of the last step, or of the last look at an empty queue.
    """

    def __init__(self, engine: Engine) -> None:
        self.error: BaseException | None = None
        self.last_step_s = time.monotonic()
        self._engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[str, _Listener] = {}
        self._lock = threading.Lock()
        self._stop_at_s: float | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="trivium-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are still being answered."""
        return self._thread.is_alive() and self.error is None

    @property
    def idle(self) -> bool:
        """Whether no request is under way."""
        return not self._listeners

    @property
    def stats(self) -> EngineStats:
        """The engine's counts, now or a step ago."""
        return self._engine.stats

    def submit(self, request: Request, on_delta: OnDelta) -> None:
        """Hand in a request; returns at once.

        Raises:
            RequestError: something in it cannot be served; nothing was handed in.
            SetupError: the engine has stopped or is stopping.
        """
        self._engine.checked(request)
        with self._lock:
            if self._closed or not self.alive:
                why = f": {self.error}" if self.error is not None else ""
                raise SetupError(f"the engine has stopped{why}; start it again")
            if request.request_id in self._listeners:
                raise RequestError(f"request_id {request.request_id!r} is being answered already", param="request_id")
            self._listeners[request.request_id] = _Listener(on_delta, set(range(request.params.n)))
        self._inbox.put(lambda: self._add(request))

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; unknown ones are ignored. Its last deltas say "abort"."""
        self._inbox.put(lambda: self._cancel(request_id))

    def between_steps(self, call: Callable[[Engine], None]) -> None:
        """Run ``call`` on the engine's thread between two steps, and wait for it; what it raises is raised here."""
        done = threading.Event()
        raised: list[BaseException] = []

        def run() -> None:
            try:
                call(self._engine)
            except BaseException as error:
                raised.append(error)
            finally:
                done.set()

        self._inbox.put(run)
        while not done.wait(_HEARTBEAT_S):
            if not self._thread.is_alive():
                raise SetupError("the engine has stopped; start it again")
        if raised:
            raise raised[0]

    def close(self, drain_s: float = 0) -> None:
        """Take nothing more, give what is under way ``drain_s`` seconds to end, abort the rest, end the thread."""
        with self._lock:
            self._closed = True
        self._stop_at_s = time.monotonic() + drain_s
        self._inbox.put(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _main(self) -> None:
        try:
            while not self._stopping():
                self._take_all()
                for delta in self._engine.step():
                    self._tell(delta)
                self.last_step_s = time.monotonic()
            self._abort_all()
        except BaseException as error:
            self.error = error
            log.get().error("the engine stopped: %s: %s", type(error).__name__, error)
            self._fail_all(f"the engine stopped: {error}")

    def _stopping(self) -> bool:
        if self._stop_at_s is None:
            return False
        return (self._engine.idle and self._inbox.empty()) or time.monotonic() >= self._stop_at_s

    def _take_all(self) -> None:
        """Run what the inbox holds; when there is nothing else to do, wait for it a little."""
        if self._engine.idle:
            try:
                self._inbox.get(timeout=_HEARTBEAT_S)()
            except queue.Empty:
                return
        while not self._inbox.empty():
            self._inbox.get_nowait()()

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except Exception as error:  # checked before; whatever is left is told to that request alone
            self._end(request.request_id, "error", str(error))

    def _cancel(self, request_id: str) -> None:
        if not self._engine.cancel(request_id):
            self._end(request_id, "abort", None)

    def _tell(self, delta: Delta) -> None:
        with self._lock:
            listener = self._listeners.get(delta.request_id)
        if listener is None:
            return
        if delta.finish_reason is not None:
            listener.open.discard(delta.choice)
            if not listener.open:
                self._drop(delta.request_id)
        try:
            listener.on_delta(delta)
        except Exception as error:
            log.get().warning("request %s: its listener raised %r; cancelled", delta.request_id, error)
            self._drop(delta.request_id)
            self._engine.cancel(delta.request_id)

    def _drop(self, request_id: str) -> None:
        with self._lock:
            self._listeners.pop(request_id, None)

    def _end(self, request_id: str, reason: FinishReason, error: str | None) -> None:
        """A last delta for every choice of a request that the engine does not know."""
        with self._lock:
            listener = self._listeners.get(request_id)
        for choice in sorted(listener.open) if listener is not None else ():
            self._tell(
                Delta(request_id=request_id, choice=choice, text="", token_ids=[], finish_reason=reason, error=error)
            )

    def _abort_all(self) -> None:
        self._take_all()
        for request_id in list(self._listeners):
            self._cancel(request_id)  # also one that `submit` has noted and not handed in yet
        for delta in self._engine.step():
            self._tell(delta)

    def _fail_all(self, error: str) -> None:
        with self._lock:
            self._closed = True
            waiting = list(self._listeners)
        for request_id in waiting:
            self._end(request_id, "error", error)
