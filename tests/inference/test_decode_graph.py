"""The engine over captured decode steps: the tokens of the one without, prompts uncaptured, new weights seen."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from tests.inference.test_llm import GREEDY, PROMPT, decoder, done
from tests.kernels.captures import DEVICES, Recorder
from trivium.base.errors import CapacityError, CheckpointError
from trivium.inference import LLM, SamplingParams
from trivium.inference import llm as llm_module
from trivium.inference.arguments import device_of
from trivium.inference.cache import block_bytes
from trivium.inference.speculate import StepCost
from trivium.kernels import registry
from trivium.kernels.torch_executor import TorchExecutor

PROMPTS = [PROMPT, [5], [(7 * i) % 96 for i in range(23)], PROMPT[:3], [9, 8, 9, 8, 9, 8]]
ASKED = SamplingParams(max_tokens=20, temperature=0)


def recorded(model: torch.nn.Module, device: str = "cpu", **options: Any) -> tuple[LLM, Recorder]:
    """An LLM whose decode steps are captured: for real on CUDA, where the recorder counts nothing."""
    recorder = Recorder()
    llm = LLM(model, backend="torch", device=device, **options)
    if device == "cpu":
        llm.engine.executor = TorchExecutor(
            llm.model.program, max_sequences=llm.engine.config.max_sequences, capture=recorder
        )
    assert llm.engine.executor.name == f"torch {device}, decode steps captured"
    return llm, recorder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moe", [False, True])
def test_greedy_tokens_are_the_same(moe: bool, device: str) -> None:
    model = decoder(moe=moe)
    plain = LLM(model, backend="torch", device="cpu")
    llm, recorder = recorded(model, device)
    wanted = plain.generate(PROMPTS, ASKED)
    assert [out.token_ids for out in llm.generate(PROMPTS, ASKED)] == [out.token_ids for out in wanted]
    if device == "cpu":  # five answers in the bucket of eight, the prompts in one step before
        assert (recorder.recorded, recorder.replayed) == (1, ASKED.max_tokens - 1)  # type: ignore[operator]
    counted = recorder.recorded
    assert [llm.generate(prompt, ASKED)[0].token_ids for prompt in PROMPTS] == [out.token_ids for out in wanted]
    assert recorder.recorded <= counted + 1
    done(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_prompts_in_chunks_preempted_and_drawn_ones(device: str) -> None:
    """Steps that mix prompts and answers, a cache too small for all, draws, log-probabilities and guesses."""
    model = decoder()
    sizes: dict[str, Any] = {"step_tokens": 9, "max_sequences": 6, "speculate": True}
    plain = LLM(model, backend="torch", device="cpu", **sizes)
    each = block_bytes(plain.model.program.caches, "float32", 16)
    llm, recorder = recorded(model, device, memory=plain.weight_bytes + 5 * each, **sizes)
    for params in (ASKED, SamplingParams(max_tokens=20, temperature=0.8, seed=3, top_k=20, logprobs=2, n=2)):
        wanted = plain.generate(PROMPTS, params)
        got = llm.generate(PROMPTS, params)
        for mine, theirs in zip(got, wanted, strict=True):
            assert [choice.token_ids for choice in mine.choices] == [choice.token_ids for choice in theirs.choices]
    assert llm.stats.preemptions > 0
    assert device == "cuda" or 0 < recorder.recorded <= 4 < recorder.replayed  # 1, 2, 4 and 6 sequences
    done(llm)


@pytest.mark.parametrize("device", DEVICES)
def test_sizes_captured_on_one_thread_and_then_another(device: str) -> None:
    """What was captured before the engine moved is replayed on its thread, and other sizes are captured there."""
    model = decoder(moe=True)
    wanted = [out.token_ids for out in LLM(model, backend="torch", device="cpu").generate(PROMPTS, ASKED)]
    llm, recorder = recorded(model, device)
    assert llm.generate(PROMPTS[0], ASKED)[0].token_ids == wanted[0]
    before = recorder.recorded
    thread = llm.serve()
    try:
        assert [out.token_ids for out in llm.generate(PROMPTS, ASKED)] == wanted
        assert [llm.generate(prompt, ASKED)[0].token_ids for prompt in PROMPTS] == wanted
    finally:
        thread.close()
    assert device == "cuda" or before == 1 < recorder.recorded


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("moe", [False, True])
def test_new_weights_reach_what_was_recorded(moe: bool, device: str) -> None:
    before, after = decoder(0, moe), decoder(1, moe)
    llm, recorder = recorded(before, device)
    old = llm.generate(PROMPT, GREEDY)[0].token_ids
    counted = recorder.recorded
    assert llm.load_weights(after.state_dict().items()) > 0
    wanted = LLM(after, backend="torch", device="cpu").generate(PROMPT, GREEDY)[0].token_ids
    assert llm.generate(PROMPT, GREEDY)[0].token_ids == wanted != old
    assert recorder.recorded == counted
    done(llm)


def test_collected_rows_and_routing_come_from_captured_steps_too() -> None:
    model = decoder(moe=True)
    plain, (llm, recorder) = LLM(model, backend="torch", device="cpu"), recorded(model, step_tokens=2, max_sequences=1)
    prompt = PROMPT[:-1]  # the last of its pieces has one token
    for wanted, got in zip(plain.routing(prompt), llm.routing(prompt), strict=True):
        assert torch.equal(got[0], wanted[0]) and torch.allclose(got[1], wanted[1], atol=1e-5)
    assert recorder.replayed == 1
    rows = llm.logits(prompt)
    assert recorder.replayed == 2
    assert float((rows - plain.logits(prompt)).abs().max()) < 2e-5 * float(rows.abs().max())
    done(llm)


def test_weights_are_on_their_device_before_the_cache_is_sized(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free there then is what the weights left; and decode steps of all sequences that may run are captured."""
    asked: list[tuple[str, int]] = []

    def told(name: str) -> Any:
        real = getattr(llm_module, name)

        def call(*arguments: Any, **more: Any) -> Any:
            asked.append((name, more["max_sequences"]))
            return real(*arguments, **more)

        return call

    for name in ("executor", "cache_blocks"):
        monkeypatch.setattr(llm_module, name, told(name))
    LLM(decoder(), device="cpu", max_sequences=5)
    assert asked == [("executor", 5), ("cache_blocks", 5)]
    asked.clear()
    with pytest.raises(CapacityError, match="one block"):  # what is given needs nothing on the device to be told
        LLM(decoder(), device="cpu", max_sequences=5, memory="1KiB")
    assert asked == [("cache_blocks", 5)]
    LLM(decoder(), device="cpu", max_sequences=5, memory="8MiB")
    assert asked[1:] == [("cache_blocks", 5), ("executor", 5)]
    program = LLM(decoder(), device="cpu", backend="torch").model.program
    monkeypatch.setattr(registry, "TorchExecutor", lambda program, **more: more)
    assert registry.executor(program, backend="torch", max_sequences=7) == {"device": "cpu", "max_sequences": 7}


@pytest.mark.parametrize("device", DEVICES)
def test_what_was_captured_goes_with_its_llm(device: str) -> None:
    """At once, not when the collector comes by: weights, cache and graphs are the device's memory."""
    llm, _ = recorded(decoder(moe=True), device)
    llm.generate(PROMPT, GREEDY)
    executor = llm.engine.executor
    assert isinstance(executor, TorchExecutor)
    held = [weakref.ref(executor), weakref.ref(executor._placed), weakref.ref(executor._graphs)]
    gc.collect()
    gc.disable()
    try:
        del llm, executor
        assert [reference() for reference in held] == [None, None, None]
    finally:
        gc.enable()


def test_a_gpu_is_named_by_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread begins on the first GPU, whichever the caller's is."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    named = {device: device_of(device) for device in ("auto", "cuda", "cuda:1", "cpu")}
    assert named == {"auto": "cuda:3", "cuda": "cuda:3", "cuda:1": "cuda:1", "cpu": "cpu"}


def test_the_time_of_a_capture_is_no_plain_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses are weighed against what a plain step will take, and a size's first step takes long."""
    llm, recorder = recorded(decoder(), speculate=True)
    observed: list[int] = []
    observe = StepCost.observe

    def told(cost: StepCost, seconds: float, *, guessing: bool) -> None:
        observed.append(recorder.recorded)
        observe(cost, seconds, guessing=guessing)

    monkeypatch.setattr(StepCost, "observe", told)
    llm.generate(
        [PROMPT, [5]], SamplingParams(max_tokens=2, temperature=0)
    )  # the prompts' step, and a first one of two
    assert (recorder.recorded, observed) == (1, [])
    llm.generate([PROMPT, [5]], SamplingParams(max_tokens=2, temperature=0))
    assert (recorder.recorded, observed) == (1, [1])
    done(llm)


def test_weights_replaced_before_an_error_are_seen() -> None:
    """The error says so; on another device the executor has copies."""
    llm, _ = recorded(decoder(0))
    before, new = llm.logits(PROMPT), decoder(1).state_dict()
    name = next(name for name in new if "embed" in name)
    with pytest.raises(CheckpointError, match="'nothing' is not one of"):
        llm.load_weights([(name, new[name]), ("nothing", torch.zeros(1))])
    assert not torch.equal(llm.logits(PROMPT), before)
    done(llm)
