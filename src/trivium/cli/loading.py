"""Load a model for generate and chat: the options they share, and a word on what runs."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trivium.base.errors import CheckpointError
from trivium.cli.interrupts import load_torch

if TYPE_CHECKING:
    from trivium.inference import LLM

Model = Annotated[str, typer.Argument(help="A Hugging Face folder, a Trivium checkpoint, or a run's folder.")]
DType = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Quantize = Annotated[str | None, typer.Option(help="int8 or int4.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Memory = Annotated[str | None, typer.Option(help="For weights and cache together, for example 8GiB.")]
Backend = Annotated[str, typer.Option(help="auto, native or torch.")]
Threads = Annotated[int | None, typer.Option(min=1, help="For computing; default: all cores.")]
MaxPositions = Annotated[int | None, typer.Option(help="Tokens of a prompt and its answer.")]
CacheDType = Annotated[str, typer.Option(help="Of the cache's entries: auto, float32, bfloat16 or int8.")]
MaxTokens = Annotated[int, typer.Option(help="Of an answer.")]
Temperature = Annotated[float | None, typer.Option(help="0: the likeliest token. Default: what the model recommends.")]
TopK = Annotated[int | None, typer.Option(help="Draw among the likeliest only.")]
TopP = Annotated[float | None, typer.Option(help="Draw among the likeliest of this total probability.")]
MinP = Annotated[float | None, typer.Option(help="Draw among those of this share of the likeliest one's probability.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1: tokens that were there are less likely.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to load a model; the fields are `LLM`'s."""

    dtype: str = "auto"
    quantize: str | None = None
    device: str = "auto"
    memory: str | None = None
    backend: str = "auto"
    threads: int | None = None
    max_positions: int | None = None
    cache_dtype: str = "auto"


def open_llm(model: str, options: Options, **more: Any) -> LLM:
    """Load ``model``; one line on stderr says what it runs on.

    Raises:
        CheckpointError: there is no such folder.
    """
    if not Path(model).exists():
        raise CheckpointError(f"{model}: no such folder or checkpoint")
    load_torch()
    from trivium.inference import LLM
    from trivium.kernels.registry import explain, lost

    llm = LLM(model, **{**vars(options), **more})
    native = llm.device == "cpu" and options.backend == "auto" and lost() is None  # else LLM has told what is lost
    runs = explain() if native else llm.engine.executor.name
    print(f"{llm.name}: {runs}", file=sys.stderr, flush=True)
    return llm


def given(**values: Any) -> dict[str, Any]:
    """The values that were given on the command line."""
    return {name: value for name, value in values.items() if value is not None}


def shown(text: str) -> str:
    """``text`` for a terminal: what would move the cursor or change colours is replaced."""
    return "".join(
        char if char in "\n\t" or (ord(char) >= 32 and not 127 <= ord(char) < 160) else "\ufffd" for char in text
    )
