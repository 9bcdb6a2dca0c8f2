"""The decoder that trains and the program that serves: the same probabilities, the same experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import trivium as tv
from tests.inference.reference import Runner, relative_error
from tests.kernels.steps import routing_of
from trivium.base import config as configs
from trivium.base.errors import CheckpointError
from trivium.cli.main import run
from trivium.inference import weights
from trivium.models import Decoder, DecoderConfig, build
from trivium.models.decoder import Record
from trivium.models.moe_config import MoEConfig
from trivium.moe import GateConfig

SHAPE: dict[str, Any] = {
    "vocabulary": 61,
    "dim": 48,
    "layers": 4,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 14,
    "ffn_dim": 40,
    "max_positions": 128,
    "init_std": 0.2,
}
GROUPED = GateConfig(score="sigmoid", num_groups=4, top_groups=2, scale=1.7, bias_rate=0.1)
SHAPES: dict[str, DecoderConfig] = {
    "dense": DecoderConfig(**SHAPE),
    "tied": DecoderConfig(**SHAPE, tied=True),
    "pyramid": DecoderConfig(**SHAPE, moe=MoEConfig(experts=(4, 6), top_k=1)),
    "top two": DecoderConfig(**SHAPE, moe=MoEConfig(experts=5, top_k=2, layers=(0, 1, 3), ffn_dim=20)),
    "residual, biased": DecoderConfig(**SHAPE, moe=MoEConfig(experts=4, expert="gelu", residual="add")),
    "mixed": DecoderConfig(**SHAPE, moe=MoEConfig(experts=4, top_k=2, residual="mix")),
    "shared": DecoderConfig(**SHAPE, moe=MoEConfig(experts=8, top_k=3, shared=2, gate=GROUPED)),
}


def saved(name: str, folder: Path) -> Decoder:
    """A checkpoint with everything away from its first value, and the model it was made from."""
    model = build(SHAPES[name], seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    tv.checkpoint.save(folder, model=model, extra={"model": configs.to_dict(SHAPES[name])})
    return model


@pytest.mark.parametrize("name", list(SHAPES))
def test_trainer_and_server_agree(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "step-1")
    tokens = torch.randint(0, 61, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    record = Record()
    with torch.no_grad():
        expected = model(torch.tensor([tokens]), record=record)[0]
    loaded = weights.load(tmp_path)
    assert loaded.max_positions == 128 and loaded.architecture.family == "trivium"
    runner = Runner(loaded, positions=128)
    out = runner.step(tokens, 0, list(range(len(tokens))))
    assert relative_error(out.logits, expected) < 2e-5
    theirs, ours = expected.log_softmax(-1), out.logits.log_softmax(-1)
    assert float((ours - theirs).abs().max()) < 1e-4
    layers = [number for number, experts in enumerate(SHAPES[name].num_experts) if experts]
    assert len(routing_of(out)) == len(layers) == len(record.aux)
    for (experts, weight), number in zip(routing_of(out), layers, strict=True):
        routing = record.aux[number].routing
        assert torch.equal(experts.long(), routing.experts_TK)
        torch.testing.assert_close(weight, routing.weights_TK, rtol=1e-4, atol=1e-5)


def test_replayed_routing(tmp_path: Path) -> None:
    """The trainer's choice, handed to the server, is taken; another one changes the answer."""
    model = saved("top two", tmp_path / "step-1")
    tokens = list(range(50))
    runner = Runner(weights.load(tmp_path), positions=128)
    free = runner.step(tokens, 0, tokens)
    choice = tuple(experts for experts, _ in routing_of(free))
    assert torch.equal(runner.step(tokens, 0, tokens, routing=choice).logits, free.logits)
    other = tuple((experts + 1) % 5 for experts in choice)
    forced = runner.step(tokens, 0, tokens, routing=other)
    assert all(torch.equal(experts, asked) for (experts, _), asked in zip(routing_of(forced), other, strict=True))
    assert relative_error(forced.logits, free.logits) > 1e-2
    record = Record()
    with torch.no_grad():
        model(torch.tensor([tokens]), record=record)
        routings = {
            number: tv.moe.Routing(
                experts_TK=asked.long(), weights_TK=aux.routing.weights_TK, kept_TK=aux.routing.kept_TK
            )
            for (number, aux), asked in zip(sorted(record.aux.items()), other, strict=True)
        }
        expected = model(torch.tensor([tokens]), routings=routings)[0]
    assert relative_error(forced.logits, expected) < 2e-5


def test_written_packed(tmp_path: Path) -> None:
    saved("shared", tmp_path / "run" / "step-1")
    assert run(["convert", str(tmp_path / "run"), str(tmp_path / "packed"), "--quantize", "int8"]) == 0
    stored, at_load = weights.load(tmp_path / "packed"), weights.load(tmp_path / "run", quantize="int8")
    tokens = list(range(40))
    assert stored.weight_bytes == at_load.weight_bytes
    assert torch.equal(Runner(stored, 128).logits(tokens), Runner(at_load, 128).logits(tokens))


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    tv.checkpoint.save(tmp_path / "c", model=torch.nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="does not say what model it holds"):
        weights.load(tmp_path / "c")
    tv.checkpoint.save(tmp_path / "d", model=torch.nn.Linear(2, 2), extra={"model": configs.to_dict(SHAPES["dense"])})
    with pytest.raises(CheckpointError, match=r"missing:\n  embed\.weight \[61, 48\]"):
        weights.load(tmp_path / "d")
