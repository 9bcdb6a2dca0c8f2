"""``trivium plan --serve``: plan and engine agree to the byte; what does not fit is exit 4 with ways out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.inference.folders import folder
from tests.inference.reference import reference, save
from tests.inference.test_storage import LLAMA, int4_pair, mxfp4_pair
from trivium.base.errors import CapacityError, ConfigError
from trivium.cli import main as frame
from trivium.inference import LLM
from trivium.inference.quantized import write_quantized
from trivium.models.moe_config import MoEConfig
from trivium.plan.serving import plan_serving


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("serving") / "run")


@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
@pytest.mark.parametrize("moe", [False, True])
def test_plan_is_reality_to_the_byte(model: Path, tmp_path: Path, quantize, moe: bool) -> None:
    where = folder(tmp_path / "moe", moe=MoEConfig(experts=4, layers=(1,), ffn_dim=40)) if moe else model
    plan = plan_serving(where, memory_bytes=900_000, quantize=quantize)
    llm = LLM(where, memory=900_000, quantize=quantize)
    assert plan.weight_bytes == llm.weight_bytes == llm.meter.live_bytes("weights", "host")
    assert plan.cache_bytes == llm.engine.cache.num_bytes == llm.meter.live_bytes("cache", "host")
    assert plan.cache_tokens == llm.stats.blocks_total * llm.stats.block_size
    assert plan.max_positions == llm.max_positions
    assert plan.weight_bytes + plan.cache_bytes <= 900_000
    assert plan.caches == {"paged": 2}
    assert all(length * count <= plan.cache_tokens for length, count in plan.fits)


@pytest.mark.parametrize("stored", ["int8", "int4", "gptq", "symmetric", "act-order", "awq", "mxfp4"])
def test_plan_is_reality_for_weights_that_are_stored_quantised(tmp_path: Path, stored: str) -> None:
    """As they are, packed anew, and as floats."""
    where = tmp_path / stored
    if stored in ("int8", "int4"):
        save(reference("Llama", LLAMA), tmp_path / "plain")
        write_quantized(tmp_path / "plain", where, quantize=stored)
    elif stored == "mxfp4":
        mxfp4_pair(where)
    else:
        int4_pair(where, stored)
    planned: dict[str, int] = {}
    for options in ({}, {"quantize": "int8"}, {"quantize": "int4"}, {"dtype": "float32"}, {"dtype": "bfloat16"}):
        plan = plan_serving(where, memory_bytes=10**7, **options)  # type: ignore[arg-type]
        llm = LLM(where, memory=10**7, max_sequences=4, **options)  # type: ignore[arg-type]
        assert plan.weight_bytes == llm.weight_bytes, options
        planned[str(options)] = plan.weight_bytes
        assert (plan.weights == "packed") == (not options and stored not in ("mxfp4", "act-order"))
    assert stored == "act-order" or planned["{}"] < planned["{'dtype': 'float32'}"]


def test_c11_what_does_not_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CapacityError, match=r"quantize=int8 needs .*; quantize=int4 needs .*; or give .* or more"):
        plan_serving(model, memory_bytes=100_000)
    assert frame.run(["plan", "--serve", str(model), "--memory", "100kB"]) == 4
    assert "97.66 KiB do not hold the weights" in capsys.readouterr().err
    least = plan_serving(model, memory_bytes=10**7)
    one = least.weight_bytes + 16 * least.token_bytes
    assert plan_serving(model, memory_bytes=one).cache_tokens == 16
    with pytest.raises(CapacityError):
        plan_serving(model, memory_bytes=one - 1)


def test_the_verb(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert frame.run(["plan", "--serve", str(model), "--memory", "2MB", "--cache-dtype", "int8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["cache_dtype"], found["token_bytes"]) == ("int8", 2 * (2 * 16 + 16))
    assert frame.run(["plan", "--serve", str(model), "--memory", "2MB"]) == 0
    assert "requests at once" in capsys.readouterr().out
    assert frame.run(["plan", "--serve", str(model), "--preset", "1m"]) == 2
    assert "leave CONFIG and --preset out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="dtype='float8'"):
        plan_serving(model, memory_bytes=10**7, dtype="float8")  # type: ignore[arg-type]
