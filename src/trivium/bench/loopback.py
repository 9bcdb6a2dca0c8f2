"""Bytes on the wire as the kernel counts them: a network namespace of its own, and its loopback device's counter.

``python -m trivium.bench.loopback COMMAND …`` brings the device up inside a fresh namespace and becomes COMMAND.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

from trivium.bench.launch import environment

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1


def sent_bytes() -> int:
    """What all processes of this namespace have sent over loopback since it exists, headers included."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "lo":
            return int(numbers.split()[8])
    return 0


def prefix() -> list[str] | None:
    """The words to put before a command so that it runs in a namespace of its own; None where that is not allowed."""
    unshare = shutil.which("unshare")
    if unshare is None or sys.platform != "linux":
        return None
    words = [unshare, "--map-root-user", "--net", sys.executable, "-m", "trivium.bench.loopback"]
    tried = subprocess.run([*words, "true"], capture_output=True, check=False, env=environment())
    return words if tried.returncode == 0 else None


def _bring_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH14s", b"lo", 0, b"")
        flags = struct.unpack("16sH14s", fcntl.ioctl(control, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14s", b"lo", flags | _IFF_UP, b""))


if __name__ == "__main__":
    _bring_up()
    os.execvp(sys.argv[1], sys.argv[1:])
