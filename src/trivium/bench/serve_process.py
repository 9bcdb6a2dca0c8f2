"""Servers as processes of their own, started and ended by the benchmark, and what they use while they run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from trivium.base.errors import SetupError

_START_S = 300.0
_LOOK_S = 0.01


@dataclass(frozen=True, kw_only=True)
class ServerProcess:
    """A server that answers at ``url`` (up to ``/v1``); ``start_s``: from its start until it was ready, in seconds."""

    pid: int
    url: str
    start_s: float

    @property
    def port(self) -> int:
        """Where it listens on the loopback."""
        return int(self.url.rsplit(":", 1)[1].partition("/")[0])

    def processor_s(self) -> tuple[float, float]:
        """Seconds of processor time so far: (of the thread that serves HTTP, of the whole process)."""
        process = psutil.Process(self.pid)
        whole = process.cpu_times()
        main = next(thread for thread in process.threads() if thread.id == self.pid)
        return main.user_time + main.system_time, whole.user + whole.system

    def memory_bytes(self) -> int:
        """Resident memory."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def descriptors(self) -> int:
        """Open files and sockets."""
        return int(psutil.Process(self.pid).num_fds())


@contextlib.contextmanager
def started(model: str, options: Sequence[str] = ()) -> Iterator[ServerProcess]:
    """``trivium serve MODEL`` at a free port, without a log of requests. Gone when the block ends.

    Raises:
        SetupError: it ended, or was not ready in time; its last words.
    """
    command = ["trivium", "serve", model, "--port", "0", "--access-log", "off", *options]
    with _launched(command) as found:
        yield found


@contextlib.contextmanager
def rehearsing(
    *, step_s: float = 0.0, slots: int = 64, keys: Sequence[str] = (), limits: Mapping[str, Any] | None = None
) -> Iterator[ServerProcess]:
    """The server with an engine that computes nothing: a step every ``step_s``, ``slots`` answers at once.

    It waits 1 s for answers when it is stopped, and has the other caps as they are unless ``limits`` say otherwise.

    Raises:
        SetupError: it ended, or was not ready in time; its last words.
    """
    settings = {"step_s": step_s, "slots": slots, "keys": list(keys), "limits": {"drain_s": 1.0} | dict(limits or {})}
    with _launched(["trivium.serve.rehearsal", json.dumps(settings)]) as found:
        yield found


@contextlib.contextmanager
def _launched(module: Sequence[str]) -> Iterator[ServerProcess]:
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as said:  # a file never makes the server wait for a reader
        child = subprocess.Popen(
            [sys.executable, "-m", *module],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            address = _address(child, said.fileno())
            yield ServerProcess(pid=child.pid, url=f"{address}v1", start_s=time.perf_counter() - begun)
        finally:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
            try:
                child.wait(40)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _address(child: subprocess.Popen[bytes], said: int) -> str:
    """Wait until the server says that it is ready; where it is."""
    end = time.monotonic() + _START_S
    while True:
        ended = child.poll() is not None or time.monotonic() > end
        words = os.pread(said, 1 << 20, 0)
        found = re.search(rb"ready\.\s+Page:\s+(http://\S+)", words)
        if found:
            return found[1].decode()
        if ended:
            why = words.decode(errors="replace").strip()[-500:]
            raise SetupError(f"the server did not become ready: {why}")
        time.sleep(_LOOK_S)
