"""``python -m trivium.serve.rehearsal SETTINGS``: the server with an engine that computes nothing, to measure the rest.

``SETTINGS`` is JSON: ``step_s``, ``slots``, ``keys``, ``limits``. SIGUSR1 halts the engine, SIGUSR2 ends it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.inference import Delta, Request
from trivium.inference.stats import EngineStats
from trivium.serve.limits import Limits
from trivium.serve.served import Served
from trivium.serve.server import Server, ServerConfig, local_url

NAME = "rehearsal"
_BLOCKS = 1024
_CONTEXT = 4096
_PIECE = " fish"
Listener = Callable[[Delta], None]


class Bytes:
    """A tokenizer with a token per byte."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The bytes of ``text``."""
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of bytes."""
        return bytes(token_ids).decode("utf-8", errors="replace")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool,
        continue_final_message: bool,
    ) -> list[int]:
        """The bytes of all contents."""
        return self.encode("\n".join(message["content"] for message in messages) + "\n")


class RehearsalEngine:
    """Says one piece per running choice and step; ``slots`` choices run at once, with a block each, the rest waits."""

    def __init__(self, *, step_s: float, slots: int) -> None:
        """Steps follow each other every ``step_s`` seconds, or at once (0)."""
        self.last_step_s = time.monotonic()
        self._step_s, self._slots = step_s, slots
        self._changed = threading.Condition()
        self._waiting: list[tuple[Request, int, Listener]] = []
        self._running: list[tuple[Request, int, Listener]] = []
        self._said: dict[tuple[str, int], int] = {}
        self._cancelled: set[str] = set()
        self._state = "runs"
        self._thread = threading.Thread(target=self._main, name="rehearsal-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    @property
    def stats(self) -> EngineStats:
        """Counts as of now."""
        with self._changed:
            running, waiting = len(self._running), len(self._waiting)
        return EngineStats(
            running=running, waiting=waiting, blocks_total=_BLOCKS, blocks_free=_BLOCKS - running, blocks_remembered=0,
            block_size=16, steps=0, prompt_tokens=0, cached_tokens=0, generated_tokens=0, preemptions=0,
            drafted_tokens=0, accepted_tokens=0, finished={}, tokens_per_expert=(),
        )  # fmt: skip

    def submit(self, request: Request, on_delta: Listener) -> None:
        """Queue a request."""
        with self._changed:
            self._waiting += [(request, index, on_delta) for index in range(request.params.n)]
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request before the next step."""
        with self._changed:
            self._cancelled.add(request_id)
            self._changed.notify()

    def close(self, drain_s: float = 0) -> None:
        """End the thread."""
        self._turn("ends")
        self._thread.join(5)

    def stand_still(self) -> None:
        """Make no more steps, as an engine whose computation hangs."""
        self._turn("stands")

    def die(self) -> None:
        """End the thread as a failure would: without a word to anyone."""
        self._turn("ends")

    def _turn(self, state: str) -> None:
        with self._changed:
            self._state = state
            self._changed.notify()

    def _main(self) -> None:
        due_s = time.monotonic()
        while True:
            with self._changed:
                while self._state == "stands":
                    self._changed.wait()
                if self._state == "ends":
                    return
                if not (self._running or self._waiting or self._cancelled):
                    self._changed.wait(0.1)
                    due_s = self.last_step_s = time.monotonic()
                    continue
                said = self._step()
            for listener, delta in said:
                listener(delta)
            self.last_step_s = time.monotonic()
            due_s = max(due_s + self._step_s, self.last_step_s - self._step_s)
            if due_s > self.last_step_s:
                time.sleep(due_s - self.last_step_s)

    def _step(self) -> list[tuple[Listener, Delta]]:
        said: list[tuple[Listener, Delta]] = []
        for place in (self._waiting, self._running):
            for entry in [entry for entry in place if entry[0].request_id in self._cancelled]:
                place.remove(entry)
                said.append((entry[2], self._delta(entry[0], entry[1], "", "abort")))
        self._cancelled.clear()
        while self._waiting and len(self._running) < self._slots:
            self._running.append(self._waiting.pop(0))
        for request, index, listener in list(self._running):
            place_of = (request.request_id, index)
            count = self._said[place_of] = self._said.get(place_of, 0) + 1
            last = count >= (request.params.max_tokens or _CONTEXT - len(request.prompt_token_ids))
            said.append((listener, self._delta(request, index, _PIECE, "length" if last else None)))
            if last:
                self._running.remove((request, index, listener))
        return said

    def _delta(self, request: Request, index: int, text: str, reason: Any) -> Delta:
        if reason is not None:
            self._said.pop((request.request_id, index), None)
        return Delta(
            request_id=request.request_id, choice=index, text=text, token_ids=[32] if text else [],
            finish_reason=reason, prompt_tokens=len(request.prompt_token_ids),
        )  # fmt: skip


def main(text: str) -> int:
    """Serve until told to stop; the exit code."""
    settings = json.loads(text)
    engine = RehearsalEngine(step_s=settings["step_s"], slots=settings["slots"])
    signal.signal(signal.SIGUSR1, lambda number, frame: engine.stand_still())
    signal.signal(signal.SIGUSR2, lambda number, frame: engine.die())
    limits = Limits(**settings.get("limits", {}))
    config = ServerConfig(name=NAME, port=0, keys=tuple(settings.get("keys", ())), limits=limits)
    served = Served(
        name=NAME, engine=engine, tokenizer=Bytes(), max_positions=_CONTEXT, vocabulary=256, slots=settings["slots"],
        longest_token=1, template="{{ messages }}",
    )  # fmt: skip
    server = Server(config, lambda: served)
    url = local_url(config.host, server.port)
    return server.run(started=lambda: print(f"ready. Page: {url}", file=sys.stderr, flush=True))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
