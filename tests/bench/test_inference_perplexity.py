"""What a number format costs in quality is measured rightly: each token once, in windows, beside GGUF's formats."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.inference.folders import folder, tokenizer_json
from tests.inference.reference import reference, reference_logits, save
from tests.inference.zoo import BASE
from trivium.base.errors import ConfigError
from trivium.bench import inference_perplexity as bench
from trivium.inference import LLM

SHAPE = {**BASE, "vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 50}
TEXT = "def double(x):\n    return 2 * x\n\n" * 5


@pytest.fixture(scope="module")
def model() -> Any:
    return reference("Llama", SHAPE)


@pytest.fixture(scope="module")
def hf(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = save(model, tmp_path_factory.mktemp("hf"))
    (where / "tokenizer.json").write_text(tokenizer_json())
    return where


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_text(TEXT)
    return file


@pytest.mark.parametrize("count", [2, 50, 51, 130])
def test_every_token_but_a_windows_first_counts_once(model: Any, hf: Path, count: int) -> None:
    """A window of one token (count 51) has nothing to tell."""
    ids = list(TEXT.encode())[:count]
    losses = []
    for start in range(0, count, 50):
        window = ids[start : start + 50]
        if len(window) > 1:
            logits = reference_logits(model, window)[:-1].double().log_softmax(1)
            losses += [-float(logits[place, token]) for place, token in enumerate(window[1:])]
    found = bench.perplexity(LLM(hf, dtype="float32", threads=1), ids)
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)


def test_every_format_stands_beside_those_of_gguf(hf: Path, text: Path) -> None:
    pytest.importorskip("gguf")
    said: list[str] = []
    report = bench.run(hf, text, 100, 1, "the command", said.append)
    found = report["perplexity"]
    ours = ["trivium float32", "trivium bfloat16", "trivium int8", "trivium int4"]
    assert sorted(found) == sorted([*ours, "Q8_0 run as float32", "Q4_0 run as float32", "Q4_0 run as int4"])
    assert (report["tokens"], report["text"], report["notes"]) == (100, "text.py", [])
    base = found["trivium float32"]
    assert base != found["Q8_0 run as float32"] == pytest.approx(base, rel=0.02)
    assert len(said) == len(found) and said[0] == f"trivium float32: {base:.4f}"


def test_without_gguf_the_rest_is_told(hf: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    report = bench.run(hf, text, 60, 1, "the command", lambda _: None)
    assert len(report["perplexity"]) == 4
    assert [note.split(":")[0] for note in report["notes"]] == ["Q8_0", "Q4_0", "Q4_0"]


def test_what_cannot_be_measured_is_told(hf: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="1 tokens, perplexity needs at least 2"):
        bench.run(hf, text, 1, 1, "", lambda _: None)
    with pytest.raises(ConfigError, match="has no tokenizer"):
        bench.run(folder(tmp_path / "run", text=False), text, 60, 1, "", lambda _: None)


@pytest.mark.parametrize(("int8", "int4", "said"), [(100.2, 103.0, "met"), (100.21, 103.01, "missed")])
def test_aims_are_held_to_float32_and_to_q4_0(int8: float, int4: float, said: str) -> None:
    found = {"trivium float32": 100.0, "trivium int8": int8, "trivium int4": int4, "Q4_0 run as int4": 103.0}
    told = bench.lines({"perplexity": found, "notes": ["a note"]})
    assert [line.rsplit(": ", 1)[1] for line in told if "aim at most" in line] == [said] * 3
    assert told[-1] == "a note"


def test_rounded_matrices_are_those_of_the_folder(hf: Path) -> None:
    pytest.importorskip("gguf")
    held = reference("Llama", SHAPE).state_dict()
    rounded = dict(bench.rounded(hf, "Q8_0"))
    assert set(rounded) == {name for name, tensor in held.items() if tensor.dim() == 2}
    for name, tensor in rounded.items():
        largest = held[name].unflatten(1, (-1, 32)).abs().amax(2, keepdim=True)
        off = (tensor - held[name]).unflatten(1, (-1, 32)).abs()
        # Half a step, and what the half-precision scale is off by at the largest of 127.
        assert bool((off <= largest / 127 * (0.5 + 127 * 2**-11)).all()) and bool(off.any())
