"""The paper's traffic: 2Ψ(N-1)/N per rank and micro-batch, 3Ψ(N-1)/N at stage 3, by the ledger and by the kernel."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.worlds import ROOT, Worlds, child_environment

HEADER_BYTES = 20 + 32
"""IPv4 and TCP with timestamps; loopback has no link header in its count."""
SEGMENT_BYTES = 1 << 16
"""The most that loopback carries in one packet."""


@pytest.mark.parametrize("size", [2, 4])
def test_volume(world: Worlds, size: int) -> None:
    for results in world(size).run("tests.zero.traffic_cases", "volume"):
        for stage, result in enumerate(results):
            assert result["numel"] >= 10_000_000
            paper = (3 if stage == 3 else 2) * (size - 1) / size
            kept = result["kept"] / result["numel"] * (size - 1) / size  # gathered once for forward and backward
            assert paper - kept == pytest.approx(result["per_element"], rel=0.01)
            assert result["per_element"] <= paper * 1.01
            assert result["phases"]["agree"] < 20_000
            assert result["detours"] == 0


@pytest.mark.parametrize("recompute", ["reentrant", "saved"])
def test_recompute_and_backward_share_one_gather(world: Worlds, recompute: str) -> None:
    shape = {"dim": 64, "layers": 6, "vocabulary": 400}
    plain = world(2).run("tests.zero.traffic_cases", "volume", "", shape)
    again = world(2).run("tests.zero.traffic_cases", "volume", recompute, shape)
    for before, after in zip(plain[0], again[0], strict=True):
        before["phases"].pop("agree"), after["phases"].pop("agree")
        assert after["phases"] == before["phases"]
        assert after["detours"] == 0


def test_gathering_the_next_overlaps_computing_this_one(world: Worlds) -> None:
    events = world(2).run("tests.zero.traffic_cases", "order_of_work")[0]
    for number in range(3):
        assert events.index(f"gather layers.{number + 1} forward") < events.index(f"compute layers.{number}")
    for number in range(3, 0, -1):
        assert events.index(f"gather layers.{number} backward") < events.index(f"gather layers.{number - 1} backward")
    assert sum(event.startswith("gather layers.0") for event in events) == 2
    for number in range(3, 0, -1):
        assert events.index(f"gather layers.{number - 1} backward") < events.index(f"backward layers.{number}")
        assert events.index(f"launch layers.{number}") < events.index(f"end layers.{number - 1}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
@pytest.mark.parametrize("size", [2, 4])
def test_the_kernel_counts_the_same(size: int) -> None:
    """Every byte that the kernel sends over lo in one step of a model of ten million parameters, nothing subtracted
    but the few packets that TCP believed lost and sent again: 64 KiB for each that the kernel counts.

    Each packet carries 20 bytes of IP and 32 of TCP with timestamps. Loopback's packets hold up to 64 KiB and half of
    them are bare acknowledgements, so these headers, and gloo's own of a few hundred bytes a message, must stay far
    below the one percent that is left beside the paper's volume.
    """
    prefix = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--net"]
    up = "ip link set lo up"
    if not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs unshare (util-linux) and ip (iproute2)")
    if subprocess.run([*prefix, "sh", "-c", up], capture_output=True).returncode:
        pytest.skip("this machine does not permit network namespaces")
    launch = f"torch.distributed.run --standalone --nproc-per-node={size}"
    run = f"exec {sys.executable} -m {launch} -m tests.zero.loopback_rank"
    done = subprocess.run(
        [*prefix, "sh", "-c", f"{up} && {run}"],
        cwd=ROOT,
        env=child_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("counted "))
    counted = json.loads(line.removeprefix("counted "))
    assert len(counted) == 4
    for stage, one in enumerate(counted):
        assert one["paper"] >= 2 * 4 * 10_000_000 * (size - 1)
        once = one["kernel"] - one["resent"] * SEGMENT_BYTES
        assert one["ledger"] <= one["kernel"]
        assert once <= one["paper"] * 1.01
        assert one["ledger"] >= one["paper"] * (0.93 if stage == 3 else 0.999)  # stage 3 keeps what both passes share
        assert once <= one["ledger"] * 1.005
        assert one["packets"] * HEADER_BYTES <= one["kernel"] * 0.005
