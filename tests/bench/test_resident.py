from __future__ import annotations

import subprocess
import sys

import pytest

from trivium.bench import loopback, resident
from trivium.bench.launch import environment

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="proportional set size and namespaces are Linux's")


def test_the_peak_sees_what_was_freed_again() -> None:
    before = resident.resident()
    with resident.Peak() as peak:
        held = bytearray(64 * MIB)
        held[::4096] = b"\1" * len(held[::4096])
        peak.look()
        del held
    above = peak.highest.anonymous_bytes - before.anonymous_bytes
    assert 60 * MIB < above < 160 * MIB
    assert peak.highest.total_bytes >= peak.highest.anonymous_bytes
    assert peak.num_samples >= 1


def test_a_namespace_counts_its_own_bytes_only() -> None:
    words = loopback.prefix()
    if words is None:
        pytest.skip("this system lets no user make a network namespace")
    program = (
        "import socket\n"
        "from trivium.bench.loopback import sent_bytes\n"
        "a = socket.create_server(('127.0.0.1', 0)); b = socket.create_connection(a.getsockname()); c, _ = a.accept()\n"
        "before = sent_bytes(); b.sendall(bytes(50_000)); n = 0\n"
        "while n < 50_000: n += len(c.recv(65536))\n"
        "print(before < 5_000, 50_000 < sent_bytes() - before < 60_000)\n"
    )
    done = subprocess.run(
        [*words, sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout.split()) == (0, ["True", "True"]), done.stderr
