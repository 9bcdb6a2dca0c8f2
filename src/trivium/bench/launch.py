"""Start the ranks of one measurement through torch's own launcher, and bring back what each of them reports."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trivium.base.errors import RankError, SetupError

_TAIL_LINES = 30


def launch(
    module: str, request: Mapping[str, Any], ranks: int, *, timeout_s: float, before: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Run ``python -m module REQUEST FOLDER`` on ``ranks`` ranks of this host; their reports, by rank.

    ``before`` are words put in front of the command. One thread per rank; no process outlives the call.
    Raises RankError with the ranks' last words when one fails, and SetupError when they are not done in time.
    """
    with tempfile.TemporaryDirectory(prefix="trivium-bench-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request))
        command = [*before, sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
        command += ["--master-addr=127.0.0.1", f"--master-port={_free_port()}"]
        command += ["-m", module, str(folder / "request.json"), name]
        with (folder / "words.txt").open("wb") as words:
            process = subprocess.Popen(
                command, stdout=words, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
            )
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                raise SetupError(f"the measurement was not done after {timeout_s:.0f} s:\n{_tail(folder)}") from None
            finally:
                _end(process)
        if code != 0:
            raise RankError(f"a rank of the measurement failed (exit code {code}): {_cause(folder)}")
        return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def report(folder: str, rank: int, result: Mapping[str, Any]) -> None:
    """Called by each rank: leave ``result`` where `launch` looks for it."""
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(result))


@contextlib.contextmanager
def told(folder: str) -> Iterator[None]:
    """Around what a rank does: if it fails, its traceback is left where `launch` looks for the cause."""
    try:
        yield
    except Exception:
        path = Path(folder) / f"failed-{os.environ.get('RANK', '0')}.txt"
        path.write_text(traceback.format_exc())
        raise


def environment() -> dict[str, str]:
    """One thread per rank, loopback only, and the package importable as it is here."""
    source = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (source, os.environ.get("PYTHONPATH", "")) if part)
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": loopback,
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore",
    }


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of the launcher and its ranks, after a failure or an interruption."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM if process.poll() is None else signal.SIGKILL)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _cause(folder: Path) -> str:
    """The traceback of the rank that failed first; the launch's last words where no rank left one."""
    left = sorted(folder.glob("failed-*.txt"), key=lambda path: path.stat().st_mtime_ns)
    if not left:
        return "\n" + _tail(folder)
    rank = left[0].stem.partition("-")[2]
    return f"rank {rank}\n" + "\n".join(left[0].read_text().splitlines()[-_TAIL_LINES:])


def _tail(folder: Path) -> str:
    lines = (folder / "words.txt").read_text(errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
