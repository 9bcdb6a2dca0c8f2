"""``trivium doctor``: what this machine has, what is wrong with it, and the fix for each."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import psutil
import typer

from trivium import __version__
from trivium.base.errors import SetupError, TriviumError
from trivium.base.units import format_bytes
from trivium.cli.interrupts import interrupts_held, load_torch
from trivium.cli.output import data_console, print_json

if TYPE_CHECKING:
    from rich.text import Text

Status = Literal["ok", "note", "warn", "fail"]

MIN_TORCH = (2, 11)
DEFAULT_PORT = 29500
_GIB = 1 << 30
_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bf16",
    "avx512_vnni": "AVX-512 VNNI",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
    "i8mm": "int8 matrix",
    "bf16": "bf16",
}
_EXTRAS = {
    "deepspeed": "bench",
    "starlette": "serve",
    "llguidance": "serve",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "transformers": "test",
    "sphinx": "docs",
}
_STYLES = {"ok": "green", "note": "cyan", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing looked at. ``fail``: Trivium cannot work; ``warn``: something may not; ``note``: worth knowing."""

    name: str
    status: Status
    found: str
    fix: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("doctor", help="Check this machine; each thing that is wrong comes with its fix.")(doctor)


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Look at everything; exit 3 when something essential is broken."""
    checks = look()
    broken = [check.name for check in checks if check.status == "fail"]
    if as_json:
        print_json(
            {"trivium": __version__, "ok": not broken, "checks": [dataclasses.asdict(check) for check in checks]}
        )
    else:
        _show(checks)
    if broken:
        count = "1 thing needs" if len(broken) == 1 else f"{len(broken)} things need"
        raise SetupError(f"{count} fixing before Trivium can run here: {', '.join(broken)}")


def look() -> list[Check]:
    """Every check in order; one that itself fails is a finding, not a crash."""
    probes: tuple[Callable[[], Check], ...] = (
        check_python,
        check_torch,
        check_cpu,
        check_gpu,
        check_memory,
        check_disk,
        check_shared_memory,
        check_environment,
        check_ports,
        check_ranks,
        check_compiler,
        check_kernels,
        check_extras,
    )
    checks = []
    for probe in probes:
        try:
            checks.append(probe())
        except (ImportError, OSError, RuntimeError, ValueError, TriviumError) as error:
            name = probe.__name__.removeprefix("check_").replace("_", " ")
            checks.append(Check(name=name, status="warn", found=f"could not be looked at: {error}"))
    return checks


def check_python() -> Check:
    """The interpreter and the system it runs on."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    data = {"version": platform.python_version(), "system": platform.system(), "machine": platform.machine()}
    if platform.system() not in ("Linux", "Darwin"):
        return Check(
            name="python", status="warn", found=found, fix="use Linux or macOS; nothing else is tested", data=data
        )
    return Check(name="python", status="ok", found=found, data=data)


def check_torch() -> Check:
    """Whether torch is there, new enough and loads."""
    fix = f"pip install 'torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}'"
    try:
        version = importlib.metadata.version("torch")
        load_torch()
        import torch
    except importlib.metadata.PackageNotFoundError:
        return Check(name="torch", status="fail", found="is not installed", fix=fix)
    except (ImportError, OSError) as error:
        return Check(name="torch", status="fail", found=f"does not load: {error}", fix=fix)
    number = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    data = {"version": version, "threads": torch.get_num_threads(), "cuda_build": torch.version.cuda}
    if number < MIN_TORCH:
        return Check(name="torch", status="fail", found=f"{version} is too old", fix=fix, data=data)
    return Check(name="torch", status="ok", found=f"{version}, {torch.get_num_threads()} threads", data=data)


def check_cpu() -> Check:
    """Cores this process may use, and the instructions that decide how fast they are."""
    usable, present = usable_cores(), os.cpu_count() or 1
    features = cpu_features()
    found = f"{usable:g} of {present} cores; {', '.join(features) or 'no vector instructions known'}"
    data = {"cores": usable, "present": present, "features": features}
    if platform.machine() in ("x86_64", "AMD64") and features and "AVX2" not in features:
        fix = "expect a slow run: use a machine with AVX2"
        return Check(name="cpu", status="warn", found=found, fix=fix, data=data)
    if platform.machine() in ("x86_64", "AMD64") and not {"AVX-512", "AMX"} & set(features):
        fix = "train and serve in fp32 on this CPU: without AVX-512 or AMX its bf16 matrix products are far slower"
        return Check(name="cpu", status="note", found=found, fix=fix, data=data)
    return Check(name="cpu", status="ok", found=found, data=data)


def check_gpu() -> Check:
    """CUDA devices that torch sees, or why it sees none."""
    import torch

    if torch.cuda.is_available():
        gpus: list[dict[str, Any]] = [
            {
                "name": torch.cuda.get_device_name(index),
                "memory_bytes": torch.cuda.get_device_properties(index).total_memory,
                "capability": list(torch.cuda.get_device_capability(index)),
            }
            for index in range(torch.cuda.device_count())
        ]
        found = ", ".join(f"{gpu['name']} ({format_bytes(gpu['memory_bytes'])})" for gpu in gpus)
        return Check(name="gpu", status="ok", found=found, data={"gpus": gpus})
    if Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi"):
        fix = "install a CUDA build of torch: pip install --force-reinstall torch"
        if torch.version.cuda:
            fix = "update the NVIDIA driver (nvidia-smi tells its version), or check CUDA_VISIBLE_DEVICES"
        return Check(name="gpu", status="warn", found="a driver, but torch sees no device", fix=fix, data={"gpus": []})
    return Check(name="gpu", status="ok", found="none; everything runs on the CPU", data={"gpus": []})


def check_memory() -> Check:
    """Memory that is free now, within the limit of this process's control group."""
    memory = psutil.virtual_memory()
    limit = memory_limit()
    total = min(memory.total, limit) if limit else memory.total
    free = min(memory.available, total)
    found = f"{format_bytes(free)} free of {format_bytes(total)}"
    data = {"total_bytes": total, "free_bytes": free, "limit_bytes": limit}
    if free < 2 * _GIB:
        return Check(
            name="memory", status="warn", found=found, fix="free at least 2 GiB; the demo needs about that", data=data
        )
    return Check(name="memory", status="ok", found=found, data=data)


def check_disk() -> Check:
    """Room where runs and temporary files go."""
    here = os.getcwd()
    try:
        temporary = tempfile.gettempdir()
    except FileNotFoundError as error:
        fix = "set TMPDIR to a folder that can be written"
        return Check(name="disk", status="fail", found=f"no folder to write to: {error}", fix=fix)
    free = {folder: shutil.disk_usage(folder).free for folder in (here, temporary)}
    found = ", ".join(f"{format_bytes(count)} free in {folder}" for folder, count in free.items())
    data = {"free_bytes": free, "writable": {folder: os.access(folder, os.W_OK) for folder in free}}
    worst = min(free, key=lambda folder: free[folder])
    if free[worst] < 64 << 20:
        return Check(name="disk", status="fail", found=found, fix=f"free at least 64 MiB in {worst}", data=data)
    if free[worst] < _GIB:
        return Check(
            name="disk", status="warn", found=found, fix=f"free at least 1 GiB in {worst} for checkpoints", data=data
        )
    if not os.access(here, os.W_OK):
        fix = "cd to a folder you can write to, or name one for the run's output"
        return Check(name="disk", status="warn", found=f"{here} cannot be written", fix=fix, data=data)
    return Check(name="disk", status="ok", found=found, data=data)


def check_shared_memory() -> Check:
    """``/dev/shm``, through which processes of one machine pass tensors."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check(name="shared memory", status="ok", found="not used on this system")
    free = shutil.disk_usage(place).free
    found, data = f"{format_bytes(free)} free in {place}", {"free_bytes": free}
    if free < 256 << 20:
        fix = "give containers more: docker run --shm-size=1g; NCCL and data workers need it"
        return Check(name="shared memory", status="warn", found=found, fix=fix, data=data)
    return Check(name="shared memory", status="ok", found=found, data=data)


def check_environment() -> Check:
    """Whether a launcher's variables are whole."""
    from trivium.dist.launch import read_world

    try:
        world = read_world()
    except SetupError as error:
        fix = "start with torchrun, or unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        return Check(name="environment", status="fail", found=str(error), fix=fix)
    found = (
        f"rank {world.rank} of {world.size}, from {world.source}"
        if world.source != "alone"
        else "no launcher, one rank"
    )
    return Check(name="environment", status="ok", found=found, data={"source": world.source, "size": world.size})


def check_ports() -> Check:
    """Whether ranks can meet on this machine, and whether the usual port is free."""
    try:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
    except OSError as error:
        fix = "bring the loopback interface up (ip link set lo up), or allow sockets in this sandbox"
        return Check(name="ports", status="fail", found=f"no port on 127.0.0.1: {error.strerror}", fix=fix)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", DEFAULT_PORT))
        except OSError:
            fix = f"another run has {DEFAULT_PORT}: set MASTER_PORT, or use torchrun --standalone"
            return Check(name="ports", status="note", found=f"{DEFAULT_PORT} is taken, others are free", fix=fix)
    return Check(name="ports", status="ok", found=f"{DEFAULT_PORT} and others are free")


def check_ranks() -> Check:
    """Whether a world of one can be joined: the backend is in this build of torch and works."""
    from trivium.dist.launch import init, read_world, shutdown

    try:
        if read_world().size > 1:
            return Check(name="ranks", status="ok", found="not tried under a launcher of several ranks")
        with interrupts_held():  # torch's store aborts the process when one comes in the middle of its callbacks
            init(device="cpu")
            shutdown()
    except (TriviumError, RuntimeError, ValueError) as error:
        fix = "check that this machine's own name resolves (hostname in /etc/hosts), or set GLOO_SOCKET_IFNAME=lo"
        return Check(name="ranks", status="fail", found=f"gloo does not start: {str(error).splitlines()[0]}", fix=fix)
    return Check(name="ranks", status="ok", found="gloo starts")


def check_compiler() -> Check:
    """A C++ compiler, which native kernels and torch.compile on the CPU use where there is one."""
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path:
            return Check(name="compiler", status="ok", found=path, data={"path": path})
    fix = "apt-get install g++ (macOS: xcode-select --install), only for torch.compile and native kernels"
    return Check(name="compiler", status="note", found="no C++ compiler", fix=fix, data={"path": None})


def check_kernels() -> Check:
    """Which kernels generation runs on, and what is lost without the native ones."""
    from trivium.kernels import registry

    variants = registry.native_variants()
    said = registry.explain().removeprefix("kernels: ")
    if variants and variants[0] != "generic":
        return Check(name="kernels", status="ok", found=said, data={"variants": list(variants)})
    fix = "python -m trivium.kernels.build (needs a C++ compiler: apt-get install g++)"
    return Check(name="kernels", status="note", found=said, fix=fix, data={"variants": list(variants)})


def check_extras() -> Check:
    """Optional packages; what is missing is named with the extra that brings it."""
    there = {name: importlib.util.find_spec(name) is not None for name in _EXTRAS}
    missing = sorted({_EXTRAS[name] for name, found in there.items() if not found})
    found = ", ".join(name for name, has in there.items() if has) or "none installed"
    fix = f"only if you want them: pip install 'trivium[{','.join(missing)}]'" if missing else None
    return Check(name="extras", status="note" if missing else "ok", found=found, fix=fix, data=dict(there))


def usable_cores() -> float:
    """Cores that the affinity mask and the control group leave to this process."""
    cores = float(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit() and quota[1].isdigit():
        cores = min(cores, int(quota[0]) / int(quota[1]))
    return cores


def cpu_features(text: str | None = None) -> list[str]:
    """The instruction sets that matter here, from ``/proc/cpuinfo`` (or ``text`` in its form)."""
    listed = re.search(
        r"^(?:flags|Features)\s*:\s*(.*)$", _read("/proc/cpuinfo") if text is None else text, re.MULTILINE
    )
    if listed is None:
        return ["NEON"] if platform.machine() == "arm64" else []
    flags = set(listed[1].split())
    return [name for flag, name in _FEATURES.items() if flag in flags]


def memory_limit() -> int | None:
    """The control group's limit in bytes, if there is one."""
    text = _read("/sys/fs/cgroup/memory.max").strip()
    return int(text) if text.isdigit() else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _show(checks: list[Check]) -> None:
    console = data_console()
    for check in checks:
        console.print(_line(check), soft_wrap=False)


def _line(check: Check) -> Text:
    from rich.text import Text

    text = Text()
    text.append(f"{check.status:<4} ", style=_STYLES[check.status])
    text.append(f"{check.name}: ", style="bold")
    text.append(check.found)
    if check.fix:
        text.append(f"\n     fix: {check.fix}", style=_STYLES[check.status])
    return text
