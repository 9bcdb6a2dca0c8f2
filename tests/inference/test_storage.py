"""Published ways to store quantised weights, each against a reference that decodes number by number."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.inference.reference import Runner, reference, reference_logits, relative_error, save
from tests.inference.test_families import TOLERANCE, random_tokens
from tests.inference.zoo import CASES
from trivium.base.errors import CheckpointError, ConfigError
from trivium.inference import weights
from trivium.inference.quantized import write_quantized
from trivium.kernels.matrix import Matrix, unpack

Tensors = dict[str, torch.Tensor]
LLAMA = {**CASES["llama"][1], "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
GROUP = 32


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], quantization: dict[str, Any]) -> None:
    """Change a saved model's tensors and tell so in its config."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


def projections(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def word(halves: list[int]) -> int:
    """Eight half bytes, lowest first, as a signed 32-bit number."""
    number = sum(half << (4 * place) for place, half in enumerate(halves))
    return number - (1 << 32) if number >= 1 << 31 else number


class Int4:
    """Random 4-bit weights [N, K] in groups: stored as GPTQ or AWQ does, and what they stand for."""

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        seed: int,
        shuffled: bool = False,
        symmetric: bool = False,
        group: int = GROUP,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        groups = -(-columns // group)
        self.q = torch.randint(0, 16, (rows, columns), generator=generator)
        self.zeros = torch.randint(1, 16, (rows, groups), generator=generator)
        if symmetric:
            self.zeros[:] = 8
        self.scales = (torch.rand(rows, groups, generator=generator) * 0.02 + 0.02).half()
        self.group_of = torch.arange(columns) // group
        if shuffled:
            self.group_of = self.group_of[torch.randperm(columns, generator=generator)]

    def meaning(self) -> torch.Tensor:
        rows, columns = self.q.shape
        out = torch.empty(rows, columns)
        for n in range(rows):
            for k in range(columns):
                g = int(self.group_of[k])
                out[n, k] = (int(self.q[n, k]) - int(self.zeros[n, g])) * float(self.scales[n, g])
        return out

    def gptq(self, *, second: bool) -> Tensors:
        rows, columns = self.q.shape
        off = 0 if second else 1
        words = [[word(self.q[n, 8 * r : 8 * r + 8].tolist()) for n in range(rows)] for r in range(columns // 8)]
        zeros = [
            [word([int(z) - off for z in self.zeros[8 * c : 8 * c + 8, g]]) for c in range(rows // 8)]
            for g in range(self.zeros.shape[1])
        ]
        return {
            "qweight": torch.tensor(words, dtype=torch.int32),
            "qzeros": torch.tensor(zeros, dtype=torch.int32),
            "scales": self.scales.t().contiguous(),
            "g_idx": self.group_of.int(),
        }

    def awq(self) -> Tensors:
        def words(matrix: torch.Tensor) -> torch.Tensor:  # [N, X] → [X, N / 8]
            order = [0, 2, 4, 6, 1, 3, 5, 7]
            rows = [
                [word([int(matrix[8 * c + place, x]) for place in order]) for c in range(matrix.shape[0] // 8)]
                for x in range(matrix.shape[1])
            ]
            return torch.tensor(rows, dtype=torch.int32)

        return {"qweight": words(self.q), "qzeros": words(self.zeros), "scales": self.scales.t().contiguous()}


def int4_pair(folder: Path, kind: str) -> Any:
    """A llama folder in this kind of storage, and transformers' model with what the numbers stand for."""
    model = reference("Llama", LLAMA)
    save(model, folder)
    state = model.state_dict()

    def change(tensors: Tensors) -> Tensors:
        for seed, name in enumerate(projections(tensors)):
            made = Int4(*tensors[name].shape, seed=seed, shuffled=kind == "act-order", symmetric=kind == "symmetric")
            parts = made.awq() if kind == "awq" else made.gptq(second=kind == "second")
            del tensors[name]
            tensors.update({name.replace("weight", part): tensor for part, tensor in parts.items()})
            state[name].copy_(made.meaning())
        return tensors

    told: dict[str, Any] = {"quant_method": "awq" if kind == "awq" else "gptq", "bits": 4, "group_size": GROUP}
    told |= {"version": "gemm"} if kind == "awq" else {}
    told |= {"checkpoint_format": "gptq_v2"} if kind == "second" else {}
    rewrite(folder, change, told)
    return model


@pytest.mark.parametrize("kind", ["gptq", "second", "act-order", "symmetric", "awq"])
def test_int4_checkpoints(kind: str, tmp_path: Path) -> None:
    model = int4_pair(tmp_path, kind)
    tokens = random_tokens(60)
    exact = Runner(weights.load(tmp_path, dtype="float32"))
    assert relative_error(exact.logits(tokens), reference_logits(model, tokens)) < TOLERANCE
    loaded = weights.load(tmp_path)
    q = next(slot.holds for slot in loaded.slots if slot.name == "layers.0.attention.qkv.weight")
    kept = next(slot.holds for slot in exact.loaded.slots if slot.name == "layers.0.attention.qkv.weight")
    assert isinstance(q, Matrix) and isinstance(kept, Matrix)
    if kind == "act-order":
        assert q.format == "float32"  # the embedding's
    else:
        assert (q.format, q.group, q.zeros is None) == ("int4", GROUP, kind == "symmetric")
        assert torch.equal(unpack(q), kept.data)
        assert relative_error(Runner(loaded).logits(tokens), reference_logits(model, tokens)) < 0.1


def fp8_change(tensors: Tensors, state: Tensors, block: tuple[int, int]) -> Tensors:
    """Every projection in e4m3 with a scale per block; the state gets what is stored, number by number."""
    for name in projections(tensors):
        weight = tensors[name]
        rows, columns = weight.shape
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        stored = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
        for r in range(scales.shape[0]):
            for c in range(scales.shape[1]):
                at = (slice(r * block[0], (r + 1) * block[0]), slice(c * block[1], (c + 1) * block[1]))
                scales[r, c] = weight[at].abs().max() / 448
                stored[at] = (weight[at] / scales[r, c]).to(torch.float8_e4m3fn)
        tensors[name], tensors[name + "_scale_inv"] = stored, scales
        meaning = torch.tensor(
            [
                [float(stored[n, k]) * float(scales[n // block[0], k // block[1]]) for k in range(columns)]
                for n in range(rows)
            ]
        )
        assign(state, name, meaning)
    return tensors


def assign(state: Tensors, name: str, value: torch.Tensor) -> None:
    """Into transformers' own layout, in which a layer's experts are one tensor."""
    if name in state:
        state[name].copy_(value)
        return
    at, _, rest = name.partition(".experts.")
    number, projection, _ = rest.split(".")
    if projection == "down_proj":
        state[f"{at}.experts.down_proj"][int(number)].copy_(value)
        return
    both = state[f"{at}.experts.gate_up_proj"][int(number)]
    half = both.shape[0] // 2
    (both[:half] if projection == "gate_proj" else both[half:]).copy_(value)


def test_fp8_blocks(tmp_path: Path) -> None:
    model = reference(*CASES["deepseek_v3"])
    save(model, tmp_path)
    told = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 12], "activation_scheme": "dynamic"}
    rewrite(tmp_path, lambda tensors: fp8_change(tensors, model.state_dict(), (16, 12)), told)
    tokens = random_tokens(60)
    runner = Runner(weights.load(tmp_path, dtype="float32"))
    assert relative_error(runner.logits(tokens), reference_logits(model, tokens)) < TOLERANCE
    assert weights.load(tmp_path).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda name, tensors: tensors.update({name + "_scale_inv": torch.ones(3, 3)}), r"is \[3, 3\]: blocks of \["),
        (lambda name, tensors: tensors.pop(name + "_scale_inv"), "has 8 bits per element and no _scale_inv beside it"),
        (lambda name, tensors: tensors.pop(name), "belongs to a matrix .*, which is not there"),
    ],
    ids=["other blocks", "no scales", "scales alone"],
)  # fmt: skip
def test_fp8_scales_that_belong_to_nothing(spoil: Any, message: str, tmp_path: Path) -> None:
    model = reference("Llama", LLAMA)
    save(model, tmp_path)
    told = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    rewrite(tmp_path, lambda tensors: fp8_change(tensors, model.state_dict(), (16, 16)), told)

    def change(tensors: Tensors) -> Tensors:
        spoil(next(name for name in tensors if name.endswith("down_proj.weight")), tensors)
        return tensors

    rewrite(tmp_path, change, told)
    with pytest.raises(CheckpointError, match=f"down_proj.*{message}"):
        weights.load(tmp_path)


FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def mxfp4_change(tensors: Tensors, state: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(121, 125, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8)
        tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales
        for e in range(experts):
            for n in range(rows):
                for b in range(columns // 32):
                    scale = math.ldexp(1.0, int(scales[e, n, b]) - 127)
                    values = [FP4[half] for byte in blocks[e, n, b].tolist() for half in (byte & 15, byte >> 4)]
                    state[name][e, 32 * b : 32 * b + 32, n] = torch.tensor(values) * scale
    return tensors


def mxfp4_pair(folder: Path) -> Any:
    model = reference("GptOss", {**CASES["gpt_oss"][1], "hidden_size": 64, "intermediate_size": 32})
    save(model, folder)
    rewrite(folder, lambda tensors: mxfp4_change(tensors, model.state_dict()), {"quant_method": "mxfp4"})
    return model


def test_mxfp4(tmp_path: Path) -> None:
    model = mxfp4_pair(tmp_path)
    tokens = random_tokens(60)
    exact = weights.load(tmp_path, dtype="float32")
    assert relative_error(Runner(exact).logits(tokens), reference_logits(model, tokens)) < TOLERANCE
    eight = weights.load(tmp_path, quantize="int8")
    for ours, theirs in zip(eight.slots, exact.slots, strict=True):
        if ".experts." in ours.name and isinstance(ours.holds, Matrix) and isinstance(theirs.holds, Matrix):
            assert (ours.holds.format, ours.holds.group) == ("int8", 32)
            assert torch.equal(unpack(ours.holds), theirs.holds.data)
    assert weights.load(tmp_path).dtype is torch.bfloat16


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8"])
def test_scales_that_are_none(kind: str, value: float, tmp_path: Path) -> None:
    """faults.md I21."""

    def spoil(tensors: Tensors) -> Tensors:
        scales = next(name for name in tensors if name.endswith(("down_proj.scales", "down_proj.weight_scale_inv")))
        tensors[scales][0, 1] = value
        return tensors

    if kind in ("gptq", "awq"):
        int4_pair(tmp_path, kind)
    else:
        model = reference("Llama", LLAMA)
        save(model, tmp_path)
        told = {"quant_method": "fp8", "weight_block_size": [16, 16]}
        rewrite(tmp_path, lambda tensors: fp8_change(tensors, model.state_dict(), (16, 16)), told)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    rewrite(tmp_path, spoil, told)
    with pytest.raises(CheckpointError, match=r"down_proj\.(scales|weight_scale_inv): the scale at \[(0, 1|1, 0)\]"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("_scales", lambda tensor: tensor[..., :-1].contiguous(), r"expected \[E, N, B, 16\] and \[E, N, B\]"),
        ("_blocks", lambda tensor: tensor[..., :8].contiguous(), r"expected \[E, N, B, 16\] and \[E, N, B\]"),
        ("_scales", lambda tensor: tensor.float(), "has torch.float32: expected torch.uint8"),
    ],
)
def test_mxfp4_parts_that_do_not_fit(part: str, change: Any, message: str, tmp_path: Path) -> None:
    mxfp4_pair(tmp_path)

    def spoil(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if name.endswith("down_proj" + part))
        tensors[name] = change(tensors[name])
        return tensors

    rewrite(tmp_path, spoil, {"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=f"down_proj.*{message}"):
        weights.load(tmp_path)


def test_i21_an_mxfp4_scale_that_is_no_number(tmp_path: Path) -> None:
    mxfp4_pair(tmp_path)

    def spoil(tensors: Tensors) -> Tensors:
        tensors[next(name for name in tensors if name.endswith("down_proj_scales"))][1, 0, 0] = 255
        return tensors

    rewrite(tmp_path, spoil, {"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=r"down_proj_scales, expert 1: a scale is not a number"):
        weights.load(tmp_path)


def test_a_wrong_group_size(tmp_path: Path) -> None:
    int4_pair(tmp_path, "gptq")

    def cut(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if name.endswith("down_proj.scales"))
        tensors[name] = tensors[name][:2]
        return tensors

    rewrite(tmp_path, cut, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"down_proj: qweight .* do not belong together"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes': Trivium reads awq"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3 .*expected 4"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format=marlin"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version=gemv"),
        ({"quant_method": "fp8"}, "weight_block_size=None"),
        ({}, "quant_method='None'"),
        ("int4", "expected an object"),
    ],
)
def test_unknown_storage(told: Any, message: str, tmp_path: Path) -> None:
    save(reference("Llama", LLAMA), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors, told)
    with pytest.raises(ConfigError, match=message):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("part", "dtype"), [(".scales", torch.bfloat16), (".scales", torch.float64), (".zeros", torch.int32)]
)
def test_i21_numbers_of_another_kind_beside_packed_ones(part: str, dtype: torch.dtype, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    save(reference("Llama", LLAMA), plain)
    write_quantized(plain, packed, quantize="int4")
    weights.load(packed)
    tensors = load_file(packed / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scales"))
    changed = name.removesuffix(".scales") + part
    tensors[changed] = tensors[name].to(dtype)
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{changed} is {dtype}"):
        weights.load(packed)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_group_size_that_is_not_what_is_stored(kind: str, tmp_path: Path) -> None:
    int4_pair(tmp_path, kind)
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for wrong, words in ((64, "says 64"), (-1, "says (64|96)"), (16, "says 16"), (0, "expected"), ("32", "expected")):
        rewrite(tmp_path, lambda tensors: tensors, {**told, "group_size": wrong})
        with pytest.raises(
            (CheckpointError, ConfigError), match=rf"(_proj\.scales .* 32 inputs.*|group_size=.*){words}"
        ):
            weights.load(tmp_path)
    for right in (GROUP, None):
        rewrite(tmp_path, lambda tensors: tensors, {**told, "group_size": right})
        weights.load(tmp_path)


def test_a_shorter_last_group_only_with_an_index(tmp_path: Path) -> None:
    """192 inputs in groups of 128 have two groups, and so would 192 in groups of 96: only g_idx tells them apart."""
    model = reference("Llama", {**LLAMA, "hidden_size": 128, "intermediate_size": 192, "head_dim": 32})
    save(model, tmp_path)
    state = model.state_dict()

    def change(tensors: Tensors) -> Tensors:
        for seed, name in enumerate(projections(tensors)):
            made = Int4(*tensors.pop(name).shape, seed=seed, group=128)
            tensors |= {name.replace("weight", part): tensor for part, tensor in made.gptq(second=False).items()}
            state[name].copy_(made.meaning())
        return tensors

    def without_index(tensors: Tensors) -> Tensors:
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(".g_idx")}

    told = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    rewrite(tmp_path, change, told)
    tokens = random_tokens(60)
    exact = Runner(weights.load(tmp_path, dtype="float32"))
    assert relative_error(exact.logits(tokens), reference_logits(model, tokens)) < TOLERANCE
    rewrite(tmp_path, without_index, told)
    with pytest.raises(CheckpointError, match=r"down_proj\.scales has a row for every 96 inputs, .* says 128"):
        weights.load(tmp_path)


def test_equal_groups_need_no_index(tmp_path: Path) -> None:
    model = int4_pair(tmp_path, "gptq")
    told = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith(".g_idx")}, told)
    tokens = random_tokens(60)
    exact = Runner(weights.load(tmp_path, dtype="float32"))
    assert relative_error(exact.logits(tokens), reference_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("quantize", ["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_i21_scales_of_our_own_that_are_none(quantize: str, value: float, tmp_path: Path) -> None:
    plain, packed = tmp_path / "plain", tmp_path / "packed"
    save(reference("Llama", LLAMA), plain)
    tensors = load_file(plain / "model.safetensors")
    tensors[projections(tensors)[0]][0] = 0.0  # a row of zeros has scales of zero, and may
    save_file(tensors, plain / "model.safetensors")
    write_quantized(plain, packed, quantize=quantize)
    weights.load(packed)
    tensors = load_file(packed / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scales") and ".down" in name)
    tensors[name].flatten()[3] = value
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{name}: the scale (at|of row) "):
        weights.load(packed)
