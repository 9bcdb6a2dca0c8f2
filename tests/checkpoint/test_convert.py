from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.checkpoint.ranks import Cut, all_ok, even, on_ranks, seeded
from tests.checkpoint.test_damage import flip
from trivium import checkpoint
from trivium.base import config
from trivium.base.errors import CheckpointError
from trivium.cli.main import run
from trivium.models import Decoder, DecoderConfig, MoEConfig
from trivium.train.data import Tokenizer

SHAPE = DecoderConfig(
    vocabulary=32, dim=16, layers=2, heads=4, kv_heads=2, head_dim=4, ffn_dim=24, max_positions=16, tied=True
)


def decoder(seed: int, dtype: torch.dtype = torch.float32, shape: DecoderConfig = SHAPE) -> nn.Module:
    model: nn.Module = seeded(seed, lambda: Decoder(shape)).to(dtype)
    return model


def saved(folder: Path, extra: Any) -> Path:
    """A checkpoint of two ranks with fp32 masters of a bf16 model."""

    def save(peers: Any) -> Path:
        model = decoder(0, torch.bfloat16)
        cut = Cut(model, peers.rank, even(model, 2), torch.optim.AdamW)
        cut.step(1)
        return checkpoint.save(folder, model=model, optimizer=cut.optimizer, extra=extra, mesh=peers)

    found = all_ok(on_ranks(2, save))[0]
    assert isinstance(found, Path)
    return found


def test_out_to_transformers_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = tmp_path / "run"
    saved(run_folder / "step-1", {"model": config.to_dict(SHAPE)})
    (run_folder / "tokenizer.json").write_text("{}")
    arguments = ["convert", str(run_folder), str(tmp_path / "hf"), "--max-shard", "3kB", "--json"]
    assert run(arguments) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["source"] == str(run_folder / "step-1")
    assert told["parameters"] == sum(parameter.numel() for parameter in decoder(0).parameters())
    assert "tokenizer.json" in told["files"] and "model.safetensors.index.json" in told["files"]
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    expected = decoder(1, torch.bfloat16)
    checkpoint.load(run_folder / "step-1", model=expected)
    assert torch.equal(theirs.model.embed_tokens.weight, expected.get_parameter("embed.weight"))
    assert run(["convert", str(tmp_path / "hf"), str(tmp_path / "again" / "step-0")]) == 0
    other = decoder(2, torch.bfloat16)
    extra = checkpoint.load(tmp_path / "again" / "step-0", model=other)
    assert config.build(DecoderConfig, extra["model"]) == SHAPE
    for name, value in expected.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_a_checkpoint_of_an_unknown_model_needs_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "c", None)
    assert run(["convert", str(tmp_path / "c"), str(tmp_path / "hf")]) == 5
    assert "--plain" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()
    assert run(["convert", str(tmp_path / "c"), str(tmp_path / "hf"), "--plain"]) == 0
    model = decoder(3, torch.bfloat16)
    checkpoint.load_hugging_face(model, tmp_path / "hf")
    assert not (tmp_path / "hf" / "config.json").exists()


def test_a_decoder_with_experts_needs_plain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = replace(SHAPE, moe=MoEConfig(experts=2, layers=(0,)))
    source = tmp_path / "experts"
    checkpoint.save(source, model=decoder(0, shape=shape), extra={"model": config.to_dict(shape)})
    assert run(["convert", str(source), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "holds a decoder with experts" in told and "--plain" in told and not (tmp_path / "out").exists()
    assert run(["convert", str(source), str(tmp_path / "out"), "--plain"]) == 0


def test_damage_is_found_and_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "c", {"model": config.to_dict(SHAPE)})
    told = json.loads((path / "rank-00001.json").read_text())["tensors"]["parameters/norm.weight"]
    flip(path / "rank-00001.safetensors", told["offset"])
    assert run(["convert", str(path), str(tmp_path / "hf")]) == 5
    assert "norm.weight is damaged" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_sources_that_are_neither(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for name, words in (("pickles", "unpickling"), ("empty", "config.json is missing"), ("nowhere", "is missing")):
        assert run(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 5
        assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_may_not_collide(tmp_path: Path) -> None:
    from trivium.checkpoint.convert import from_hugging_face, to_hugging_face

    path = checkpoint.save(tmp_path / "c", model=nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="names must not collide"):
        to_hugging_face(path, tmp_path / "hf", names=lambda name: "x")
    to_hugging_face(path, tmp_path / "hf")
    with pytest.raises(CheckpointError, match="would both be called x"):
        from_hugging_face(tmp_path / "hf", tmp_path / "d", names=lambda name: "x")


def test_the_tokenizer_s_ids_are_in_config_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    using = Tokenizer.train(["one two three " * 9], vocabulary=300)
    saved(tmp_path / "run" / "step-1", {"model": config.to_dict(SHAPE)})
    using.save(tmp_path / "run")
    assert run(["convert", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    told = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (told["eos_token_id"], told["pad_token_id"]) == (using.end_id, using.pad_id)
    (tmp_path / "run" / "tokenizer.json").write_text("{}")
    assert run(["convert", str(tmp_path / "run"), str(tmp_path / "other")]) == 0
    assert "config.json names no token that ends a text" in capsys.readouterr().err
