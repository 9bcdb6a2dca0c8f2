"""T36: what the environment says of the world, and how its faults are told in time."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from tests.worlds import ROOT, child_environment
from trivium.base.errors import SetupError
from trivium.dist.launch import World, read_world

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}


def test_alone_without_an_environment() -> None:
    assert read_world({}) == World(source="alone", rank=0, size=1, local_rank=0, address=None, port=None)


def test_torchrun_slurm_and_mpi() -> None:
    assert read_world(TORCHRUN) == World(source="torchrun", rank=1, size=2, local_rank=1, address="10.0.0.1", port=1234)
    slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    found = read_world({**slurm, "SLURM_JOB_NODELIST": "node[003-007,9],other"})
    assert found == World(source="Slurm", rank=3, size=8, local_rank=1, address="node003", port=29500)
    assert read_world({key: value for key, value in slurm.items() if key != "SLURM_STEP_ID"}).source == "alone"
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "head", "MASTER_PORT": "77"}
    assert read_world(mpi) == World(source="Open MPI", rank=1, size=2, local_rank=1, address="head", port=77)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2"}, "RANK=2 is not below WORLD_SIZE=2: expected 0 to 1"),
        ({"RANK": "-1"}, "RANK=-1 is not below"),
        ({"RANK": "one"}, "RANK='one': expected a whole number"),
        ({"WORLD_SIZE": None}, "torchrun's environment is half set: WORLD_SIZE is missing"),
        ({"RANK": None}, "half set: RANK is missing"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: expected 1 to 65535"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
    ],
)
def test_half_an_environment(changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(SetupError, match=words.replace("(", "\\(")):
        read_world({key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None})


@pytest.mark.parametrize("fault", ["port in use", "unknown host", "rank too large"])
def test_faults_end_in_seconds_with_the_fix(fault: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = {
            "RANK": "9" if fault == "rank too large" else "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "no.such.host.invalid" if fault == "unknown host" else "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        program = (
            "import sys, torch, trivium\nfrom tests.clock import Since\n"
            "since = Since()\ntry:\n    trivium.init(device='cpu')\n"
            "except trivium.base.errors.TriviumError as error:\n    print(since.seconds(), error)\n"
            "    sys.exit(error.exit_code)"
        )
        done = subprocess.run(
            [sys.executable, "-c", f"import trivium.base.errors\n{program}"],
            cwd=ROOT,
            env=child_environment(environment),
            capture_output=True,
            text=True,
            timeout=240,
        )
    assert done.returncode == 3, done.stderr
    seconds, _, said = done.stdout.partition(" ")
    assert float(seconds) < 5
    words = {
        "port in use": "MASTER_PORT is free",
        "unknown host": "Set it to the host of rank 0",
        "rank too large": "RANK=9",
    }
    assert words[fault] in said


def test_a_world_of_one_needs_no_environment() -> None:
    """A world of one comes up without a port."""
    program = "import trivium; m = trivium.init(device='cpu'); print(m.rank, m.size, m.data_size); trivium.shutdown()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.stdout.split() == ["0", "1", "1"], done.stderr
