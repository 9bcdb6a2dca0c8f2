"""The house's rules that can be read off the source: floors, doors to the outside, and what is never written."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import trivium
from tests.worlds import ROOT, child_environment

SOURCE = ROOT / "src" / "trivium"
FILES = sorted(SOURCE.rglob("*.py"))

# What only these places may import; a place is a room, a folder or a file.
DOORS = {
    "torch.distributed": ("dist/", "bench/peers/"),
    "triton": ("kernels/",),
    "starlette": ("serve/",),
    "fastapi": ("serve/",),
    "uvicorn": ("serve/",),
    "jinja2": ("base/sandbox.py",),
    "deepspeed": ("bench/peers/",),
}
# Environment variables are read at the border; cli and bench pass theirs on to processes that they start.
ENVIRONMENT = ("dist/launch.py", "base/config.py", "base/fault.py", "cli/", "bench/")
FORBIDDEN_MODULES = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "yaml")
FORBIDDEN_CALLS = ("eval", "exec", "hasattr")
VAGUE_NAMES = ("utils", "util", "helpers", "helper", "common", "misc", "manager")


def imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [dotted(node)] if isinstance(node, ast.Attribute) else []


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def faults(text: str, place: str) -> Iterator[str]:
    """What a file with this text at this place (relative to the package) does that the house forbids."""
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield "1: no docstring that says the file's one reason"
    if tree.body[1:] and not any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body):
        yield "1: no `from __future__ import annotations`"
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Assert):
            yield f"{line}: assert (python -O would drop it): raise an error of base.errors"
        if isinstance(node, ast.Global):
            yield f"{line}: global: pass the state"
        if isinstance(node, ast.ImportFrom) and node.level:
            yield f"{line}: relative import: write trivium.…"
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in FORBIDDEN_CALLS or name in ("torch.load", "torch.save", "yaml.load"):
                yield f"{line}: {name}()"
        for name in imported(node):
            if any(within(name, module) for module in FORBIDDEN_MODULES) and not isinstance(node, ast.Attribute):
                yield f"{line}: imports {name}"
            if (within(name, "os.environ") or name == "os.getenv") and not place.startswith(ENVIRONMENT):
                yield f"{line}: reads the environment; only {', '.join(ENVIRONMENT)} do"
            for module, doors in DOORS.items():
                if within(name, module) and not place.startswith(doors):
                    yield f"{line}: {module} is used only in {', '.join(doors)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_keeps_the_rules(path: Path) -> None:
    place = path.relative_to(SOURCE).as_posix()
    assert not list(dict.fromkeys(faults(path.read_text(), place)))


@pytest.mark.parametrize(
    ("code", "place"),
    [
        ("import pickle", "zero/api.py"),
        ("from multiprocessing import Pool\nimport cloudpickle", "zero/api.py"),
        ("eval('1')", "zero/api.py"),
        ("import torch\ntorch.load('x')", "checkpoint/x.py"),
        ("assert True", "zero/api.py"),
        ("def f():\n    global x\n    x = 1", "zero/api.py"),
        ("hasattr(1, 'x')", "zero/api.py"),
        ("import torch.distributed as dist", "zero/api.py"),
        ("from torch import distributed", "zero/api.py"),
        ("from torch.distributed.device_mesh import DeviceMesh", "zero/api.py"),
        ("import torch\nprint(torch.distributed.get_rank())", "zero/api.py"),
        ("import triton", "zero/api.py"),
        ("import os\nos.environ['X']", "zero/api.py"),
        ("import os\nos.getenv('X')", "zero/api.py"),
        ("from . import clip", "zero/api.py"),
    ],
)
def test_the_rules_see_what_they_forbid(code: str, place: str) -> None:
    head = '"""A reason."""\n\nfrom __future__ import annotations\n\n'
    assert list(faults(head + code, place))
    assert not list(faults(head + "import torch\n\ntorch.zeros(1)", place))


def test_the_rules_see_a_missing_head() -> None:
    assert len(list(faults("x = 1\ny = 2", "zero/api.py"))) == 2
    assert not list(faults('"""Only a docstring."""', "zero/__init__.py"))
    assert not list(faults('"""A."""\n\nfrom __future__ import annotations\nimport torch.distributed', "dist/comm.py"))


def test_imports_only_go_down() -> None:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=child_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_folder_is_a_package_and_no_name_is_vague() -> None:
    for path in FILES:
        assert (path.parent / "__init__.py").exists(), f"{path.parent} lacks __init__.py: it would not be installed"
        assert path.stem not in VAGUE_NAMES, path
    assert (SOURCE / "py.typed").exists()


def test_import_trivium_is_light() -> None:
    program = "import sys, trivium; print({'torch', 'numpy', 'typer', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], env=child_environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "set()\n"), done.stderr


def test_rooms_load_when_named() -> None:
    assert trivium.base.__name__ == "trivium.base"
    assert callable(trivium.init)
    assert callable(trivium.shutdown)
    with pytest.raises(AttributeError, match="no attribute 'zer0'; rooms: "):
        _ = trivium.zer0
    assert {"init", "shutdown", "zero", "checkpoint", "__version__"} <= set(dir(trivium))


def test_the_version_is_told_once() -> None:
    assert f'version = "{trivium.__version__}"' in (ROOT / "pyproject.toml").read_text()
