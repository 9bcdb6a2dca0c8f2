"""Models whose layers all have a window: the cache holds the window, whatever the length; the answers stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.reference import reference, reference_logits, relative_error, save
from tests.inference.zoo import CASES
from trivium.inference import LLM, SamplingParams
from trivium.inference.cache import block_bytes
from trivium.kernels import registry
from trivium.plan.serving import plan_serving

SIZES: dict[str, Any] = {"max_sequences": 3, "step_tokens": 16}
LENGTHS = (513, 129, 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return reference(*CASES["mistral"])


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("windows") / "mistral")


def few_blocks(llm: LLM, count: int) -> int:
    """Memory for the weights and ``count`` blocks."""
    return llm.weight_bytes + count * block_bytes(llm.model.program.caches, "float32", 16)


@pytest.mark.parametrize("backend", registry.available())
def test_a_sequence_much_longer_than_the_cache(folder: Path, model: Any, backend: str) -> None:
    whole = LLM(folder, backend=backend, threads=1, prefix_cache=False, **SIZES)
    small = LLM(folder, backend=backend, threads=1, memory=few_blocks(whole, 8), **SIZES)
    assert (small.stats.blocks_total, small.max_positions) == (8, whole.max_positions)
    assert whole.max_positions == 640
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(97, (length,), generator=draw).tolist() for length in LENGTHS]
    greedy = SamplingParams(max_tokens=30, temperature=0.0)
    expected = whole.generate(prompts, greedy)
    found = small.generate(prompts, greedy)
    assert [out.token_ids for out in found] == [out.token_ids for out in expected]
    exact = reference_logits(model, prompts[0])
    assert relative_error(small.logits(prompts[0]), exact) < 2e-5
    (again,) = small.generate(prompts[0], greedy)
    assert again.token_ids == expected[0].token_ids
    for llm in (small, whole):
        llm.engine.check()
        assert llm.stats.blocks_free == llm.stats.blocks_total
    if whole.engine.executor.batch_invariant:
        assert torch.equal(small.logits(prompts[1]), whole.logits(prompts[1]))


def test_the_plan_counts_what_is_held(folder: Path) -> None:
    llm = LLM(folder, backend="torch")
    memory = few_blocks(llm, 60)
    plan = plan_serving(folder, memory_bytes=memory, backend="torch")
    bound = LLM(folder, backend="torch", memory=memory)
    assert (plan.window, plan.caches) == (50, {"windowed": 2})
    assert plan.cache_tokens == bound.stats.blocks_total * 16 == 960
    assert plan.max_positions == bound.max_positions == 640
    held = bound.engine._scheduler.most_held(640)
    assert held == 20 and plan.fits[-1] == (640, 60 // held)
    roomy = plan_serving(folder, memory_bytes=few_blocks(llm, 10**5), backend="torch")
    assert roomy.cache_tokens == llm.stats.blocks_total * 16 == 64 * held * 16


def test_one_layer_that_reads_everything_keeps_everything(tmp_path: Path) -> None:
    save(reference(*CASES["gemma3"]), tmp_path)
    plan = plan_serving(tmp_path, memory_bytes=10**7)
    assert plan.window is None and plan.caches == {"windowed": 2, "paged": 1}
    assert plan.fits[-1][1] == plan.cache_tokens // 640
