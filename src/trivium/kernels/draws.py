"""What is wanted of a step's rows of logits, and the tokens found: the sampler's inputs and outputs.

DeepSpeed Inference section 3.1. R rows, V vocabulary.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from trivium.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """One token wanted per entry: plain lists, for they are short. A row may be named several times.

    rows: of the logits. temperature: 0 takes the likeliest token, the first of equal ones. top_k: 0 or less: all; top_p
    over what top-k left; min_p; uniform in [0, 1). tops: so many likeliest tokens and the log of the sum of e^logit, of
    the row as it is given; -1: neither. ``allowed``: None, or per draw None or bool [V]. ``edits``: None, or per draw
    None or (ids int32, logits fp32) that replace the row's, the last one of an id; the mask holds for them too.
    """

    rows: Sequence[int]
    temperature: Sequence[float]
    top_k: Sequence[int]
    top_p: Sequence[float]
    min_p: Sequence[float]
    uniform: Sequence[float]
    tops: Sequence[int]
    allowed: Sequence[torch.Tensor | None] | None = None
    edits: Sequence[tuple[torch.Tensor, torch.Tensor] | None] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What was found, an entry per draw. ``token`` holds where ``best`` and ``left`` are finite.

    best: the row's largest logit, NaN where it has one; left: the largest after edits and mask. Where ``tops`` asked
    and ``best`` is finite: whole, the log of the sum of e^logit, and top, that many tokens, the likeliest first.
    """

    token: list[int]
    best: list[float]
    left: list[float]
    whole: list[float]
    top: list[list[int]]


class Sampler(Protocol):
    """Finds a step's tokens in one call. A token depends on its row, its settings and its number alone."""

    def draw(self, logits: torch.Tensor, draws: Draws) -> Tokens:
        """``logits``: fp32 [R, V], contiguous, on the CPU.

        Raises:
            ConfigError: a shape, dtype, row, token id or number that does not fit; nothing was drawn.
            CapacityError, SetupError: no memory, or no threads, to draw with.
        """


_CODES = {"rows": "i", "temperature": "f", "min_p": "f", "top_p": "d", "uniform": "d", "top_k": "i", "tops": "i"}


def columns(draws: Draws) -> list[array[int] | array[float]]:
    """The lists as the library reads them, in the order of its struct. Raises as `Sampler.draw`."""
    found: list[array[int] | array[float]] = []
    for name, code in _CODES.items():
        try:
            column: array[int] | array[float] = array(code, getattr(draws, name))
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"draws.{name}: {error}") from error
        if len(column) != len(draws.rows):
            raise ConfigError(f"draws.{name}: {len(column)} entries for {len(draws.rows)} draws")
        found.append(column)
    return found


def check_types(logits: torch.Tensor, draws: Draws) -> None:
    """Types and lengths; the library checks the numbers. Raises as `Sampler.draw`."""
    if logits.dtype != torch.float32 or not logits.is_cpu or logits.ndim != 2 or not logits.is_contiguous():
        raise ConfigError(
            f"logits: expected contiguous float32 [R, V] on the CPU, got {logits.dtype} {list(logits.shape)} on "
            f"{logits.device}"
        )
    count = len(draws.rows)
    if any(len(given) != count for given in (draws.allowed, draws.edits) if given is not None):
        raise ConfigError(f"draws.allowed and draws.edits: expected an entry for each of {count} draws")
    for mask in draws.allowed or ():
        if mask is not None and (
            mask.dtype != torch.bool or mask.shape != logits.shape[1:] or not mask.is_cpu or not mask.is_contiguous()
        ):
            raise ConfigError(
                f"draws.allowed: expected contiguous bool [{logits.shape[1]}] on the CPU, got {mask.dtype} "
                f"{list(mask.shape)} on {mask.device}"
            )
    for edit in draws.edits or ():
        if edit is not None and (
            edit[0].dtype != torch.int32
            or edit[1].dtype != torch.float32
            or edit[0].shape != edit[1].shape
            or any(part.ndim != 1 or not part.is_cpu for part in edit)
        ):
            raise ConfigError(
                f"draws.edits: expected int32 ids [N] and as many float32 logits on the CPU, got {edit[0].dtype} "
                f"{list(edit[0].shape)} on {edit[0].device} and {edit[1].dtype} {list(edit[1].shape)} on "
                f"{edit[1].device}"
            )


def check_numbers(logits: torch.Tensor, draws: Draws) -> None:
    """Names the first number that the library refused. Raises as `Sampler.draw`."""
    num_rows, width = logits.shape
    limits: dict[str, tuple[float, float]] = {
        "rows": (0, num_rows - 1),
        "temperature": (0, float("inf")),
        "top_p": (0, 1),
        "min_p": (0, 1),
        "uniform": (0, 1),
        "tops": (float("-inf"), width),
    }
    for name, (low, high) in limits.items():
        for place, value in enumerate(getattr(draws, name)):
            if not low <= value <= high:
                raise ConfigError(f"draws.{name}[{place}]: {value}, expected {low} to {high}")
    for place, edit in enumerate(draws.edits or ()):
        for token in () if edit is None else edit[0].tolist():
            if not 0 <= token < width:
                raise ConfigError(f"draws.edits[{place}]: token {token}, expected 0 to {width - 1}")
    raise ConfigError(f"draws of {len(draws.rows)} tokens do not fit logits {list(logits.shape)}")
