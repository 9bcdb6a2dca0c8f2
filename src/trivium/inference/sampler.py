"""Which token comes next: penalties, biases and masks on logits, then the likeliest token or a draw.

R rows, V vocabulary. Every row is treated by its own numbers alone, and a draw depends on (seed, choice, index of the
token) only: the answer is the same in any batch, and after a preemption.

[Note: order] repetition penalty, frequency and presence penalty, bias, masks; then temperature, top-k, top-p over what
top-k left, min-p; then the draw. Log-probabilities are of the logits as the model gave them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trivium.inference.draw import LARGEST, best_of, draw
from trivium.inference.request import SamplingParams, TokenLogprobs

_MASK64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15

Row = npt.NDArray[np.float32]


class Drawer:
    """One choice's own numbers: its settings, its seed, and how often it has said each token."""

    def __init__(self, params: SamplingParams, *, seed: int, choice: int, prompt: Sequence[int]) -> None:
        self.params = params
        self._key = _mix(_mix(_mix(seed + _STEP) + (seed >> 64) + _STEP) + (choice + 1) * _STEP)
        self._seen = np.array(sorted(set(prompt)) if params.penalised else [], dtype=np.intp)
        self._said: dict[int, int] = {}
        self._bias_ids = np.array(list(params.logit_bias), dtype=np.intp)
        self._bias = np.array([_bounded(value) for value in params.logit_bias.values()], dtype=np.float32)

    @property
    def changes(self) -> bool:
        """Whether `change` does anything."""
        return self.params.penalised or len(self._bias_ids) > 0

    def said(self, token_id: int) -> None:
        """Count a token of the answer."""
        if self.params.penalised:
            self._said[token_id] = self._said.get(token_id, 0) + 1

    def change(self, logits_V: Row) -> None:
        """Penalties and bias, in place; what they touch stays finite."""
        params = self.params
        said = np.fromiter(self._said, dtype=np.intp, count=len(self._said))
        if params.repetition_penalty != 1.0:
            factor = np.float32(min(max(params.repetition_penalty, 1 / LARGEST), LARGEST))
            seen = np.union1d(self._seen, said)
            values = logits_V[seen]
            with np.errstate(over="ignore"):
                logits_V[seen] = np.where(values > 0, values / factor, values * factor)
            _bound(logits_V, seen)
        if len(said) and (params.frequency_penalty != 0.0 or params.presence_penalty != 0.0):
            counts = np.fromiter(self._said.values(), dtype=np.float64, count=len(said))
            taken = counts * _bounded(params.frequency_penalty) + _bounded(params.presence_penalty)
            logits_V[said] -= np.clip(taken, -LARGEST, LARGEST).astype(np.float32)
            _bound(logits_V, said)
        if len(self._bias_ids):
            logits_V[self._bias_ids] += self._bias
            _bound(logits_V, self._bias_ids)

    def uniform(self, index: int) -> float:
        """A number in [0, 1) that depends on seed, choice and ``index`` alone."""
        return (_mix(self._key + (index + 1) * _STEP) >> 11) * 2.0**-53


@dataclass(frozen=True, slots=True)
class Draw:
    """What is wanted of a row: the ``index``-th token of ``drawer``'s choice, not ``banned``, among ``allowed``."""

    drawer: Drawer
    index: int
    banned: tuple[int, ...] = ()
    allowed: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row's token, or why it has none."""

    token_id: int
    error: str | None = None
    logprobs: TokenLogprobs | None = None


def sample(logits_RV: torch.Tensor, draws: Sequence[Draw]) -> list[Drawn]:
    """One token for each row. Rows with NaN or infinite logits, or with nothing allowed, get an error of their own."""
    tokens, bests = _likeliest(logits_RV)
    rows: npt.NDArray[np.float32] | None = None
    drawn = []
    for place, (wanted, token, best) in enumerate(zip(draws, tokens, bests, strict=True)):
        params = wanted.drawer.params
        if not math.isfinite(best):
            drawn.append(Drawn(token, _why(best)))
            continue
        changed = wanted.drawer.changes or wanted.banned or wanted.allowed is not None
        if not changed and params.greedy and params.logprobs is None:
            drawn.append(Drawn(token))
            continue
        rows = logits_RV.cpu().numpy() if rows is None else rows
        drawn.append(_draw_row(rows[place], wanted, token, bool(changed)))
    return drawn


def logprobs_of(logits_V: Row, token_id: int, count: int) -> TokenLogprobs:
    """The log-probability of ``token_id`` and of the ``count`` likeliest tokens."""
    highest = float(logits_V.max())
    with np.errstate(under="ignore"):
        whole = highest + math.log(float(np.exp(logits_V - np.float32(highest)).sum(dtype=np.float64)))
    top = (
        tuple((int(token), min(0.0, float(logits_V[token]) - whole)) for token in best_of(logits_V, count))
        if count
        else ()
    )
    return TokenLogprobs(token_id=token_id, logprob=min(0.0, float(logits_V[token_id]) - whole), top=top)


def _likeliest(logits_RV: torch.Tensor) -> tuple[list[int], list[float]]:
    """Each row's best token, the first of equal ones, and its logit: NaN where the row has one."""
    if logits_RV.device.type != "cpu":
        best_R, tokens_R = logits_RV.max(dim=-1)
        return tokens_R.tolist(), best_R.tolist()
    rows = logits_RV.numpy()
    at = rows.argmax(axis=1)
    return at.tolist(), rows[np.arange(len(at)), at].tolist()


def _draw_row(logits_V: Row, wanted: Draw, token: int, changed: bool) -> Drawn:
    """A row that needs more than its likeliest token."""
    params = wanted.drawer.params
    final_V = logits_V
    if changed:
        final_V = logits_V.copy()
        wanted.drawer.change(final_V)
        final_V[list(wanted.banned)] = -math.inf
        if wanted.allowed is not None:
            if wanted.allowed.dtype != torch.bool or wanted.allowed.shape != final_V.shape:
                given = f"{wanted.allowed.dtype} {list(wanted.allowed.shape)}"
                return Drawn(token, f"the constraint's mask is {given}: expected bool {list(final_V.shape)}")
            final_V[~wanted.allowed.cpu().numpy()] = -math.inf
        token = int(final_V.argmax())
        if final_V[token] == -math.inf:
            return Drawn(token, "no token is allowed here: the constraint, the bans and the biases leave none")
    if not params.greedy:
        token = draw(final_V, params, wanted.drawer.uniform(wanted.index))
    found = None if params.logprobs is None else logprobs_of(logits_V, token, params.logprobs)
    return Drawn(token, None, found)


def _why(best: float) -> str:
    kind = "NaN" if math.isnan(best) else "infinite" if best > 0 else "all minus infinite"
    return f"the model's logits are {kind} for this request"


def _bounded(value: float) -> float:
    return min(max(value, -LARGEST), LARGEST)


def _bound(logits_V: Row, ids: npt.NDArray[np.intp]) -> None:
    """Keep what was changed finite, unless it was minus infinite before."""
    values = logits_V[ids]
    logits_V[ids] = np.where(np.isneginf(values), values, np.clip(values, -LARGEST, LARGEST))


def _mix(value: int) -> int:
    """A bijection on 64 bits that leaves no pattern (the finaliser of splitmix64)."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
