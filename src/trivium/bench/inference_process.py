"""One contestant of the inference bench in a process of its own: asked in lines of JSON, and named when it dies."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from trivium.base.errors import SetupError

MODULES = {
    "trivium": "trivium.bench.inference_ours",
    "transformers": "trivium.bench.peers.inference_transformers",
    "llama.cpp": "trivium.bench.peers.inference_llama_cpp",
    "OpenVINO": "trivium.bench.peers.inference_openvino",
}
SECOND_WAYS = {"llama.cpp": "plain"}  # an argument more, for whoever died by a signal without it


class ContestantDied(SetupError):
    """A contestant's process ended. ``signalled``: by a signal, not by an error of its own."""

    def __init__(self, message: str, *, signalled: bool) -> None:
        super().__init__(message)
        self.signalled = signalled


class Worker:
    """Starts the contestant called ``name`` and waits until it is loaded; ``ready`` is what it then said of itself.

    Raises:
        ContestantDied: its process ended, or gave no answer within ``limit_s`` seconds; its last words are told.
    """

    def __init__(self, name: str, folder: Path, threads: int, *, limit_s: float = 300.0, way: str = "") -> None:
        self.name = name
        self._limit_s = limit_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        contestant, _, form = name.partition(" ")
        self._process = subprocess.Popen(
            [sys.executable, "-m", MODULES[contestant], str(folder), form, str(threads), way],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.ready = self._read("loading")

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One workload; waits for its answer."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.write(json.dumps(question) + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                pass  # it has died: `_read` tells how
        return self._read(" ".join(str(value) for value in question.values()))

    def _read(self, during: str) -> dict[str, Any]:
        late = threading.Timer(self._limit_s, self._process.kill)
        late.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout is not None else ""
        finally:
            late.cancel()
        if not line:
            raise self._death(during)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self, during: str) -> ContestantDied:
        code = self._process.wait()
        self._errors.seek(0)
        words = [text for text in self._errors.read().decode(errors="replace").splitlines() if text.strip()]
        self.close()
        how = f"ended with code {code}" if code >= 0 else f"was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            how += f" (no answer within {self._limit_s:.0f} s, or the machine ran out of memory)"
        said = f"; it last said: {words[-1].strip()[:300]}" if words else ""
        return ContestantDied(f"{self.name}: its process {how} while {during}{said}", signalled=code < 0)

    def close(self) -> None:
        """End it."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()
