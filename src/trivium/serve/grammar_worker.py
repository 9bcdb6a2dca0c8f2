"""A process that tries grammars out, each in a child of its own, which the kernel ends when its processor time is up.

No bound of llguidance's holds for all grammars: an intersection of fifty patterns takes more than 20 s, and a thread
cannot be killed. What has compiled here in time is quick to compile again where it is used.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO

from llguidance import LLTokenizer

from trivium.serve.compilation import Kind, compiled, vocabulary

_SIZE = struct.Struct("<I")
_PROGRAM = "import sys; sys.path[:] = sys.argv[1:]; from trivium.serve.grammar_worker import main; main()"
_FAILED = "llguidance failed on it"
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGABRT)


class TooLate(Exception):
    """The grammar took more processor time than it may."""


class WorkerEnded(Exception):
    """The process was ended, by `Worker.close` or at its deadline; the next grammar starts another."""


class WorkerFailed(Exception):
    """The process cannot be started, or ends by itself."""


class ChildKilled(Exception):
    """Something other than the grammar's own failure ended the child that tried it: most likely there was no memory."""


class Worker:
    """This side of one such process. It is started by the first grammar; one thread at a time may ask it."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        control_ids: Sequence[int],
        end_ids: Sequence[int],
        limit_s: float,
        *,
        deadline_s: float,
        report: Callable[[str], object],
    ) -> None:
        """``pieces``: every token's bytes, by id; ``limit_s``: of processor time, for one grammar.

        ``deadline_s``: by the clock, for starting the process and one grammar; then it is killed. ``report`` is told
        why a process or a child is gone.
        """
        self._pieces, self._control_ids, self._end_ids, self._limit_s = pieces, control_ids, end_ids, limit_s
        self._deadline_s, self._report = deadline_s, report
        self._process: subprocess.Popen[bytes] | None = None
        self._asking = threading.Lock()
        self._guard = threading.Lock()  # no process is begun, killed or forgotten while another thread does so
        self._closed = False

    def check(self, kind: str, source: str) -> None:
        """Try a grammar.

        Raises ValueError with what is wrong with it, TooLate, WorkerEnded after `close` or at the deadline,
        WorkerFailed and ChildKilled.
        """
        question = json.dumps({"kind": kind, "source": source}).encode()
        with self._asking:
            used = self._process is not None
            try:
                said = self._tried(question)
            except WorkerFailed:  # one that has worked before may have been ended from outside since
                if not used:
                    raise
                said = self._tried(question)
        if "ended" in said:
            self._report(f"the child that tried a grammar was lost: {said['ended']}")
            raise ChildKilled
        if "late" in said:
            raise TooLate
        if said["wrong"] is not None:
            raise ValueError(said["wrong"])

    def close(self) -> None:
        """End the process, whatever it is at."""
        self._closed = True
        self._kill()
        with self._asking:
            self._end()

    def _tried(self, question: bytes) -> dict[str, str | None]:
        late = threading.Event()
        timer = threading.Timer(self._deadline_s, self._kill, [late])
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError as error:  # no thread for it
            self._report(f"a grammar's process cannot be watched: {error}")
            raise WorkerFailed from None
        try:
            process = self._process or self._start()
            if late.is_set():  # before there was anything to kill
                raise EOFError
            _send(process.stdin, question)
            return dict(json.loads(_receive(process.stdout)))
        except (OSError, EOFError, RuntimeError, ValueError) as error:  # RuntimeError: the interpreter ends
            why = self._end() or f"cannot be started: {error}"
            if self._closed:
                raise WorkerEnded from None
            if late.is_set():
                self._report(f"a grammar's process gave no answer in {self._deadline_s:g} s and was ended")
                raise WorkerEnded from None
            self._report(f"a grammar's process {why}")
            raise WorkerFailed from None
        finally:
            timer.cancel()

    def _start(self) -> subprocess.Popen[bytes]:
        with self._guard:
            if self._closed:
                raise EOFError
            self._process = process = subprocess.Popen(
                [sys.executable, "-I", "-c", _PROGRAM, *sys.path],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip
        head = {
            "sizes": [len(piece) for piece in self._pieces],
            "control_ids": list(self._control_ids),
            "end_ids": list(self._end_ids),
            "limit_s": self._limit_s,
        }
        _send(process.stdin, json.dumps(head).encode())
        _send(process.stdin, b"".join(self._pieces))
        return process

    def _kill(self, late: threading.Event | None = None) -> None:
        """End the process and its child; its number stays its own until `_end` has waited for it."""
        if late is not None:
            late.set()
        with self._guard:
            if self._process is not None and self._process.returncode is None:
                with suppress(ProcessLookupError, PermissionError):  # the latter: on macOS, of one that has ended
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _end(self) -> str:
        """Wait for the process, killed; returns how it ended, with the last words that it had, or nothing."""
        self._kill()
        with self._guard:
            process, self._process = self._process, None
        if process is None:
            return ""
        status = process.wait()
        words = b"" if process.stderr is None else process.stderr.read()
        for stream in (process.stdin, process.stdout, process.stderr):
            with suppress(OSError):
                if stream is not None:
                    stream.close()
        said = " ".join(words.decode(errors="replace").split())[-300:]
        how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
        return f"{how}: {said}" if said else how


def main() -> None:
    """The process: a vocabulary first, then grammars until there are no more."""
    # Left open to the end, for what closes earlier would be taken for the end; what prints must not print there.
    source, sink = os.fdopen(os.dup(0), "rb", closefd=False), os.fdopen(os.dup(1), "wb", closefd=False)
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    head = json.loads(_receive(source))
    limit_s = head["limit_s"]
    tokens = vocabulary(_cut(_receive(source), head["sizes"]), head["control_ids"], head["end_ids"])
    del head
    gc.collect()
    gc.freeze()  # children share what is there by now
    while True:
        try:
            asked = json.loads(_receive(source))
        except EOFError:
            return
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                signal.setitimer(signal.ITIMER_PROF, limit_s)  # its signal ends the child
                for theirs in (reading, source.fileno(), sink.fileno()):
                    os.close(theirs)
                for number in range(3):
                    os.dup2(nothing, number)
                os.write(writing, _outcome(tokens, asked["kind"], asked["source"]))
            finally:
                os._exit(0)
        os.close(writing)
        with open(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        _send(sink, _answer(said, status))


def _outcome(tokens: LLTokenizer, kind: Kind, source: str) -> bytes:
    """What the child says of a grammar. Whatever is raised, a panic of llguidance's too, is the grammar's fault."""
    wrong = None
    try:
        compiled(tokens, kind, source)
    except ValueError as error:
        wrong = str(error)
    except MemoryError:
        return b'{"ended": "no memory"}'
    except BaseException:
        wrong = _FAILED
    return json.dumps({"wrong": wrong}).encode()


def _answer(said: bytes, status: int) -> bytes:
    """What the server is told of a child that said ``said`` and ended with ``status``."""
    by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if by == signal.SIGPROF:
        return b'{"late": true}'
    if said:
        return said
    if by in _FAULTS:
        return json.dumps({"wrong": _FAILED}).encode()
    how = (
        f"ended by signal {by}" if by else f"it ended with status {os.waitstatus_to_exitcode(status)} and said nothing"
    )
    return json.dumps({"ended": how}).encode()


def _cut(text: bytes, sizes: Sequence[int]) -> list[bytes]:
    ends = list(itertools.accumulate(sizes))
    return [text[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _send(sink: IO[bytes] | None, data: bytes) -> None:
    if sink is None:
        raise EOFError
    sink.write(_SIZE.pack(len(data)) + data)
    sink.flush()


def _receive(source: IO[bytes] | None) -> bytes:
    head = b"" if source is None else source.read(_SIZE.size)
    if source is None or len(head) < _SIZE.size:
        raise EOFError
    (size,) = _SIZE.unpack(head)
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data
