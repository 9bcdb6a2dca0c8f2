"""Captured decode steps: buckets, what is captured and what not, what drops it, and the checks before."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.kernels.captures import BLOCKS, DEVICES, TOLERANCE, captured, moved, steps_of
from tests.kernels.steps import BLOCK, INT, caches, close, decoder, routing_of
from trivium.base.errors import ConfigError
from trivium.kernels import registry, torch_graph
from trivium.kernels.batch import DecodeCheck
from trivium.kernels.program import Batch, Cache, Experts, Linear, Output, Program
from trivium.kernels.torch_executor import TorchExecutor
from trivium.kernels.torch_graph import Computed, CudaCapture
from trivium.kernels.torch_placement import place


def decode(count: int, blocks: int = 1, *, first: int = 0) -> Batch:
    """One token each for ``count`` sequences that hold ``blocks`` full blocks but for one slot, all zeros before."""
    position = blocks * BLOCK - 1
    return Batch(
        token_ids=torch.arange(first, first + count, dtype=INT),
        positions=torch.full((count,), position, dtype=INT),
        sequences=torch.arange(count, dtype=INT),
        block_tables=torch.arange(count * blocks, dtype=INT).view(count, blocks) % BLOCKS,
        output_rows=torch.arange(count, dtype=INT),
    )


def zeros(program: Program, device: str = "cpu") -> tuple[Cache, ...]:
    held = moved(caches(program), device)
    for cache in held:
        cache.keys.zero_()
        if cache.values is not None:
            cache.values.zero_()
    return held


def same(executor: TorchExecutor, program: Program, batch: Batch, held: tuple[Cache, ...]) -> Output:
    """The step's output, held to the reference's over caches like these."""
    copies = tuple(replace(cache, keys=cache.keys.clone(), values=cache.values.clone()) for cache in held)  # type: ignore[union-attr]
    wanted = registry.executor(program, backend="torch").run(batch, moved(copies, "cpu"))
    got = executor.run(batch, held)
    close(got.logits.cpu(), wanted.logits, TOLERANCE)
    return got


def test_each_bucket_is_recorded_once() -> None:
    program = decoder("float32", 0, "plain")
    executor, recorder = captured(program, "cpu", max_sequences=6)
    held = zeros(program)
    for count, blocks, recorded in (
        (3, 1, 1),
        (4, 1, 1),
        (4, 8, 1),
        (4, 9, 2),
        (3, 12, 2),
        (1, 2, 3),
        (2, 1, 4),
        (5, 3, 5),
        (6, 3, 5),
    ):
        before, replayed = recorder.recorded, recorder.replayed
        assert same(executor, program, decode(count, blocks, first=3), held).recorded == (recorded > before)
        assert (recorder.recorded, recorder.replayed) == (recorded, replayed + 1), (count, blocks)


def test_what_is_no_decode_step_is_not_captured() -> None:
    program = decoder("float32", 0, "plain", moe=True)
    executor, recorder = captured(program, "cpu", max_sequences=6)
    held = zeros(program)
    chosen = torch.zeros(3, 3, dtype=INT)
    prompt = steps_of((3, 4), 0)[0]
    for batch in (
        prompt,
        replace(decode(3), output_rows=torch.tensor([0, 2], dtype=INT)),
        replace(decode(3), output_rows=torch.tensor([0, 2, 1], dtype=INT)),
        replace(decode(3), routing=(chosen, chosen)),
        decode(7),
    ):
        same(executor, program, batch, held)
    assert recorder.recorded == recorder.replayed == 0


@pytest.mark.parametrize(("window", "recorded"), [(None, 0), (20, 1)])
def test_one_long_sequence_among_many_short_ones_is_not_captured(window: int | None, recorded: int) -> None:
    """In a bucket all of them would be read like the longest one, but for what no window reaches."""
    program = decoder("float32", 0, "plain", window=window)
    executor, recorder = captured(program, "cpu")
    held = zeros(program)
    long, short = decode(33, 37), decode(33)
    positions = torch.where(torch.arange(33) == 4, long.positions, short.positions).int()
    same(executor, program, replace(long, positions=positions), held)
    assert recorder.recorded == recorded
    same(executor, program, long, held)  # all of them are long
    assert recorder.recorded == 1


def test_routing_leaves_the_device_in_two_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for the device, so not two for every layer; here of layers that choose three experts and two."""
    program = decoder("float32", 0, "plain", moe=True)
    last = max(place for place, op in enumerate(program.operations) if isinstance(op, Experts))
    layer = program.operations[last]
    assert isinstance(layer, Experts) and layer.gate.top_k == 3
    fewer = replace(layer, gate=replace(layer.gate, top_k=2))
    program = replace(program, operations=(*program.operations[:last], fewer, *program.operations[last + 1 :]))
    executor, _ = captured(program, "cpu")
    held = zeros(program)
    wanted = registry.executor(program, backend="torch").run(decode(3), zeros(program))
    executor.run(decode(3), held)
    copies: list[torch.Tensor] = []
    to = torch.Tensor.to

    def told(tensor: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        if "cpu" in arguments:
            copies.append(tensor)
        return to(tensor, *arguments, **more)

    monkeypatch.setattr(torch.Tensor, "to", told)
    got = executor.run(decode(3), held)
    assert len(copies) == 2
    for (experts, weights), (their_experts, their_weights) in zip(routing_of(got), routing_of(wanted), strict=True):
        assert experts.dtype == INT and torch.equal(experts, their_experts)
        close(weights, their_weights, TOLERANCE)


@pytest.mark.parametrize("device", DEVICES)
def test_results_outlive_the_next_replay(device: str) -> None:
    program = decoder("float32", 0, "plain", moe=True)
    executor, _ = captured(program, device)
    held = zeros(program, device)
    first = executor.run(decode(3), held)
    kept = first.logits.clone(), first.hidden.clone(), [experts.clone() for experts, _ in routing_of(first)]
    executor.run(decode(3, first=20), held)
    assert torch.equal(first.logits, kept[0]) and torch.equal(first.hidden, kept[1])
    assert all(torch.equal(a, b) for (a, _), b in zip(routing_of(first), kept[2], strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_recorded_in_inference_mode_is_replayed_outside(device: str) -> None:
    program = decoder("float32", 0, "plain", moe=True)
    executor, recorder = captured(program, device)
    held = zeros(program, device)
    with torch.inference_mode():
        same(executor, program, decode(3), held)
    same(executor, program, decode(3, first=20), held)
    with torch.inference_mode():
        same(executor, program, decode(3), held)
    assert device == "cuda" or (recorder.recorded, recorder.replayed) == (1, 3)


@pytest.mark.parametrize("device", DEVICES)
def test_other_caches_drop_what_was_recorded(device: str) -> None:
    program = decoder("float32", 0, "plain")
    executor, recorder = captured(program, device)
    one, other = zeros(program, device), zeros(program)
    other[0].keys.normal_(generator=torch.Generator().manual_seed(2))
    other = moved(other, device)
    forgotten = []
    for held in (one, one, other, other, tuple(other), one):
        same(executor, program, decode(2, 2), held)
        forgotten.append(recorder.forgotten)
    if device == "cpu":
        assert recorder.recorded == 3
        assert [after - forgotten[0] for after in forgotten] == [0, 0, 1, 1, 1, 2]


@pytest.mark.parametrize("device", DEVICES)
def test_the_bucket_unused_longest_goes(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_graph, "MOST_BUCKETS", 2)
    program = decoder("float32", 0, "plain")
    executor, _ = captured(program, device)
    held = zeros(program, device)
    for count, recorded in ((1, True), (2, True), (1, False), (4, True), (1, False), (2, True)):
        assert same(executor, program, decode(count), held).recorded == recorded


@pytest.mark.parametrize("moe", [False, True])
def test_new_weights_are_seen_once_refreshed(moe: bool) -> None:
    """The executor has copies, as on another device; what was recorded stays."""
    program = decoder("float32", 0, "plain", moe=moe)
    executor, recorder = captured(program, "cpu")
    held = zeros(program)
    old = same(executor, program, decode(2), held)
    for operation in program.operations:
        for matrices in (operation.weight,) if isinstance(operation, Linear) else _matrices(operation):
            matrices.data.mul_(1.25)
    assert torch.equal(executor.run(decode(2), held).logits, old.logits)
    executor.refresh()
    assert not torch.equal(same(executor, program, decode(2), held).logits, old.logits)
    same(executor, program, steps_of((7, 3), 0)[0], held)
    assert recorder.recorded == 1


def test_the_recorder_knows_memory_by_its_address() -> None:
    """As a graph does: weights that were placed anew would not be seen, and so are refused."""
    program = decoder("float32", 0, "plain")
    executor, _ = captured(program, "cpu")
    held = zeros(program)
    same(executor, program, decode(2), held)
    last = executor._placed.program.operations[-1]
    assert isinstance(last, Linear)
    kept = last.weight.data.untyped_storage()
    last.weight.data.set_(last.weight.data.clone())  # type: ignore[call-overload]
    with pytest.raises(AssertionError, match="memory that the capture does not know"):
        executor.run(decode(2), held)
    last.weight.data.set_(kept, 0, last.weight.data.shape)  # type: ignore[call-overload]
    same(executor, program, decode(2), held)


def _matrices(operation: object) -> list[Any]:
    return [expert.up for expert in operation.experts] if isinstance(operation, Experts) else []


def test_a_tensor_named_twice_is_placed_once() -> None:
    program = decoder("float32", 0, "plain", moe=True)
    table = program.operations[0].table  # type: ignore[attr-defined]
    head = program.operations[-1]
    assert isinstance(head, Linear)
    tied = replace(
        program,
        operations=(*program.operations[:-1], replace(head, weight=replace(head.weight, data=table.view(50, 72)))),
    )
    placed = place(tied, torch.device("cpu"))
    assert placed.program.operations[-1].weight.data.data_ptr() == placed.program.operations[0].table.data_ptr()  # type: ignore[attr-defined]
    sources, targets = zip(*placed.pairs, strict=True)
    assert len({tensor.data_ptr() for tensor in targets}) == len(targets)
    assert not {tensor.data_ptr() for tensor in targets} & {tensor.data_ptr() for tensor in sources}


@pytest.mark.parametrize("window", [None, 20])
def test_the_quick_check_passes_what_the_whole_one_does(window: int | None) -> None:
    """One number of a decode step changed to anything near its limits, many times: passed if and only if right."""
    program, draw = decoder("float32", 0, "plain", window=window), random.Random(3)
    held = caches(program)
    quick, whole = DecodeCheck(program, held), registry.executor(program, backend="torch")
    good = steps_of((40, 9, 1), 1, window=window)[1]
    assert quick.passes(good)
    passed = 0
    for _ in range(400):
        name = draw.choice(["token_ids", "positions", "sequences", "output_rows", "block_tables"])
        tensor = getattr(good, name).clone()
        at = tuple(draw.randrange(size) for size in tensor.shape)
        tensor[at] = draw.choice([-2, -1, 0, 1, 2, 8, 15, 16, 39, 47, 48, 49, 50, 95, 96, 599, 600, 2**31 - 1])
        step = replace(good, **{name: tensor})
        right = False
        with contextlib.suppress(ConfigError):
            whole.run(step, held)
            right = True
        plain = torch.equal(step.sequences, good.sequences) and torch.equal(step.output_rows, good.output_rows)
        plain = plain and int(step.block_tables.min()) >= -1 and int(step.block_tables.max()) < 96  # unused ones too
        assert quick.passes(step) == (right and plain), (name, at, int(tensor[at]))
        passed += quick.passes(step)
    assert 50 < passed < 350


def test_the_quick_check_is_no_friend_of_other_shapes() -> None:
    program = decoder("float32", 0, "plain", moe=True)
    quick, good = DecodeCheck(program, caches(program)), decode(3)
    assert quick.passes(good)
    for changes in (
        {"token_ids": good.token_ids.long()},
        {"positions": good.positions[:2]},
        {"block_tables": good.block_tables[:2]},
        {"block_tables": good.block_tables[:, 0]},
        {"routing": ()},
        {name: getattr(good, name)[:0] for name in ("token_ids", "positions", "sequences", "output_rows")},
    ):
        assert not quick.passes(replace(good, **changes))  # type: ignore[arg-type]
    one, other = caches(program)
    mixed = replace(other, keys=other.keys.reshape(192, 2, 8, 20), values=other.values.reshape(192, 2, 8, 20))  # type: ignore[union-attr]
    assert not DecodeCheck(program, (one, mixed)).passes(good)
    with pytest.raises(ConfigError, match="the program has 2, got 1"):
        DecodeCheck(program, (one,))


def test_bad_steps_are_refused_before_anything_is_recorded() -> None:
    program = decoder("float32", 0, "plain")
    executor, recorder = captured(program, "cpu")
    with pytest.raises(ConfigError, match="expected 0 to 95"):
        executor.run(replace(decode(2), block_tables=torch.tensor([[0], [96]], dtype=INT)), caches(program))
    assert recorder.recorded == 0


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    calls: list[Any]

    def replay(self) -> None:
        self.calls.append("replay")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is asked of torch.cuda, whose names are replaced, since no test on a CPU can capture."""
    calls: list[Any] = []

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: Stream) -> None:
            calls.append((self.name, "waits for", other.name))

    current = [Stream("current")]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, current[0] = current[0], stream
        calls.append(f"enter {stream.name}")
        try:
            yield
        finally:
            calls.append(f"leave {stream.name}")
            current[0] = before

    @contextlib.contextmanager
    def graph(made: Graph, *, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, current[0] = current[0], stream
        calls.append(f"enter graph {pool} {stream.name} {capture_error_mode}")
        yield
        calls.append(f"leave graph {pool} {stream.name} {capture_error_mode}")
        current[0] = before  # not where it failed: torch ends the capture first, which then raises

    pools = iter("ABCDEF")
    monkeypatch.setattr(Graph, "calls", calls, raising=False)
    for name, value in {
        "Stream": Stream,
        "graph_pool_handle": lambda: next(pools),
        "device": lambda device: contextlib.nullcontext(),
        "current_stream": lambda: current[0],
        "stream": on,
        "CUDAGraph": Graph,
        "graph": graph,
        "synchronize": lambda: calls.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return calls


def nothing() -> Computed:
    return Computed(logits=torch.zeros(1), hidden=torch.zeros(1), routing=None)


def test_a_cuda_capture_warms_up_beside_and_records_on_one_stream_and_pool(calls: list[Any]) -> None:
    capture = CudaCapture(torch.device("cuda"))
    results = [nothing(), nothing()]

    def compute() -> Computed:
        calls.append("compute")
        return results[calls.count("compute") - 1]

    replay = capture.record(compute)
    warm = [("side", "waits for", "current"), "enter side", "compute", "leave side", ("current", "waits for", "side")]
    kept = ["enter graph A side thread_local", "compute", "leave graph A side thread_local", "leave current"]
    assert calls == ["enter current", *warm, *kept]
    assert replay() is results[1] and calls[-1] == "replay"
    capture.forget()
    calls.clear()
    capture.record(nothing)
    assert "enter graph B side thread_local" in calls


def test_a_failed_capture_leaves_neither_its_pool_nor_its_stream(calls: list[Any]) -> None:
    capture = CudaCapture(torch.device("cuda"))

    def fail() -> Computed:
        if "graph" in str(calls[-1]):
            raise torch.OutOfMemoryError("no memory")
        return nothing()

    pools, kept = [], []
    for compute in (fail, nothing, fail, nothing):
        with contextlib.suppress(torch.OutOfMemoryError):
            kept.append(capture.record(compute))
        pools.append(next(call.split()[2] for call in reversed(calls) if str(call).startswith("enter graph")))
    assert pools == ["A", "B", "B", "C"]
    assert len(kept) == 2 and torch.cuda.current_stream().name == "current"  # type: ignore[attr-defined]


def test_one_capture_at_a_time_in_a_process(calls: list[Any]) -> None:
    """Two models' engines on two threads: beginning a capture empties torch's cache, which another's cannot bear."""
    first, second = CudaCapture(torch.device("cuda")), CudaCapture(torch.device("cuda"))
    other = threading.Thread(target=second.record, args=(nothing,))

    def compute() -> Computed:
        if calls[-1] == "enter graph A side thread_local":
            other.start()
            other.join(0.5)
        return nothing()

    first.record(compute)
    other.join(60)
    entered = [call for call in calls if "graph" in call]
    assert entered == [f"{way} graph {pool} side thread_local" for pool in "AB" for way in ("enter", "leave")]
