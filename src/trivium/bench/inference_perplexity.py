"""What a number format costs in quality: perplexity of one model on one text, served in every format Trivium has.

Beside them stand llama.cpp's formats of the same weights, rounded by its own package `gguf` and run by Trivium's
kernels: in fp32, and Q4_0, whose numbers int4 in groups of 32 holds, also with activations rounded as llama.cpp does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import ConfigError
from trivium.bench.machine import describe
from trivium.inference import LLM

AIMS = {"int8": 1.002, "int4": 1.03}  # times fp32's perplexity, at most
ROUNDED = {"float32": ("Q8_0", "Q4_0"), "int4": ("Q4_0",)}


def run(
    folder: Path, text: Path, tokens: int, threads: int, command: str, say: Callable[[str], None]
) -> dict[str, Any]:
    """Perplexity per format over the text's first ``tokens`` tokens, in windows of the model's context.

    Raises:
        ConfigError: the folder has no tokenizer, or the text is shorter than two tokens.
    """
    found: dict[str, float] = {}
    notes: list[str] = []
    ids: list[int] = []
    for form in ("float32", "bfloat16", "int8", "int4"):
        quantised = form in AIMS
        llm = LLM(
            folder,
            dtype="float32" if quantised else form,  # type: ignore[arg-type]
            quantize=form if quantised else None,  # type: ignore[arg-type]
            threads=threads,
            prefix_cache=False,
        )
        if not ids:
            if llm.tokenizer is None:
                raise ConfigError(f"{folder} has no tokenizer, which perplexity on a text needs")
            ids = llm.tokenizer.encode(text.read_text())[:tokens]
            if len(ids) < 2:
                raise ConfigError(f"{text}: {len(ids)} tokens, perplexity needs at least 2")
        found[f"trivium {form}"] = perplexity(llm, ids)
        say(f"trivium {form}: {found[f'trivium {form}']:.4f}")
        for kind in ROUNDED.get(form, ()):
            try:
                llm.load_weights(rounded(folder, kind))
            except (ImportError, ValueError) as error:
                notes.append(f"{kind}: {error}")
                continue
            found[f"{kind} run as {form}"] = perplexity(llm, ids)
            say(f"{kind} run as {form}: {found[f'{kind} run as {form}']:.4f}")
    return {
        "command": command,
        "machine": describe("cpu"),
        "tokens": len(ids),
        "text": text.name,
        "perplexity": found,
        "notes": notes,
    }


def perplexity(llm: LLM, ids: list[int]) -> float:
    """exp of the mean negative log-likelihood of each token after the first of its window."""
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, llm.max_positions):
        window = ids[start : start + llm.max_positions]
        if len(window) < 2:
            continue
        logits_TV = llm.logits(window)[:-1].double()
        wanted = torch.tensor(window[1:])
        total += float(torch.nn.functional.cross_entropy(logits_TV, wanted, reduction="sum"))
        count += len(wanted)
    return math.exp(total / count)


def rounded(folder: Path, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The folder's matrices rounded to a format of GGUF and back.

    Raises:
        ImportError: gguf is not installed.
        ValueError: there is no safetensors file, or a matrix has rows that the format's blocks do not divide.
    """
    import gguf
    from safetensors import safe_open

    form = gguf.GGMLQuantizationType[kind]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no safetensors files; trivium convert makes them")
    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name).float()
                if tensor.dim() == 2:
                    if tensor.shape[1] % 32:
                        raise ValueError(f"{name}: rows of {tensor.shape[1]} numbers, blocks have 32")
                    packed = gguf.quants.quantize(tensor.numpy(), form)
                    yield name, torch.from_numpy(gguf.quants.dequantize(packed, form).copy())


def lines(report: dict[str, Any]) -> list[str]:
    """A line per format, and whether the aims are met."""
    found = report["perplexity"]
    base = found["trivium float32"]
    made = [f"{name}: {value:.4f} ({value / base - 1:+.3%} of float32)" for name, value in found.items()]
    for form, aim in AIMS.items():
        ratio = found[f"trivium {form}"] / base
        made.append(f"{form}: {ratio - 1:+.3%} (aim at most {aim - 1:+.1%}): {'met' if ratio <= aim else 'missed'}")
    if (theirs := found.get("Q4_0 run as int4")) is not None:
        ours = found["trivium int4"]
        made.append(f"int4 {ours:.4f}, aim at most Q4_0's {theirs:.4f}: {'met' if ours <= theirs else 'missed'}")
    return [*made, *report["notes"]]
