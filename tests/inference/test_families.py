"""Every family against transformers, with random weights that its save_pretrained wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.inference.reference import Runner, reference, reference_logits, relative_error, save
from tests.inference.zoo import CASES, FUSED
from tests.kernels.captures import Recorder
from trivium.inference import LLM, SamplingParams, weights
from trivium.kernels import registry
from trivium.kernels.torch_executor import TorchExecutor
from trivium.models.families import KNOWN

PROMPTS = (1, 7, 129, 513)
NEW = 64
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=list(CASES))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, Runner], Path]:
    """transformers' model and ours on every backend, loaded from what it saved; every other one in several files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    name = str(request.param)
    model = reference(*CASES[name])
    folder = tmp_path_factory.mktemp(name)
    number = list(CASES).index(name)
    options = {"max_shard_size": "60KB"} if number % 2 else {}
    if name in FUSED:
        options["save_original_format"] = False
    save(model, folder, **options)
    assert (folder / "model.safetensors.index.json").exists() == bool(number % 2)
    runners = {
        backend: Runner(weights.load(folder, layout=registry.layout(backend)), backend=backend)
        for backend in registry.available()
    }
    return model, runners, folder


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 97, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_every_family_has_a_case() -> None:
    import transformers

    tested = {getattr(transformers, f"{name}Config").model_type for name, _ in CASES.values()}
    assert tested == {family.name for family in KNOWN} - {"trivium"}


def test_logits_at_every_position(pair: tuple[Any, dict[str, Runner], Path]) -> None:
    model, runners, _ = pair
    tokens = random_tokens(300)
    expected = reference_logits(model, tokens)
    assert float(expected.std()) > 0.05 * float(expected.abs().max())
    for runner in runners.values():
        whole, chunked = runner.logits(tokens), runner.logits(tokens, chunk=67)
        assert relative_error(whole, expected) < TOLERANCE
        assert relative_error(chunked, expected) < TOLERANCE
        assert torch.equal(whole, chunked) or not runner.executor.batch_invariant


def test_captured_decode_steps(pair: tuple[Any, dict[str, Runner], Path]) -> None:
    """Token by token, each step replayed: what CUDA runs, on the CPU."""
    model, runners, _ = pair
    recorder, runner = Recorder(), Runner(runners["torch"].loaded, positions=112)
    runner.executor = TorchExecutor(runner.loaded.program, capture=recorder)
    tokens = random_tokens(60)
    assert relative_error(runner.logits(tokens, chunk=1), reference_logits(model, tokens)) < TOLERANCE
    assert (recorder.recorded, recorder.replayed) == (1, 60)


def test_greedy_tokens(pair: tuple[Any, dict[str, Runner], Path]) -> None:
    """The reference, given our tokens, must choose each of them itself: then its own greedy text is the same."""
    model, runners, _ = pair
    runner = next(iter(runners.values()))
    prompts = [random_tokens(count, seed=count) for count in PROMPTS]
    for prompt, found in zip(prompts, runner.greedy_batch(prompts, NEW), strict=True):
        chosen = reference_logits(model, prompt + found)[len(prompt) - 1 : -1].argmax(1).tolist()
        assert found == chosen
        assert len(found) == NEW


def test_one_answer_per_request_whatever_runs_beside_it(pair: tuple[Any, dict[str, Runner], Path]) -> None:
    """To the bit, for caps, sinks, slopes, windows, latents and gates of every family alike."""
    _, runners, _ = pair
    prompts = [random_tokens(count, seed=count) for count in (1, 7, 35, 129)]
    if "native" not in runners:
        pytest.skip("needs the native kernels")
    assert runners["native"].executor.batch_invariant
    together = runners["native"].greedy_logits(prompts, 6)
    for row, prompt in enumerate(prompts):
        assert torch.equal(runners["native"].greedy_logits([prompt], 6)[:, 0], together[:, row])


def test_greedy_tokens_through_the_engine(pair: tuple[Any, dict[str, Runner], Path]) -> None:
    """As a user asks: the folder, a prompt, nothing else."""
    model, _, folder = pair
    prompt = random_tokens(9)
    llm = LLM(folder, threads=1, max_sequences=2)
    (out,) = llm.generate(prompt, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))
    assert out.token_ids == reference_logits(model, prompt + out.token_ids)[len(prompt) - 1 : -1].argmax(1).tolist()
    assert len(out.token_ids) == 8
    llm.engine.check()


def test_greedy_as_generate_does(tmp_path: Path) -> None:
    model = reference(*CASES["llama"])
    runner = Runner(weights.load(save(model, tmp_path)))
    prompt = random_tokens(7)
    out = model.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert runner.greedy(prompt, NEW) == out[0, 7:].tolist()


def test_a_sequence_beyond_the_trained_length(tmp_path: Path) -> None:
    """longrope: asked for longer sequences, all positions take the long factors, as transformers' do there."""
    name, config = CASES["phi3-longrope"]
    config = {**config, "original_max_position_embeddings": 100}
    model = reference(name, config)
    save(model, tmp_path)
    short, long = weights.load(tmp_path), weights.load(tmp_path, max_positions=300)
    assert (short.max_positions, long.max_positions) == (100, 300)
    for loaded, count in ((short, 100), (long, 280)):
        tokens = random_tokens(count)
        assert relative_error(Runner(loaded).logits(tokens), reference_logits(model, tokens)) < TOLERANCE
