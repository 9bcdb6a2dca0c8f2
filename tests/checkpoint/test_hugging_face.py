from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.checkpoint.ranks import Cut, all_ok, even, on_ranks, seeded
from trivium import checkpoint
from trivium.base.errors import CheckpointError
from trivium.checkpoint.folders import FolderWriter


def llama(seed: int, *, tied: bool = True, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    model: LlamaForCausalLM = seeded(seed, lambda: LlamaForCausalLM(config)).to(dtype)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    found = other.state_dict()
    for name, value in one.state_dict().items():
        assert value.dtype == found[name].dtype
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 3000])
def test_what_is_written_reloads_bit_equal_in_transformers(
    tmp_path: Path, tied: bool, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    model = llama(0, tied=tied, dtype=dtype)
    folder = checkpoint.save_hugging_face(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_bytes == 3000)
    assert_equal(model, LlamaForCausalLM.from_pretrained(folder))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("tied", [True, False])
def test_what_transformers_writes_loads_bit_equal(tmp_path: Path, tied: bool) -> None:
    model = llama(0, tied=tied)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    other = llama(1, tied=tied)
    checkpoint.load_hugging_face(other, tmp_path)
    assert_equal(model, other)


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (3, 1), (2, 3)])
def test_sharded_models_write_and_read_their_slices(tmp_path: Path, writers: int, readers: int) -> None:
    def cut(rank: int, size: int, seed: int) -> Cut:
        model = llama(seed, dtype=torch.bfloat16)
        made = Cut(model, rank, even(model, size), None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
        return made

    all_ok(
        on_ranks(
            writers,
            lambda peers: checkpoint.save_hugging_face(
                cut(peers.rank, writers, 0).model, tmp_path / "out", mesh=peers, max_shard_bytes=3000
            ),
        )
    )
    expected = llama(0, dtype=torch.bfloat16)
    assert_equal(expected, LlamaForCausalLM.from_pretrained(tmp_path / "out"))

    def read(peers: Any) -> Cut:
        made = cut(peers.rank, readers, 5)
        checkpoint.load_hugging_face(made.model, tmp_path / "out", mesh=peers)
        assert made.published == 1
        return made

    cuts = all_ok(on_ranks(readers, read))
    for name, parameter in expected.named_parameters():
        whole = torch.cat([made.pieces[name] for made in cuts if name in made.pieces])
        assert torch.equal(whole, parameter.flatten().float()), name


def test_names_translate_by_mapping_and_by_function(tmp_path: Path) -> None:
    model, names = nn.Linear(2, 3), {"weight": "head.w"}
    checkpoint.save_hugging_face(model, tmp_path / "a", names=names, config={"model_type": "toy"})
    assert set(load_file(tmp_path / "a" / "model.safetensors")) == {"head.w", "bias"}
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == {"model_type": "toy"}
    other = nn.Linear(2, 3)
    checkpoint.load_hugging_face(other, tmp_path / "a", lambda name: names.get(name, name))
    assert_equal(model, other)
    with pytest.raises(CheckpointError, match=r"weight and bias would both be written as x"):
        checkpoint.save_hugging_face(model, tmp_path / "b", names=lambda name: "x")


def test_the_decoder_reloads_in_transformers(tmp_path: Path) -> None:
    models = pytest.importorskip("trivium.models.decoder")
    families = pytest.importorskip("trivium.models.families")
    config = pytest.importorskip("trivium.models.config").DecoderConfig(
        vocabulary=32, dim=16, layers=2, heads=4, kv_heads=2, ffn_dim=24, max_positions=16, tied=True
    )
    model = seeded(0, lambda: models.Decoder(config))
    checkpoint.save_hugging_face(
        model, tmp_path / "a", config=families.LLAMA.to_hugging_face(config), names=families.LLAMA.to_theirs
    )
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    other = seeded(1, lambda: models.Decoder(config))
    theirs.save_pretrained(tmp_path / "b")
    checkpoint.load_hugging_face(other, tmp_path / "b", families.LLAMA.names(config))
    assert_equal(model, other)


def test_an_older_export_is_replaced_only_on_request(tmp_path: Path) -> None:
    big, small = nn.Linear(8, 8), nn.Linear(2, 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    checkpoint.save_hugging_face(big, tmp_path / "out", max_shard_bytes=100)
    with pytest.raises(CheckpointError, match=r"holds model-00001-of-00002.safetensors already.*overwrite=True"):
        checkpoint.save_hugging_face(small, tmp_path / "out")
    mapped = load_file(tmp_path / "out" / "model-00001-of-00002.safetensors")
    before = {name: value.clone() for name, value in mapped.items()}
    checkpoint.save_hugging_face(small, tmp_path / "out", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "tokenizer.json"]
    for name, value in before.items():
        assert torch.equal(mapped[name], value)
    other = nn.Linear(2, 2)
    checkpoint.load_hugging_face(other, tmp_path / "out")
    assert_equal(small, other)


def test_an_integer_buffer_and_odd_sizes_stay_aligned(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("flag", torch.tensor([True, False, True]))
            self.weight = nn.Parameter(torch.randn(3))
            self.register_buffer("small", torch.randn(5).half())

    model, other = Odd(), Odd()
    checkpoint.save_hugging_face(model, tmp_path / "a")
    checkpoint.load_hugging_face(other, tmp_path / "a")
    assert_equal(model, other)
    found = load_file(tmp_path / "a" / "model.safetensors")
    assert torch.equal(found["weight"], model.weight)


def write_raw(path: Path, header: Any, payload: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + payload)


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"weight": entry(0, 16, [4, 4])}, "do not hold 64 bytes"),
        ({"weight": entry(0, 16, [-4])}, "not a size"),
        ({"weight": entry(0, 16, [10**30])}, "not a size"),
        ({"weight": entry(0, 16, [1 << 40, 1 << 40])}, "more than 2"),
        ({"weight": entry(8, 24, [4])}, "overlap or leave a hole"),
        ({"a": entry(0, 16, [4]), "b": entry(8, 24, [4])}, "overlap or leave a hole"),
        ({"weight": entry(0, 16, [4], "F7")}, "unknown dtype"),
        ({"weight": entry(0, 1600, [400])}, "truncated or altered"),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":1}', "duplicate key"),
        (b"[" * 100_000, "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
    ],
)
def test_a_crafted_header_is_refused(tmp_path: Path, header: Any, words: str) -> None:
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 16)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load_hugging_face(nn.Linear(2, 2), tmp_path)


def test_a_tensor_far_into_a_file_is_found(tmp_path: Path) -> None:
    big, offset = 1 << 30, 12 << 30
    header = {f"big.{i}": entry(4 * big * i, 4 * big * (i + 1), [big]) for i in range(3)}
    path = tmp_path / "model.safetensors"
    write_raw(path, {**header, "weight": entry(offset, offset + 16, [2, 2])})
    begin = path.stat().st_size + offset
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(torch.arange(4.0).numpy().tobytes())
    model = nn.Linear(2, 2, bias=False)
    checkpoint.load_hugging_face(model, tmp_path, ignore=(r"big\..*",))
    assert model.weight.flatten().tolist() == [0, 1, 2, 3]


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {}, length=1 << 62)
    with pytest.raises(CheckpointError, match=r"a header of \d+ bytes in a file of 10"):
        checkpoint.load_hugging_face(nn.Linear(2, 2), tmp_path)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "x\0.safetensors", 3]
)
def test_an_index_that_leads_out_is_refused(tmp_path: Path, file: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": file}}))
    with pytest.raises(CheckpointError, match="expected the name of a"):
        checkpoint.load_hugging_face(nn.Linear(2, 2), tmp_path)


def test_links_stay_in_the_folder_or_its_cache(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file(dict(model.state_dict()), blobs / "abc")
    (snapshot / "model.safetensors").symlink_to(blobs / "abc")
    other = nn.Linear(2, 2)
    checkpoint.load_hugging_face(other, snapshot)
    assert_equal(model, other)
    out = tmp_path / "folder"
    out.mkdir()
    (out / "model.safetensors").symlink_to(blobs / "abc")
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        checkpoint.load_hugging_face(other, out)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    checkpoint.save_hugging_face(nn.Linear(8, 8), tmp_path / "a", max_shard_bytes=100)
    index = tmp_path / "a" / "model.safetensors.index.json"
    (tmp_path / "a" / "model-00001-of-00002.safetensors").rename(tmp_path / "a" / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors is missing"):
        checkpoint.load_hugging_face(nn.Linear(8, 8), tmp_path / "a")
    body = json.loads(index.read_text())
    body["weight_map"]["weight"] = body["weight_map"]["bias"]
    index.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="which does not hold it"):
        checkpoint.load_hugging_face(nn.Linear(8, 8), tmp_path / "a")


def test_differences_are_a_table(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.zeros(3, 2), "extra": torch.zeros(1), "x.rotary_emb.inv_freq": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    model = nn.Linear(2, 2)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_hugging_face(model, tmp_path)
    text = str(caught.value)
    assert all(word in text for word in ("[2, 2]", "[3, 2] as weight", "bias", "extra"))
    assert "inv_freq" not in text
    before = model.weight.clone()
    checkpoint.load_hugging_face(model, tmp_path, strict=False)
    assert torch.equal(before, model.weight)


def test_eight_bit_weights_are_not_silently_widened(tmp_path: Path) -> None:
    save_file(
        {"weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "bias": torch.zeros(2)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match="float8_e4m3fn and cannot become"):
        checkpoint.load_hugging_face(nn.Linear(2, 2), tmp_path)


def test_tied_here_but_different_there(tmp_path: Path) -> None:
    llama(0, tied=False).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="without tied weights"):
        checkpoint.load_hugging_face(llama(1, tied=True), tmp_path)


def test_ctrl_c_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(writer: FolderWriter, parts: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FolderWriter, "append", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_hugging_face(nn.Linear(4, 4), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
