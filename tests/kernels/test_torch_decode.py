"""Decode steps without host decisions against the torch reference: every kind of attention, cache, format and size."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.captures import DEVICES, TOLERANCE, CapturableOnly, Recorder, captured, moved, steps_of
from tests.kernels.steps import BLOCK, INT, caches, close, decoder, matrix, routing_of, rows_batch, vector
from tests.kernels.test_native_attention import KINDS, attention
from trivium.kernels import registry, torch_decode
from trivium.kernels.matrix import Format, pack, unpack
from trivium.kernels.program import Batch, Combine, Embed, Expert, Experts, Gate, Program, Rope, Rows, Span
from trivium.kernels.torch_executor import TorchExecutor, decode
from trivium.kernels.torch_experts import choose, run_experts, run_stacked
from trivium.kernels.torch_linear import multiply
from trivium.kernels.torch_placement import ExpertStack, place


def compare(
    program: Program,
    steps: list[Batch],
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    block: int = BLOCK,
    tolerance: float = TOLERANCE,
) -> Recorder:
    """Both executors over caches of their own: every step's output, and in the end the caches."""
    reference = registry.executor(program, backend="torch")
    executor, recorder = captured(program, device)
    theirs, mine = caches(program, dtype, block), moved(caches(program, dtype, block), device)
    for step in steps:
        wanted, got = reference.run(step, theirs), executor.run(step, mine)
        close(got.logits.cpu(), wanted.logits, tolerance)
        close(got.hidden.cpu(), wanted.hidden, tolerance)
        for (experts, weights), (their_experts, their_weights) in zip(routing_of(got), routing_of(wanted), strict=True):
            assert experts.device.type == "cpu" and torch.equal(experts, their_experts)
            close(weights, their_weights, tolerance)
    if dtype == torch.float32:
        for ours, others in zip(mine, theirs, strict=True):
            written = torch.isfinite(others.keys)
            assert torch.equal(torch.isfinite(ours.keys.cpu()), written)
            close(ours.keys.cpu()[written], others.keys[written], tolerance)
    return recorder


LENGTHS = {1: (188,), 3: (70, 1, 33), 32: tuple(1 + 7 * number % 45 for number in range(32))}
SIZES = [
    *((sequences, torch.float32) for sequences in LENGTHS),
    (3, torch.bfloat16),
    (3, torch.int8),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("sequences", "dtype"), SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_attention(sequences: int, dtype: torch.dtype, kind: str, device: str) -> None:
    program = attention(**KINDS[kind])
    steps = steps_of(LENGTHS[sequences], 3, window=program.caches[0].window)
    recorder = compare(program, steps, device, dtype=dtype, tolerance=5e-6 if device == "cpu" else TOLERANCE)
    assert device == "cuda" or (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("block", "window"), [(1, 6), (1, None), (6, 1), (6, 2), (6, 7), (24, 37), (24, None)])
def test_blocks_of_any_size_and_windows_of_any_width(block: int, window: int | None, device: str) -> None:
    program = attention(window=window)
    compare(program, steps_of((30, 3, 26), 14, block=block, window=window), device, block=block, dtype=torch.bfloat16)


def test_many_sequences_are_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_decode, "_MOST_READ_BYTES", 5 * 4 * 128 * 3 * 40)
    program = attention(**KINDS["all"])
    compare(program, steps_of(LENGTHS[32], 2, window=50), "cpu")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("format", "group", "more"),
    [
        ("float32", 0, {}),
        ("float32", 0, {"latent": True}),
        ("float32", 0, {"moe": True, "window": 20}),
        ("bfloat16", 0, {"moe": True}),
        ("float16", 0, {"window": 20}),
    ],
)
def test_whole_steps(format: Format, group: int, more: dict[str, Any], device: str) -> None:
    """Sixteen-bit weights multiply in fp32 on the CPU alone, so on CUDA only fp32 is close to this reference."""
    if device == "cuda" and format != "float32":
        pytest.skip("another dtype multiplies there")
    program = decoder(format, group, "plain", **more)
    recorder = compare(program, steps_of((40, 9, 1), 3, window=more.get("window")), device)
    assert device == "cuda" or (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    "program",
    [
        *(pytest.param(attention(**KINDS[kind]), id=kind) for kind in KINDS),
        *(
            pytest.param(decoder(format, group, "plain", moe=moe), id=f"{format}{' experts' if moe else ''}")
            for format, group, moe in (
                ("float32", 0, True),
                ("bfloat16", 0, False),
                ("bfloat16", 0, True),
                ("float16", 0, True),
            )
        ),
        pytest.param(decoder("bfloat16", 0, "plain", latent=True, window=20), id="latent, windowed"),
    ],
)
def test_a_step_stays_on_its_device(program: Program, dtype: torch.dtype) -> None:
    """On "meta", which has shapes and no numbers: nothing can be read there, and what is on the host does not mix."""
    placed, held = place(program, torch.device("meta")), moved(caches(program, dtype), "meta")
    with torch.no_grad():
        found = decode(placed, torch.zeros(4, 2 + 16, dtype=INT, device="meta"), held)
    assert found.logits.shape == (4, program.logits.width) and found.hidden.shape == (4, program.hidden.width)
    tensors = [found.logits, found.hidden]
    if program.num_moe_layers:
        experts, weights = found.routing or ()
        assert experts.device.type == "meta" and experts.dtype == INT and experts.shape == weights.shape
        tensors.append(weights)
    assert {(tensor.device.type, tensor.dtype) for tensor in tensors} == {("meta", torch.float32)}
    assert (found.routing is None) == (not program.num_moe_layers)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")
@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("format", ["bfloat16", "float16"])
def test_captured_steps_equal_uncaptured_ones_on_cuda(format: Format, moe: bool) -> None:
    """Sixteen bits: against the same executor without a capture, which attends one sequence at a time."""
    program = decoder(format, 0, "plain", moe=moe)
    executor, plain = (TorchExecutor(program, device="cuda", max_sequences=most) for most in (64, 1))
    mine, theirs = (moved(caches(program), "cuda") for _ in range(2))
    for step in steps_of((40, 9, 1), 3):
        close(executor.run(step, mine).logits, plain.run(step, theirs).logits, 2e-2)


def mixed() -> Program:
    """Experts of one layer in two formats."""
    program = decoder("float32", 0, "plain", moe=True)
    operations = list(program.operations)
    at = next(place for place, op in enumerate(operations) if isinstance(op, Experts))
    layer = operations[at]
    assert isinstance(layer, Experts)
    other = replace(layer.experts[0], up=pack(layer.experts[0].up.data, "bfloat16"))
    operations[at] = replace(layer, experts=(other, *layer.experts[1:]))
    return replace(program, operations=tuple(operations))


@pytest.mark.parametrize(
    ("program", "why"),
    [
        (decoder("int8", 0, "plain"), "int8 matrices"),
        (decoder("int4", 32, "plain"), "int4 matrices"),
        (decoder("int8", 0, "plain", moe=True), "int8 matrices"),
        (mixed(), "experts that are not of one shape and format"),
    ],
    ids=["int8", "int4", "experts", "mixed"],
)
def test_what_is_not_captured_says_so(program: Program, why: str, caplog: pytest.LogCaptureFixture) -> None:
    """A product in int8 or int4 is hundreds of operations."""
    recorder = compare(program, steps_of((40, 9, 1), 2), "cpu")
    assert recorder.recorded == 0
    caplog.clear()
    with caplog.at_level("WARNING", logger="trivium"):
        told = captured(program, "cpu")[0].name
    assert told == f"torch cpu, decode steps not captured: {why}"
    assert [record.message for record in caplog.records] == [
        f"{told}; every operation is launched by itself, which is slow"
    ]
    assert captured(decoder("float32", 0, "plain"), "cpu")[0].name == "torch cpu, decode steps captured"
    assert registry.executor(program, backend="torch").name == "torch cpu"


@pytest.mark.parametrize(("columns", "padded"), [(256, 0), (250, 2)])
def test_quantised_products_pad_only_what_is_short(columns: int, padded: int) -> None:
    counted: list[str] = []

    class Counts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counted.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    x, weight = vector(3 * columns).view(3, columns), matrix(20, columns, "int8", 0, "plain")
    with Counts():
        got = multiply(x, weight)
    assert counted.count("constant_pad_nd") == padded
    close(got, x @ unpack(weight).T, 2e-2)


def experts(
    count: int, format: Format, *, gated: bool = True, biased: bool = False, clamp: float | None = None
) -> Experts:
    def one(seed: int) -> Expert:
        return Expert(
            up=matrix(20, 24, format, 0, "plain", seed),
            gate=matrix(20, 24, format, 0, "plain", seed + 1) if gated else None,
            down=matrix(24, 20, format, 0, "plain", seed + 2),
            up_bias=vector(20, seed) if biased else None,
            gate_bias=vector(20, seed + 3) if biased and gated else None,
            down_bias=vector(24, seed) if biased else None,
        )

    return Experts(
        x=Span(0, 0, 24),
        out=Span(1, 0, 24),
        logits=Span(2, 0, count),
        experts=tuple(one(10 * number) for number in range(count)),
        gate=Gate(top_k=2, scores="softmax"),
        activation="silu",
        layer=0,
        clamp=clamp,
    )


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])  # twelve of sixteen are gathered, eighteen not
@pytest.mark.parametrize("more", [{}, {"gated": False}, {"biased": True}, {"biased": True, "clamp": 0.5}])
@pytest.mark.parametrize("format", ["float32", "bfloat16"])
def test_stacked_experts(format: Format, more: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = experts(16, format, **more)
    program = Program(
        widths=(24, 24, 16), operations=(operation,), caches=(), logits=Span(1, 0, 24), hidden=Span(1, 0, 24)
    )
    placed = place(program, torch.device("cpu"))
    x = vector(tokens * 24).view(tokens, 24)
    chosen, weights = choose(vector(tokens * 16).view(tokens, 16), operation.gate)
    wanted = run_experts(x, operation, chosen, weights)
    gathers: list[int] = []
    gather = ExpertStack.of
    monkeypatch.setattr(ExpertStack, "of", lambda stack, picked: gathers.append(len(picked)) or gather(stack, picked))
    with CapturableOnly():
        got = run_stacked(x, operation, placed.stacks[0], chosen, weights)
    close(got, wanted)
    assert gathers == ([2 * tokens] if tokens <= 2 else [])
    close(run_experts(x, placed.program.operations[0], chosen, weights), wanted, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr("trivium.kernels.torch_experts._MOST_GATHERED_BYTES", 0)
    close(run_stacked(x, operation, placed.stacks[0], chosen, weights), wanted)
    assert len(gathers) == (tokens <= 2)


@pytest.mark.parametrize("tokens", [2, 40])
def test_tokens_are_cast_once_for_all_experts(tokens: int) -> None:
    operation = experts(16, "bfloat16")
    program = Program(
        widths=(24, 24, 16), operations=(operation,), caches=(), logits=Span(1, 0, 24), hidden=Span(1, 0, 24)
    )
    stack = place(program, torch.device("meta")).stacks[0]
    cast: list[tuple[int, ...]] = []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if kwargs.get("dtype") == torch.bfloat16:
                cast.append(tuple(args[0].shape))
            return func(*args, **kwargs)

    chosen = torch.zeros(tokens, 2, dtype=INT, device="meta")
    with Casts():
        run_stacked(torch.ones(tokens, 24, device="meta"), operation, stack, chosen, chosen.float())
    inner = (2 * tokens, 1, 20) if tokens == 2 else (16, tokens, 20)
    assert cast == [(tokens, 24), inner]


def test_an_unchosen_expert_that_overflows_reaches_nobody() -> None:
    operation = experts(4, "float32")
    operation.experts[3].down.data.fill_(float("inf"))
    program = Program(
        widths=(24, 24, 4), operations=(operation,), caches=(), logits=Span(1, 0, 24), hidden=Span(1, 0, 24)
    )
    stack = place(program, torch.device("cpu")).stacks[0]
    chosen = torch.tensor([[0, 1], [2, 0]], dtype=INT)
    assert torch.isfinite(run_stacked(torch.ones(2, 24), operation, stack, chosen, torch.ones(2, 2))).all()


def test_no_register_is_another() -> None:
    """What is copied and then turned in place leaves what it was copied from."""
    x = vector(3 * 8).view(3, 8)
    table = torch.cat((torch.zeros(4, 2), torch.ones(4, 2)), dim=1)  # a quarter of a turn
    program = Program(
        widths=(8, 8, 8),
        operations=(
            Embed(out=Span(0, 0, 8), table=x),
            Combine(kind="none", a=Span(0, 0, 8), out=Span(1, 0, 8)),
            Rows(x=Span(1, 0, 8), out=Span(2, 0, 8)),
            Rope(x=Span(2, 0, 8), heads=2, head_dim=4, table=table),
            Rope(x=Span(1, 0, 8), heads=2, head_dim=4, table=table),
            Rope(x=Span(1, 0, 8), heads=2, head_dim=4, table=table),
        ),
        caches=(),
        logits=Span(0, 0, 8),
        hidden=Span(2, 0, 8),
    )
    executor = TorchExecutor(program, capture=Recorder())
    tokens = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 0, 0]], dtype=INT)
    for logits, hidden in (
        ((turned := decode(place(program, torch.device("cpu")), tokens, ())).logits, turned.hidden),
        ((found := executor.run(rows_batch(3), ())).logits, found.hidden),
    ):
        assert torch.equal(logits, x)
        halves = x.view(3, 2, 2, 2)
        assert torch.equal(hidden.view(3, 2, 2, 2), torch.stack((-halves[:, :, 1], halves[:, :, 0]), dim=2))
