"""What the engine counts of experts: every step once, whenever it is asked, from whatever thread."""

from __future__ import annotations

import threading

import pytest
import torch

from trivium.inference.blocks import BlockPool
from trivium.inference.scheduler import Scheduler
from trivium.inference.stats import Counters
from trivium.kernels.program import StepRouting

EXPERTS, TOP_K = (5, 7), (2, 3)
SCHEDULER = Scheduler(BlockPool(4, 16), max_sequences=1, step_tokens=2)


def step(tokens: int, rows: int, seed: int) -> StepRouting:
    """Of the padding rows every expert is the last one, which nobody chose."""
    draw = torch.Generator().manual_seed(seed)
    layers = [torch.randint(0, count - 1, (rows, k), generator=draw) for count, k in zip(EXPERTS, TOP_K, strict=True)]
    for layer, count in zip(layers, EXPERTS, strict=True):
        layer[tokens:] = count - 1
    flat = torch.cat([layer.flatten() for layer in layers]).int()
    return StepRouting(experts=flat, weights=torch.ones(len(flat)), top_k=TOP_K, rows=rows, tokens=tokens)


def plainly(steps: list[StepRouting]) -> tuple[tuple[int, ...], ...]:
    counts = [[0] * count for count in EXPERTS]
    for one in steps:
        for layer, (experts, _) in enumerate(one.by_layer()):
            for token in experts.tolist():
                for expert in token:
                    counts[layer][expert] += 1
    return tuple(map(tuple, counts))


def told(counters: Counters) -> tuple[tuple[int, ...], ...]:
    return counters.snapshot(SCHEDULER).tokens_per_expert


@pytest.mark.parametrize("count", [1, 63, 64, 65, 130])
def test_every_step_counts_once(count: int) -> None:
    """Steps of several sizes, padded or not; asking changes nothing, and neither does a step of many tokens."""
    counters = Counters(EXPERTS)
    steps = [step(1 + i % 3, (1, 2, 4)[i % 3], i) for i in range(count)]
    for place, one in enumerate(steps):
        counters.route(one)
        if place % 29 == 0:
            assert told(counters) == told(counters) == plainly(steps[: place + 1])
    assert told(counters) == plainly(steps)
    for more in (step(64, 64, 500), step(1, 1, 501)):
        steps.append(more)
        counters.route(more)
        assert told(counters) == plainly(steps)


def test_without_experts_nothing_is_counted() -> None:
    counters = Counters(EXPERTS)
    counters.route(None)
    assert told(counters) == ((0,) * 5, (0,) * 7)
    unasked = Counters(())
    unasked.route(step(1, 1, 0))
    assert told(unasked) == ()


def test_another_thread_never_sees_a_step_twice_or_half() -> None:
    counters = Counters(EXPERTS)
    seen: list[tuple[int, ...]] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            seen.append(tuple(sum(layer) for layer in told(counters)))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for i in range(2000):
            counters.route(step(1, 1, i))
    finally:
        ended.set()
        thread.join()
    assert seen == sorted(seen) and all(first // 2 == second // 3 for first, second in seen)
    assert tuple(sum(layer) for layer in told(counters)) == (4000, 6000)
