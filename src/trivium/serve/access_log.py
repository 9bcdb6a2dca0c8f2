"""One JSON line per answered request, without prompts, answers or keys; a slow reader of the log slows nobody."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone

from trivium.serve.exchange import Exchange

_PATH_CHARS = 200
_WAITING_LINES = 10_000


class AccessLog:
    """Writes lines on a thread of its own; JSON escapes whatever a client put into a path or a label."""

    def __init__(self, write: Callable[[str], object] | None) -> None:
        """``write`` takes a line, or several; None: no log."""
        self.dropped = 0
        self._write = write
        self._lines: queue.Queue[str | None] = queue.Queue(_WAITING_LINES)
        self._thread: threading.Thread | None = None
        if write is not None:
            self._thread = threading.Thread(target=self._main, name="access-log", daemon=True)
            self._thread.start()

    def line(self, exchange: Exchange) -> None:
        """Tell of ``exchange``, which has been answered (status 499: the client left first)."""
        if self._thread is None:
            return
        scope = exchange.scope
        client = scope.get("client")
        entry = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "request_id": exchange.request_id,
            "client": None if client is None else str(client[0]),
            "method": scope["method"],
            "path": scope["path"][:_PATH_CHARS],
            "status": exchange.status or 499,
            "seconds": round(time.monotonic() - exchange.started_s, 4),
            **({"key": exchange.key} if exchange.key >= 0 else {}),
            **exchange.noted,
        }
        try:
            self._lines.put_nowait(json.dumps(entry, ensure_ascii=True) + "\n")
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is left, for a second at most."""
        if self._thread is not None:
            try:
                self._lines.put(None, timeout=0.5)
            except queue.Full:
                return
            self._thread.join(timeout=0.5)

    def _main(self) -> None:
        while self._write is not None:
            line = self._lines.get()
            if line is None:
                return
            try:
                self._write(line)
            except (OSError, ValueError):  # the reader of the log went away
                self._write = None
        while self._lines.get() is not None:
            continue
