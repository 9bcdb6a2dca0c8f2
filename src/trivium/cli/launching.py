"""Start a verb's ranks on this machine through torchrun's own launcher, and make one exit code and one cause of many.

Each rank leaves a note (its exit code, its words) in a folder of the launch, by which the first cause is told from its
consequences; torchrun's own words about a failed rank are shown only where there is no note.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from trivium.base.errors import RankError, TriviumError
from trivium.base.log import get
from trivium.cli.interrupts import ended, handed_on
from trivium.dist.launch import read_world

_NOISE = re.compile(
    rb"\[Gloo\] |USDT:|\*{20}|Setting OMP_NUM_THREADS |"
    rb"[WI]\d{4} .*torch/distributed/|\[?rank\d+\]:\[[WI]\d{4}|\[[WI]\d{3,4} "
)
_ENDING = re.compile(rb"E\d{4} .*torch/distributed/(elastic|run)")
_KILLED = re.compile(rb"rank +: (\d+) [^\n]*\n *exitcode +: -(\d+) ")


@dataclass(frozen=True, kw_only=True)
class Note:
    """What one rank says about its end. ``consequence``: another rank's failure was the cause."""

    rank: int
    code: int
    at: float
    consequence: bool
    message: str
    answer: Any


def as_rank(folder: Path | None, work: Callable[[], tuple[int, Any]]) -> tuple[int, Any]:
    """Run ``work``, which gives an exit code and an answer, as one rank of possibly several.

    A failure is told on stderr with the rank's number, its traceback unless it was foreseeable, and ends the process at
    once where there are peers, so that they learn of it. ``folder`` is where the launcher looks for the note.
    """
    world = read_world()
    consequence = False
    answer: Any = None
    message = ""
    try:
        code, answer = work()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would end the process by the signal, without its code
        code, message = 130, "interrupted"
    except RankError as error:
        code, message, consequence = error.exit_code, str(error), True
        _tell(world.rank, world.size, f"a consequence of another rank's failure: {error}")
    except TriviumError as error:
        code, message = error.exit_code, str(error)
        if world.size == 1 and folder is None:
            raise
        _tell(world.rank, world.size, f"error: {error}")
    except Exception as error:
        code, message = 1, f"{type(error).__name__}: {error}"
        _tell(world.rank, world.size, f"error: {message}\n{traceback.format_exc()}".rstrip())
    if folder is not None:
        note = {
            "rank": world.rank, "code": code, "at": time.time(), "consequence": consequence, "message": message,
            "answer": answer,
        }  # fmt: skip
        temporary = folder / f"rank-{world.rank}.tmp"
        temporary.write_text(json.dumps(note), encoding="utf-8")
        temporary.replace(folder / f"rank-{world.rank}.json")
    if world.size > 1 and (code not in (0, 130, 143) or message):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code, answer


def _tell(rank: int, size: int, text: str) -> None:
    prefix = f"[rank {rank}] " if size > 1 else ""
    print(f"{prefix}{text}", file=sys.stderr, flush=True)


def launch(verb: str, arguments: Sequence[str], ranks: int) -> tuple[int, Any]:
    """Run ``trivium verb arguments`` on ``ranks`` processes here; the exit code and rank 0's answer.

    Ctrl-C and SIGTERM are handed to the ranks, which stop after their step.
    """
    with tempfile.TemporaryDirectory(prefix="trivium-launch-") as name:
        folder = Path(name)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
            "-m", "trivium", verb, *arguments, "--launched", str(folder),
        ]  # fmt: skip
        if sys.stderr.isatty():
            command.append("--terminal")
        theirs, ours = os.pipe()
        with os.fdopen(theirs, "rb", buffering=0) as pipe:
            with handed_on(signal.SIGINT, signal.SIGTERM) as hand:
                try:
                    process = subprocess.Popen(command, stdout=ours, stderr=ours, start_new_session=True)
                finally:
                    os.close(ours)
                hand.to(partial(_send_to_ranks, process))
                words = _Words()
                reader = threading.Thread(target=words.copy, args=(pipe.fileno(),), daemon=True)
                reader.start()
                ended(process)
            reader.join(timeout=5)
        return _conclude(process.returncode, read_notes(folder), words, ranks, hand.first)


def _send_to_ranks(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal ``number`` to the ranks that the torchrun of ``process`` has started; without any yet, it is ended."""
    try:
        workers = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return
    if not workers:
        process.terminate()
    for worker in workers:
        try:
            worker.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def read_notes(folder: Path) -> list[Note]:
    """The notes in ``folder``, by rank."""
    found = []
    for path in sorted(folder.glob("rank-*.json")):
        found.append(Note(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda note: note.rank)


def _conclude(returned: int, notes: Sequence[Note], words: _Words, ranks: int, sent: int) -> tuple[int, Any]:
    answer = next((note.answer for note in notes if note.rank == 0), None)
    failed = sorted((note for note in notes if note.code), key=lambda note: (note.consequence, note.at))
    silent = sorted(set(range(ranks)) - {note.rank for note in notes})
    if returned == 0 and not failed:
        return 0, answer
    if failed and not failed[0].consequence:
        cause = failed[0]
        if cause.message and ranks > 1:
            get().error("the cause was rank %d: %s", cause.rank, cause.message.splitlines()[0])
        return cause.code, answer
    if sent:
        return 128 + sent, answer
    signals = words.signals()
    torchruns = {rank for rank in silent if signals.get(rank) == signal.SIGTERM}  # by torchrun, once another was lost
    for rank in sorted(set(silent) - torchruns) or silent:
        how = f"killed by signal {signals[rank]}" if rank in signals else "without a word"
        why = "; signal 9 is often the kernel's, when memory runs out" if signals.get(rank) == 9 else ""
        get().error("the cause was rank %d, which ended %s%s", rank, how, why)
    if not set(silent) <= set(signals) or not silent:
        words.show_ending()
    return 1, answer


@dataclass
class _Words:
    """What the ranks and torchrun write: the ranks' words at once, torchrun's post-mortem only when asked for."""

    ending: list[bytes] = field(default_factory=list)

    def copy(self, source: int) -> None:
        """Copy file descriptor ``source`` to stderr until its end; progress without a newline passes soon."""
        pending = b""
        while chunk := os.read(source, 65536):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                self._line(line + b"\n")
            if b"\x1b" in pending and not self.ending:
                self._put(pending)
                pending = b""
        if pending:
            self._line(pending)

    def _line(self, line: bytes) -> None:
        if self.ending or _ENDING.match(line):
            self.ending.append(line)
        elif not _NOISE.match(line):
            self._put(line)

    def _put(self, data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()

    def signals(self) -> dict[int, int]:
        """Rank → the signal it was killed by, as torchrun's post-mortem has it."""
        return {int(rank): int(number) for rank, number in _KILLED.findall(b"".join(self.ending))}

    def show_ending(self) -> None:
        """Write torchrun's post-mortem."""
        for line in self.ending:
            self._put(line)
