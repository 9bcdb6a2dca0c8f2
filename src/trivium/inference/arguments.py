"""What callers hand to `LLM`, made regular: prompts as a list, a device that is there, experts per layer.

No paper.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trivium.base.errors import ConfigError, SetupError
from trivium.inference.request import RequestError
from trivium.kernels.program import Experts, Program

Prompt = str | Sequence[int]


def many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Always a list: of one text, one list of token ids, or several of either."""
    if isinstance(prompts, str):
        return [prompts]
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]
    for index, item in enumerate(items):
        if not isinstance(item, (str, list, tuple)):
            raise RequestError(
                f"prompt {index} is a {type(item).__name__}: expected text or a list of token ids", param="prompt"
            )
    return items  # type: ignore[return-value]


def experts_of(program: Program) -> tuple[int, ...]:
    """Experts per MoE layer, in the order in which routing comes back."""
    found = {
        operation.layer: len(operation.experts) for operation in program.operations if isinstance(operation, Experts)
    }
    return tuple(found[layer] for layer in sorted(found))


def device_of(device: str) -> str:
    """Where to run. Raises ConfigError for an unknown device, SetupError where there is no GPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r}: expected auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SetupError(f"device={device!r}: torch sees no CUDA GPU here; leave device at auto")
    return device
