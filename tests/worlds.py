"""Worlds of real processes for tests: long-lived gloo ranks that run case after case, and fresh ones under torchrun.

A case is an importable function whose first argument is the rank's mesh::

    # tests/zero/cases.py
    def total(mesh, number):
        return mesh.comm("dp").all_reduce_ints([number * mesh.rank])

    # tests/zero/test_total.py
    def test_total(world):
        assert world(2).run("tests.zero.cases", "total", 3) == [[3], [3]]

Ranks are forked from one process that has imported torch and Trivium, which would take each of them seconds of a core;
where forking is not safe (off Linux) each starts afresh. Each runs with one thread, warnings as errors and seed 0. A
case that fails or exceeds its time on any rank fails the test with the culprit's traceback first and every rank's
words; its world is then thrown away, and the next test gets a new one. No process outlives the test session.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import itertools
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, Protocol

import psutil
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
_RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    "PYTHONUNBUFFERED": "1",
}
START_S = 240.0
CASE_S = 240.0  # against hanging only: a machine may lose its cores for minutes
GRACE_S = 2.0
WORDS_S = 10.0
_PRELOADED = (
    "torch",
    "torch._dynamo",  # every optimizer loads it
    "trivium",
    "trivium.checkpoint",
    "trivium.zero",
    "trivium.moe",
    "trivium.models",
    "trivium.train",
)
_MESSAGE_BYTES = 1 << 20
_TAIL_LINES = 60
_PR_SET_PDEATHSIG = 1


class WorldFailure(AssertionError):
    """A case failed on some rank; the text holds the culprit's traceback, then the others'."""


class Rank(Protocol):
    """The process of a rank, as ``subprocess.Popen`` and ``Forked`` have it."""

    pid: int

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


class Forked:
    """A process that the nursery forked and waits for."""

    def __init__(self, nursery: Nursery, pid: int) -> None:
        self.pid = pid
        self._nursery = nursery
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            self._code = self._nursery.ask(("poll", self.pid), lost=-signal.SIGKILL)
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (CASE_S if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked rank", timeout or CASE_S)
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        if self._code is None:  # until it was waited for, its pid is nobody else's
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


class Nursery:
    """The process that ranks are forked from, started for the first. It dies with this one, and they with it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: socket.socket | None = None

    def bear(self, environment: Mapping[str, str], log: Path, pipe: Connection) -> Rank:
        """A new rank that answers on the other end of ``pipe`` and writes its words into ``log``."""
        if sys.platform != "linux":
            return _fresh("rank", environment, log, pipe.fileno())
        pid: int | None = self.ask(("fork", dict(environment), str(log)), pipe.fileno())
        if pid is None:
            raise WorldFailure("the process that ranks are forked from has ended; its words are on stderr")
        return Forked(self, pid)

    def ask(self, request: tuple[Any, ...], fd: int | None = None, lost: Any = None) -> Any:
        """The nursery's answer; ``lost`` if it has ended. Only a request with ``fd`` starts one."""
        if fd is not None and (self._process is None or self._process.poll() is not None):
            self.close()
            self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._process = _fresh("nursery", {**os.environ, **_RANK_ENVIRONMENT}, None, theirs.fileno())
            theirs.close()
        if self._channel is None:
            return lost
        try:
            socket.send_fds(self._channel, [pickle.dumps(request)], [] if fd is None else [fd])
            answer = self._channel.recv(_MESSAGE_BYTES)
        except OSError:
            return lost
        return pickle.loads(answer) if answer else lost

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._channel is not None:
            self._channel.close()
        self._process = self._channel = None


def _fresh(role: str, environment: Mapping[str, str], log: Path | None, fd: int) -> subprocess.Popen[bytes]:
    """This file as a program that is given ``fd``."""
    with contextlib.ExitStack() as stack:
        words = None if log is None else stack.enter_context(log.open("ab"))
        return subprocess.Popen(
            [sys.executable, "-m", "tests.worlds", role, str(fd), str(os.getpid())],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=words,
            pass_fds=[fd],
            start_new_session=True,
        )


class World:
    """``size`` long-lived ranks. Get one from the fixture ``world``, not from here."""

    def __init__(self, size: int, nursery: Nursery) -> None:
        self.size = size
        self._nursery = nursery
        self._folder = tempfile.TemporaryDirectory(prefix=f"trivium-world-{size}-")
        self._logs = [Path(self._folder.name) / f"rank-{rank}.log" for rank in range(size)]
        self._processes: list[Rank] = []
        self._pipes: list[Connection] = []
        port = free_port()
        for rank in range(size):
            self._start(rank, port)
        self._collect("starting", START_S)

    @property
    def alive(self) -> bool:
        return bool(self._processes) and all(process.poll() is None for process in self._processes)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def run(
        self,
        case: str | Callable[..., Any],
        function: str | None = None,
        *arguments: Any,
        timeout: float = CASE_S,
        discard: bool = False,
        **keywords: Any,
    ) -> list[Any]:
        """Run ``function`` of the module ``case`` (or the function ``case`` itself) on every rank; results by rank.

        ``discard`` throws the world away afterwards, for a case that leaves it broken on purpose.
        """
        if callable(case):
            arguments = arguments if function is None else (function, *arguments)
            case, function = case.__module__, case.__qualname__
        offsets = [log.stat().st_size for log in self._logs]
        request = pickle.dumps((case, function, arguments, keywords))
        whole = False
        try:
            for pipe in self._pipes:
                pipe.send_bytes(request)
            results = self._collect(f"{case}.{function}", timeout, offsets)
            whole = not discard
            return results
        except pytest.skip.Exception:
            whole = not discard
            raise
        finally:
            if not whole:  # also when a timer or Ctrl-C broke in: late answers must not meet the next case
                self.close()

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
        for process in self._processes:
            process.wait()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        self._folder.cleanup()

    def _start(self, rank: int, port: int) -> None:
        ours, theirs = Pipe()
        environment = {
            **os.environ,
            **_RANK_ENVIRONMENT,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        self._logs[rank].touch()
        process = self._nursery.bear(environment, self._logs[rank], theirs)
        theirs.close()
        self._processes.append(process)
        self._pipes.append(ours)

    def _collect(self, what: str, timeout: float, offsets: Sequence[int] | None = None) -> list[Any]:
        """One answer per rank, or a failure that tells all that is known."""
        answers: dict[int, tuple[str, float, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size:
            pending = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = self._receive(rank)
                if answers[rank][0] != "ok":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if len(answers) == self.size and all(kind == "ok" for kind, _, _ in answers.values()):
            return [answers[rank][2] for rank in range(self.size)]
        if answers and all(kind == "skip" for kind, _, _ in answers.values()) and len(answers) == self.size:
            pytest.skip(answers[0][2])
        text = self._report(what, timeout, answers, offsets or [0] * self.size)
        self.close()
        raise WorldFailure(text)

    def _receive(self, rank: int) -> tuple[str, float, Any]:
        try:
            answer: tuple[str, float, Any] = pickle.loads(self._pipes[rank].recv_bytes())
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._processes[rank].wait(timeout=GRACE_S)
            return "died", time.monotonic(), f"the process ended, exit code {self._processes[rank].poll()}\n"
        return answer

    def _report(
        self, what: str, timeout: float, answers: Mapping[int, tuple[str, float, Any]], offsets: Sequence[int]
    ) -> str:
        silent = [rank for rank in range(self.size) if rank not in answers]
        self._ask_for_stacks(silent)
        failed = sorted((kind != "died", at, rank) for rank, (kind, at, _) in answers.items() if kind != "ok")
        lines = [f"{what} on {self.size} ranks"]
        for place, (_, _, rank) in enumerate(failed):
            kind, _, text = answers[rank]
            lines.append(
                f"--- rank {rank}: {'first' if place == 0 else 'afterwards, perhaps a consequence'} ({kind})\n{text}"
            )
        if silent:
            reason = (
                f"no answer within {timeout:g} s" if not failed else f"no answer {GRACE_S:g} s after the first failure"
            )
            lines.append(f"--- ranks {', '.join(map(str, silent))}: {reason}; their stacks are in their words below")
        for rank, log in enumerate(self._logs):
            with log.open("rb") as file:
                file.seek(offsets[rank])
                words = file.read().decode(errors="replace").strip().split("\n")
            if words != [""]:
                lines.append(f"--- words of rank {rank}\n" + "\n".join(words[-_TAIL_LINES:]))
        return "\n".join(lines)

    def _ask_for_stacks(self, ranks: Sequence[int]) -> None:
        """Let ``ranks`` write where they are into their logs; wait until each has, or ``WORDS_S``."""
        sizes = {rank: self._logs[rank].stat().st_size for rank in ranks}
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        deadline = time.monotonic() + WORDS_S
        while sizes and time.monotonic() < deadline:
            sizes = {rank: size for rank, size in sizes.items() if self._logs[rank].stat().st_size == size}
            time.sleep(0.05)


class Worlds:
    """One world per size, started when first asked for and again after it was lost: the fixture ``world``."""

    def __init__(self) -> None:
        self._nursery = Nursery()
        self._worlds: dict[int, World] = {}

    def __call__(self, size: int) -> World:
        known = self._worlds.get(size)
        if known is None or not known.alive:
            if known is not None:
                known.close()
            self._worlds[size] = known = World(size, self._nursery)
        return known

    def close(self) -> None:
        for known in self._worlds.values():
            known.close()
        self._worlds.clear()
        self._nursery.close()


class Launched:
    """Fresh ranks under torchrun, for tests that kill one."""

    def __init__(self, arguments: Sequence[str], ranks: int, environment: Mapping[str, str], folder: Path) -> None:
        self.ranks = ranks
        self._out, self._err = folder / "stdout", folder / "stderr"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [*command, *arguments],
                cwd=ROOT,
                env=child_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._err.read_text(errors="replace")

    def rank_pids(self, timeout: float = START_S) -> list[int]:
        """The processes of the ranks, in order; waits until all of them are there."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            found: dict[int, int] = {}
            for child in self._family():
                with contextlib.suppress(psutil.Error):
                    place = child.environ()
                    if place.get("WORLD_SIZE") == str(self.ranks) and "RANK" in place:
                        found.setdefault(int(place["RANK"]), child.pid)
            if len(found) == self.ranks:
                return [found[rank] for rank in range(self.ranks)]
            time.sleep(0.05)
        raise WorldFailure(f"the {self.ranks} ranks did not start within {timeout:g} s\n{self.stderr}")

    def wait(self, timeout: float = CASE_S) -> int:
        """The exit code of torchrun; on timeout everything is killed and the words are shown."""
        try:
            return self.process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.close()
            raise WorldFailure(f"torchrun ran past {timeout:g} s\n{self.stdout}\n{self.stderr}") from None

    def close(self) -> None:
        family = self._family()
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        psutil.wait_procs(family, timeout=60)

    def _family(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


Launch = Callable[..., Launched]


def launcher(folder: Path) -> Iterator[Launch]:
    """The body of the fixture ``launch``: ``launch(["-m", "trivium", "train", ...], ranks=2, env={...})``."""
    started: list[Launched] = []

    def start(arguments: Sequence[str], ranks: int = 2, env: Mapping[str, str] | None = None) -> Launched:
        place = folder / f"launch-{len(started)}"
        place.mkdir()
        started.append(Launched(arguments, ranks, env or {}, place))
        return started[-1]

    try:
        yield start
    finally:
        for launched in started:
            launched.close()


def child_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a fresh process: this source tree, one thread, none of a launcher's variables."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, **_RANK_ENVIRONMENT, **(extra or {})}


def free_port() -> int:
    """A port that is free, below those that are given to whoever asks for any; each worker of the tests has a share."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20_000 + (worker * 2_000 + (os.getpid() + next(_PORTS)) % 2_000) % 12_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


_PORTS = itertools.count()


def _die_with(parent: int) -> None:
    """Ask the kernel to end this process with its parent; elsewhere the closed pipe does it between cases."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def _find(module: str, name: str) -> Callable[..., Any]:
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    function: Callable[..., Any] = found
    return function


def _filter_warnings() -> None:
    """The filters of pyproject.toml, here as in the tests' own process."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        filters: list[str] = tomllib.load(file)["tool"]["pytest"]["ini_options"]["filterwarnings"]
    for text in filters:
        action, message, category, *_ = (*text.split(":"), "", "")
        kind: type[Warning] = getattr(builtins, category) if category else Warning
        warnings.filterwarnings(action, message=message, category=kind)  # type: ignore[arg-type]


def _run_case(mesh: Any, request: bytes) -> bytes:
    import torch

    try:
        module, name, arguments, keywords = pickle.loads(request)
        torch.manual_seed(0)
        random.seed(0)
        with warnings.catch_warnings():
            _filter_warnings()
            result = _find(module, name)(mesh, *arguments, **keywords)
        return pickle.dumps(("ok", time.monotonic(), result))
    except pytest.skip.Exception as skip:
        return pickle.dumps(("skip", time.monotonic(), str(skip)))
    except BaseException:
        return pickle.dumps(("raised", time.monotonic(), traceback.format_exc()))
    finally:
        gc.collect()


def _serve(pipe: Connection) -> None:
    import torch

    import trivium

    torch.set_num_threads(1)
    try:
        mesh = trivium.init(device="cpu")
    except BaseException:
        pipe.send_bytes(pickle.dumps(("raised", time.monotonic(), traceback.format_exc())))
        return
    pipe.send_bytes(pickle.dumps(("ok", time.monotonic(), None)))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_run_case(mesh, request))


def _be_rank(fd: int) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    _serve(Connection(fd))


def _be_forked_rank(fd: int, parent: int, environment: Mapping[str, str], log: str) -> None:
    """What a forked process does instead of returning: the rank's work, its words in ``log``."""
    code = 1
    try:
        os.setsid()
        _die_with(parent)
        os.environ.clear()
        os.environ.update(environment)
        words = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        os.close(words)
        _be_rank(fd)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _be_nursery(fd: int) -> None:
    """Import what every rank needs, then fork one for each request; no thread is started here before that."""
    for module in _PRELOADED:
        importlib.import_module(module)
    me = os.getpid()
    with socket.socket(fileno=fd) as channel:
        while True:
            data, fds, _, _ = socket.recv_fds(channel, _MESSAGE_BYTES, 1)
            if not data:
                return
            kind, *rest = pickle.loads(data)
            if kind == "fork":
                answer: int | None = os.fork()
                if answer == 0:
                    channel.close()
                    _be_forked_rank(fds[0], me, *rest)
                os.close(fds[0])
            else:
                try:
                    ended, status = os.waitpid(rest[0], os.WNOHANG)
                    answer = os.waitstatus_to_exitcode(status) if ended else None
                except ChildProcessError:  # of a nursery before this one, which took its ranks with it
                    answer = -signal.SIGKILL
            channel.send(pickle.dumps(answer))


if __name__ == "__main__":
    _die_with(int(sys.argv[3]))
    {"rank": _be_rank, "nursery": _be_nursery}[sys.argv[1]](int(sys.argv[2]))
