"""The demo's last part: the task model's checkpoint answers through the engine, the same alone and in a batch.

DeepSpeed Inference section 3.1; what is compared are token ids and the bits of their log-probabilities.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from trivium.base.errors import ConfigError, TriviumError

if TYPE_CHECKING:
    from trivium.inference import LLM, Output

PROMPT = "sort qzkab>"
ASKED = ((PROMPT, "abkqz"), ("add 12+35>", "47"), ("reverse qzkab>", "bakzq"), ("max 31 7 92>", "92"))
BATCH = 32
_MAX_TOKENS = 10


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Each prompt asked alone, then all at once. ``same``: how many have equal ids and log-probabilities both times."""

    texts: tuple[str, ...]
    same: int
    alone_tokens_per_s: float
    batch_tokens_per_s: float


def newest(run: Path) -> Path:
    """The newest checkpoint of the run in ``run``. Raises ConfigError without one."""
    from trivium import checkpoint

    found = checkpoint.latest(run)
    if found is None:
        raise ConfigError(f"{run} holds no checkpoint to answer with: run the demo's part 4 into this folder first")
    return found


def show(console: Console, run: Path, promise: Callable[[bool, str], None]) -> Compared:
    """Load the newest checkpoint in ``run``, ask it, and hold it to one answer per request, to the bit."""
    from trivium.inference import LLM
    from trivium.train.tasks import TaskConfig, held_out_examples

    folder = newest(run)
    llm = LLM(folder, device="cpu")
    executor = llm.engine.executor
    console.print(f"  {folder}: {executor.name}", soft_wrap=True)
    rest = BATCH - len(ASKED)
    others = held_out_examples(TaskConfig(), rest // len(TaskConfig().names))
    examples = [*ASKED, *((example.prompt, example.answer) for example in others)]
    found = compare(llm, [prompt for prompt, _ in examples])
    for (prompt, right), text in zip(ASKED, found.texts[: len(ASKED)], strict=True):
        console.print(f"  {prompt}{text}" + ("" if text == right else f"  (right: {right})"))
    exact = sum(text == right for text, (_, right) in zip(found.texts, examples, strict=True))
    console.print(
        f"  {exact} of {len(examples)} right; {found.alone_tokens_per_s:,.0f} tokens/s one after the other, "
        f"{found.batch_tokens_per_s:,.0f} in one batch"
    )
    told = f"{found.same} of {len(examples)} answers the same alone and in a batch of {len(examples)}, bit for bit"
    if executor.batch_invariant:
        promise(found.same == len(examples), told)
    else:
        console.print(f"  {told}; {executor.name} does not promise it: `trivium doctor` tells what is missing")
    return found


def compare(llm: LLM, prompts: Sequence[str]) -> Compared:
    """Ask every prompt alone and all of them at once, the likeliest token each time.

    Raises:
        TriviumError: an answer ended with an error.
    """
    from trivium.inference import SamplingParams

    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0, logprobs=0)
    llm.generate(prompts[0], params)  # the first request also starts threads, which is not what is timed
    begun = time.perf_counter()
    alone = [llm.generate(prompt, params)[0] for prompt in prompts]
    between = time.perf_counter()
    batch = llm.generate(list(prompts), params)
    ended = time.perf_counter()
    for prompt, output in zip((*prompts, *prompts), (*alone, *batch), strict=True):
        if output.finish_reason not in ("stop", "length"):
            raise TriviumError(f"{prompt!r} was not answered: {output.error or output.finish_reason}")
    return Compared(
        texts=tuple(output.text for output in batch),
        same=sum(_equal(one, other) for one, other in zip(alone, batch, strict=True)),
        alone_tokens_per_s=_tokens(alone) / (between - begun),
        batch_tokens_per_s=_tokens(batch) / (ended - between),
    )


def commands(program: str, run: Path) -> list[str]:
    """What to type to chat with the run's newest checkpoint, to serve it, and to ask it once."""
    folder = shlex.quote(str(run))
    return [
        f"{program} chat {folder}",
        f"{program} serve {folder}",
        f'{program} generate {folder} --prompt "{PROMPT}"',
    ]


def _equal(one: Output, other: Output) -> bool:
    return one.token_ids == other.token_ids and one.logprobs == other.logprobs


def _tokens(outputs: Sequence[Output]) -> int:
    return sum(len(output.token_ids) for output in outputs)
