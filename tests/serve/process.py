"""Servers with the stub engine as processes of their own, forked from one that has imported all: see `Spawner`.

Each line on stdin, ``step_s slots``, starts one; it prints its pid, its port when it is ready, and "stopped".
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.worlds import ROOT, child_environment


class Spawner:
    """Starts one server after another."""

    def __init__(self) -> None:
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.serve.process"],
            cwd=ROOT, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip

    def start(self, step_s: float = 0.02, slots: int = 64) -> tuple[int, int]:
        """(pid, port) of a new server."""
        assert self._parent.stdin is not None
        self._parent.stdin.write(f"{step_s} {slots}\n")
        self._parent.stdin.flush()
        return int(self.line()), int(self.line())

    def line(self) -> str:
        """The next line that is printed."""
        assert self._parent.stdout is not None
        return self._parent.stdout.readline().strip()

    def close(self) -> None:
        """End the spawner; its server must have ended."""
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        try:
            self._parent.wait(30)
        finally:
            self._parent.kill()
            self._parent.wait()
            if self._parent.stdout is not None:
                self._parent.stdout.close()


def serve(step_s: float, slots: int) -> int:
    """One server, in the child."""
    from tests.serve.stub import StubEngine, served
    from trivium.serve.limits import Limits
    from trivium.serve.server import Server, ServerConfig

    print(os.getpid(), flush=True)
    engine = StubEngine(step_s=step_s, slots=slots)
    limits = Limits(drain_s=90, connections=2000)
    server = Server(ServerConfig(name="stub", port=0, limits=limits), lambda: served(engine))
    code = server.run(started=lambda: print(server.port, flush=True))
    print("stopped", flush=True)
    return code


def main() -> None:
    """Fork a server per line, and print its exit code when it has ended."""
    import trivium.serve.server  # noqa: F401 - imported here so that the children need not

    for line in sys.stdin:
        step_s, slots = line.split()
        child = os.fork()
        if not child:
            code = 70
            try:
                code = serve(float(step_s), int(slots))
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)  # nothing is left to be tidied up, and tidying up after torch takes a while
