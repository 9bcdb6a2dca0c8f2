"""Which backend runs, what is said about it, and that bad arguments are errors, never crashes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.steps import INT, NATIVE, batch_of, caches, decoder, matrix, native, over, rows_batch, vector
from trivium.base.errors import ConfigError, SetupError
from trivium.kernels import build, registry
from trivium.kernels.native_executor import open_library
from trivium.kernels.program import Batch, Cache, Experts, Linear, Span

BACKENDS = ["torch", *NATIVE]


@pytest.mark.parametrize("variant", NATIVE)
def test_variants_can_be_named(variant: str) -> None:
    executor = native(decoder("float32", 0, "panels"), variant)
    assert executor.name == f"native {variant}"
    assert executor.batch_invariant


def test_the_best_variant_runs_by_itself() -> None:
    plain = registry.executor(decoder("float32", 0, "plain"))
    assert plain.name == "torch cpu"
    assert not plain.batch_invariant
    if "native" in registry.available():
        assert registry.layout() == "panels"
        assert registry.executor(decoder("float32", 0, "panels")).name == f"native {registry.native_variants()[0]}"
        assert "native" in registry.explain()
    assert registry.layout("torch") == "plain"


def test_without_libraries_torch_runs_and_the_loss_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "library", lambda variant, folder=tmp_path: tmp_path / f"{variant}.so")
    assert registry.available() == ("torch",)
    assert registry.layout() == "plain"
    assert "several times slower" in registry.explain()
    assert "python -m trivium.kernels.build" in registry.explain()
    with pytest.raises(ConfigError, match="several times slower"):
        registry.executor(decoder("float32", 0, "panels"), backend="native")
    monkeypatch.setattr(build, "find_compiler", lambda named=None: None)
    assert "install g++ or clang" in registry.explain()
    assert build.build(tmp_path) == []


def test_a_library_that_is_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "libtrivium_x.so"
    path.write_text("not a library")
    with pytest.raises(SetupError, match="build it again"):
        open_library(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "expected auto, native or torch"),
        ({"backend": "native:mmx"}, "this machine runs"),
        ({"backend": "native", "device": "meta"}, "runs on the CPU"),
        ({"backend": "native", "threads": -1}, "threads=-1"),
    ],
)
def test_refused_backends(arguments: dict[str, Any], message: str) -> None:
    if arguments["backend"] != "cuda" and "native" not in registry.available():
        pytest.skip("no native kernels here")
    with pytest.raises(ConfigError, match=message):
        registry.executor(decoder("float32", 0, "panels"), **arguments)


def changed(batch: Batch, name: str, index: int | tuple[int, int], value: int) -> Batch:
    tensor = getattr(batch, name).clone()
    tensor[index] = value
    return replace(batch, **{name: tensor})


STEP = batch_of((0, 0, 20), (1, 0, 5))
BAD: dict[str, Batch] = {
    "token_ids: 50": changed(STEP, "token_ids", 3, 50),
    "token_ids: -1": changed(STEP, "token_ids", 3, -1),
    "positions: 600": changed(STEP, "positions", 24, 600),
    "positions: -1": changed(STEP, "positions", 0, -1),
    "positions: must rise": changed(STEP, "positions", 5, 5 - 1),
    "sequences: 2": changed(STEP, "sequences", 24, 2),
    "must be adjacent": changed(STEP, "sequences", 2, 1),
    "output_rows: 25": changed(STEP, "output_rows", 0, 25),
    r"block_tables\[0, 1\]: -1": changed(STEP, "block_tables", (0, 1), -1),
    r"block_tables\[1, 0\]: 96": changed(STEP, "block_tables", (1, 0), 96),
    "1 entries of 16 tokens for position 19": replace(STEP, block_tables=STEP.block_tables[:, :1].contiguous()),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("message", BAD)
def test_bad_batches_are_named(backend: str, message: str) -> None:
    layout, name = ("plain", backend) if backend == "torch" else ("panels", f"native:{backend}")
    program = decoder("float32", 0, layout)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        registry.executor(program, backend=name).run(BAD[message], caches(program))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_types_and_caches_are_named(backend: str) -> None:
    layout, name = ("plain", backend) if backend == "torch" else ("panels", f"native:{backend}")
    program = decoder("float32", 0, layout)  # type: ignore[arg-type]
    executor = registry.executor(program, backend=name)
    held = caches(program)
    with pytest.raises(ConfigError, match="int32"):
        executor.run(replace(STEP, token_ids=STEP.token_ids.long()), held)
    with pytest.raises(ConfigError, match="positions"):
        executor.run(replace(STEP, positions=STEP.positions[:3]), held)
    with pytest.raises(ConfigError, match="the program has 2, got 1"):
        executor.run(STEP, held[:1])
    other = Cache(keys=held[1].keys[:, :1].contiguous(), values=held[1].values)
    with pytest.raises(ConfigError, match="cache 1: keys"):
        executor.run(STEP, (held[0], other))
    with pytest.raises(ConfigError, match="float16"):
        executor.run(STEP, (held[0], replace(held[1], keys=held[1].keys.half())))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_routing_is_named(backend: str) -> None:
    layout, name = ("plain", backend) if backend == "torch" else ("panels", f"native:{backend}")
    program = decoder("float32", 0, layout, moe=True)  # type: ignore[arg-type]
    executor = registry.executor(program, backend=name)
    good = torch.zeros(25, 3, dtype=INT)
    for routing, message in (((good,), "1 layers"), ((good, good + 8), "8"), ((good, good[:, :2]), "expected int32")):
        with pytest.raises(ConfigError, match=message):
            executor.run(replace(STEP, routing=routing), caches(program))


@pytest.mark.parametrize("variant", NATIVE)
def test_programs_that_do_not_fit_are_refused(variant: str) -> None:
    x = vector(2 * 8).view(2, 8)
    good = matrix(70, 8, "float32", 0, "panels")
    for linear, message in (
        (Linear(x=Span(0, 0, 8), out=Span(1, 0, 70), weight=matrix(70, 8, "float32", 0, "plain")), "read panels"),
        (Linear(x=Span(0, 0, 7), out=Span(1, 0, 70), weight=good), r"a matrix \[70, 8\]: expected \[70, 7\]"),
        (Linear(x=Span(0, 0, 8), out=Span(1, 1, 70), weight=good), "register 1 has 70 columns"),
        (Linear(x=Span(9, 0, 8), out=Span(1, 0, 70), weight=good), "register 9"),
        (Linear(x=Span(0, 0, 8), out=Span(1, 0, 70), weight=good, bias=vector(3)), "a vector of 3 numbers"),
    ):
        with pytest.raises(ConfigError, match=message):
            native(over(x, (70,), (linear,), Span(1, 0, 70)), variant)


@pytest.mark.parametrize("variant", NATIVE)
@pytest.mark.parametrize("format", ["float32", "bfloat16", "int8", "int4"])
def test_a_poisoned_token_stays_alone(variant: str, format: Any) -> None:
    """Not a number, and infinity, in one token's input: its outputs say so, the others' do not change."""
    columns, group = 100, 32 if format == "int4" else 0
    x = vector(8 * columns).view(8, columns)
    weight = matrix(70, columns, format, group, "panels")

    def logits(values: torch.Tensor) -> torch.Tensor:
        linear = Linear(x=Span(0, 0, columns), out=Span(1, 0, 70), weight=weight)
        return native(over(values, (70,), (linear,), Span(1, 0, 70)), variant).run(rows_batch(8), ()).logits

    clean = logits(x)
    for poison in (float("nan"), float("inf")):
        bad = x.clone()
        bad[3, 40] = poison
        got = logits(bad)
        assert not torch.isfinite(got[3]).any()
        others = torch.arange(8) != 3
        assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("variant", NATIVE)
def test_no_output_rows(variant: str) -> None:
    program = decoder("float32", 0, "panels")
    step = replace(STEP, output_rows=torch.zeros(0, dtype=INT))
    out = native(program, variant, 2).run(step, caches(program))
    assert out.logits.shape == (0, 50)


THREADS = """
import resource, sys
from tests.kernels.steps import batch_of, caches, decoder, native
from trivium.base.errors import SetupError
program = decoder("float32", 0, "panels")
executor, held, step = native(program, sys.argv[1], 40), caches(program), batch_of((0, 0, 5))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
try:
    executor.run(step, held)
except SetupError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(len(executor.run(step, held).logits))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads its own size in /proc")
def test_threads_that_cannot_start_are_an_error_not_an_end() -> None:
    """40 stacks of 8 MiB do not fit into 64 MiB: some threads start, a later one does not."""
    variant = registry.native_variants()[0] if "native" in registry.available() else pytest.skip("no native kernels")
    done = subprocess.run([sys.executable, "-c", THREADS, variant], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "the native kernels could not start their threads; allow more, or ask for fewer",
        "5",
    ], done.stderr


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize(("count", "moved"), [(3, {}), (3, {1: 2}), (1, {1: 0})], ids=["too few", "a gap", "one twice"])
def test_layers_of_experts_that_do_not_add_up_are_refused(backend: str, count: int, moved: dict[int, int]) -> None:
    program = decoder("float32", 0, "panels", moe=True)
    operations = tuple(
        replace(op, layer=moved.get(op.layer, op.layer)) if isinstance(op, Experts) else op for op in program.operations
    )
    with pytest.raises(ConfigError, match=f"{count} MoE layers, its operations are of"):
        registry.executor(replace(program, operations=operations, num_moe_layers=count), backend=f"native:{backend}")
