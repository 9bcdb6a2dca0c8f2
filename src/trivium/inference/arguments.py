"""What callers hand to `LLM`, made regular: prompts as a list, a device that is there, experts per layer.

No paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from trivium.base.errors import ConfigError, SetupError
from trivium.base.units import parse_bytes
from trivium.inference.request import RequestError, SamplingParams
from trivium.kernels.program import Experts, Program

Prompt = str | Sequence[int]
_MOST = {"threads": 4096, "max_sequences": 1 << 14, "step_tokens": 1 << 20, "block_size": 1 << 12}


def many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Always a list: of one text, one list of token ids, or several of either."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, (bytes, bytearray, Mapping, torch.Tensor)):
        raise RequestError(
            f"prompts is a {type(prompts).__name__}: expected text, a list of token ids, or a list of either",
            param="prompt",
        )
    items = list(prompts)
    if items and all(isinstance(item, int) for item in items):
        return [items]  # type: ignore[list-item]
    for index, item in enumerate(items):
        if not isinstance(item, (str, list, tuple)):
            raise RequestError(
                f"prompt {index} is a {type(item).__name__}: expected text or a list of token ids", param="prompt"
            )
    return items  # type: ignore[return-value]


def params_of(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int, recommended: Callable[[], SamplingParams]
) -> list[SamplingParams]:
    """``count`` settings: the same for all, or one each; None: what is ``recommended``."""
    if params is None:
        return [recommended()] * count
    found = list(params) if isinstance(params, (list, tuple)) else [params] * count
    for one in found:
        if not isinstance(one, SamplingParams):
            raise RequestError(
                f"params is a {type(one).__name__}: expected SamplingParams, such as SamplingParams(max_tokens=64)",
                param="params",
            )
    if len(found) != count:
        raise RequestError(f"{len(found)} sampling params for {count} prompts: give one, or one each", param="params")
    return found  # type: ignore[return-value]


def check_options(speculate: object, **sizes: object) -> None:
    """Raise ConfigError where one of ``sizes`` is neither None nor a whole number in the range that makes sense.

    ``speculate`` may be True, False and None.
    """
    if speculate is not None and not isinstance(speculate, bool):
        raise ConfigError(f"speculate={repr(speculate)[:60]}: expected True, False or None")
    for name, value in sizes.items():
        most = _MOST.get(name)
        if value is not None and (type(value) is not int or value < 1 or (most is not None and value > most)):
            above = f"of at least 1, at most {most}" if most is not None else "of at least 1"
            raise ConfigError(f"{name}={repr(value)[:60]}: expected a whole number {above}")


def memory_bytes(memory: object) -> int | None:
    """Bytes of ``memory``: a whole number of them, or text with a unit."""
    if memory is None:
        return None
    if type(memory) is int or isinstance(memory, str):
        return parse_bytes(memory)
    raise ConfigError(f"memory={repr(memory)[:60]}: expected whole bytes, or text such as '8GiB'")


def experts_of(program: Program) -> tuple[int, ...]:
    """Experts per MoE layer, in the order in which routing comes back."""
    found = {
        operation.layer: len(operation.experts) for operation in program.operations if isinstance(operation, Experts)
    }
    return tuple(found[layer] for layer in sorted(found))


def device_of(device: str) -> str:
    """Where to run: "cpu", or "cuda" with an index, so that every thread means the GPU that is the caller's now.

    Raises:
        ConfigError: an unknown device.
        SetupError: there is no GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device={device!r}: expected auto, cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise SetupError(f"device={device!r}: torch sees no CUDA GPU here; leave device at auto")
    return f"cuda:{torch.cuda.current_device()}" if kind == "cuda" and not index else device
