"""Which token comes next: penalties, biases and masks on logits, then the likeliest token or a draw.

R rows, V vocabulary. Every row is treated by its own numbers alone, and a draw depends on (seed, choice, index of the
token) only: the answer is the same in any batch, and after a preemption.

[Note: order] repetition penalty, frequency and presence penalty, bias, masks; then temperature, top-k, top-p over what
top-k left, min-p; then the draw. Log-probabilities are of the logits as the model gave them.

Where the executor has a sampler (the native kernels) one call finds all tokens of a step; else numpy does, row by row:
the reference. The two may differ where the number falls within rounding of the border between two tokens, or a token
lies within rounding of what min-p or top-p cuts off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from trivium.inference.draw import LARGEST, Ids, best_of, draw, heat
from trivium.inference.request import SamplingParams, TokenLogprobs
from trivium.kernels.draws import Draws, Sampler

_MASK64 = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15
_LEAST = np.float32(-LARGEST)
_NOTHING_LEFT = "no token is allowed here: the constraint, the bans and the biases leave none"

Row = npt.NDArray[np.float32]
_UNREAD: Row = np.empty((0, 0), dtype=np.float32)


class Drawer:
    """One choice's own numbers: its settings, its seed, and how often it has said each token."""

    def __init__(self, params: SamplingParams, *, seed: int, choice: int, prompt: Sequence[int]) -> None:
        self.params = params
        self._key = _mix(_mix(_mix(seed + _STEP) + (seed >> 64) + _STEP) + (choice + 1) * _STEP)
        prompted = set(prompt) if params.repetition_penalty != 1.0 else set()
        ids = sorted(prompted | set(params.logit_bias))
        # Of every token that is touched: where it stands in the arrays, and there what is known of it.
        self._places = {token: place for place, token in enumerate(ids)}
        self._ids = np.array(ids, dtype=np.intp)
        self._seen = np.array([token in prompted for token in ids], dtype=np.bool_)
        self._counts = np.zeros(len(ids))
        self._bias = np.array([_bounded(params.logit_bias.get(token, 0.0)) for token in ids], dtype=np.float32)

    @property
    def changes(self) -> bool:
        """Whether there are `edits`."""
        return self.params.penalised or bool(self.params.logit_bias)

    def said(self, token_id: int) -> None:
        """Count a token of the answer."""
        if not self.params.penalised:
            return
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            more = place + 64
            self._ids, self._seen, self._counts, self._bias = (
                np.concatenate([known, np.zeros(more, dtype=known.dtype)])
                for known in (self._ids, self._seen, self._counts, self._bias)
            )
        self._ids[place] = token_id
        self._seen[place] = True
        self._counts[place] += 1

    def edits(self, logits_V: Row) -> tuple[Ids, Row]:
        """Tokens that penalties and bias touch, each once, and their new logits.

        Those are finite, or minus infinite where they were before.
        """
        params, count = self.params, len(self._places)
        ids = self._ids[:count]
        values: Row = logits_V[ids]
        with np.errstate(over="ignore", invalid="ignore"):  # a row of NaN is an error of its own
            if params.repetition_penalty != 1.0:
                factor = np.float32(min(max(params.repetition_penalty, 1 / LARGEST), LARGEST))
                repeated = np.where(values > 0, values / factor, values * factor)
                values = np.where(self._seen[:count], _bound(repeated, values), values)
            if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
                counts = self._counts[:count]
                taken = counts * _bounded(params.frequency_penalty) + _bounded(params.presence_penalty)
                less = values - np.minimum(np.maximum(taken, -LARGEST), LARGEST).astype(np.float32)
                values = np.where(counts > 0, _bound(less, values), values)
            if params.logit_bias:
                bias = self._bias[:count]
                values = np.where(bias != 0, _bound(values + bias, values), values)
        return ids, values

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

    @property
    def changed(self) -> bool:
        """Whether the row is another one before it is drawn from."""
        return self.drawer.changes or bool(self.banned) or self.allowed is not None

    def misfit(self, width: int) -> str | None:
        """Why the constraint's mask cannot be used."""
        if self.allowed is None or (self.allowed.dtype == torch.bool and self.allowed.shape == (width,)):
            return None
        given = f"{self.allowed.dtype} {list(self.allowed.shape)}"
        return f"the constraint's mask is {given}: expected {torch.bool} [{width}]"

    def edits(self, logits_V: Row) -> tuple[Ids, Row] | None:
        """Tokens and their new logits, by penalties, biases and bans; the last one of a token holds."""
        banned = np.array([token for token in self.banned if 0 <= token < len(logits_V)], dtype=np.intp)
        if not self.drawer.changes:
            return (banned, np.full(len(banned), -np.inf, dtype=np.float32)) if len(banned) else None
        ids, values = self.drawer.edits(logits_V)
        return np.concatenate([ids, banned]), np.append(values, np.full(len(banned), -np.inf, dtype=np.float32))


@dataclass(frozen=True, slots=True)
class Drawn:
    """A row's token, or why it has none."""

    token_id: int
    error: str | None = None
    logprobs: TokenLogprobs | None = None


def sample(
    logits_RV: torch.Tensor, draws: Sequence[Draw], *, at: Sequence[int] | None = None, sampler: Sampler | None = None
) -> list[Drawn]:
    """One token for each draw. Rows with NaN or infinite logits, or with nothing allowed, get an error of their own.

    ``at``: the row of each draw; None: draw i's is row i. ``sampler``: the executor's, for its logits.
    """
    at = range(len(draws)) if at is None else at
    if sampler is not None:
        return _sample_at_once(logits_RV, draws, at, sampler)
    whole = len(at) == logits_RV.shape[0] and all(row == place for place, row in enumerate(at))
    wanted_RV = logits_RV if whole else logits_RV[list(at)]
    tokens, bests = _likeliest(wanted_RV)
    rows: npt.NDArray[np.float32] | None = None
    drawn = []
    for place, (wanted, token, best) in enumerate(zip(draws, tokens, bests, strict=True)):
        params = wanted.drawer.params
        if not math.isfinite(best):
            drawn.append(Drawn(token, _why(best)))
            continue
        if not wanted.changed and params.greedy and params.logprobs is None:
            drawn.append(Drawn(token))
            continue
        rows = wanted_RV.cpu().numpy() if rows is None else rows
        drawn.append(_draw_row(rows[place], wanted, token))
    return drawn


def _sample_at_once(logits_RV: torch.Tensor, draws: Sequence[Draw], at: Sequence[int], sampler: Sampler) -> list[Drawn]:
    """`sample` in one call of a kernel."""
    many = [wanted.drawer.params for wanted in draws]
    hot = [not params.greedy for params in many]
    width = logits_RV.shape[1]
    tops = [-1 if params.logprobs is None else min(params.logprobs, width) for params in many]
    changed = any(wanted.changed for wanted in draws)
    refused = [wanted.misfit(width) for wanted in draws]
    # Only where they are read here too: after a step's weights went through the caches each of torch's calls is slow.
    rows = logits_RV.numpy() if changed or max(tops, default=-1) >= 0 else _UNREAD
    found = sampler.draw(
        logits_RV,
        Draws(
            rows=at,
            temperature=[heat(params.temperature) if one else 0.0 for params, one in zip(many, hot, strict=True)],
            top_k=[min(params.top_k, width) for params in many],
            top_p=[params.top_p for params in many],
            min_p=[params.min_p for params in many],
            uniform=[
                wanted.drawer.uniform(wanted.index) if one else 0.0 for wanted, one in zip(draws, hot, strict=True)
            ],
            tops=tops,
            allowed=[_mask(wanted, why) for wanted, why in zip(draws, refused, strict=True)] if changed else None,
            edits=[_edits(wanted, rows[row]) for wanted, row in zip(draws, at, strict=True)] if changed else None,
        ),
    )
    drawn = []
    for place, (token, best, left) in enumerate(zip(found.token, found.best, found.left, strict=True)):
        told = None
        if not math.isfinite(best):
            error: str | None = _why(best)
        else:
            error = refused[place] or (_NOTHING_LEFT if left == -math.inf else None)
        if error is None and tops[place] >= 0:
            told = _told(rows[at[place]], token, found.whole[place], found.top[place])
        drawn.append(Drawn(token, error, told))
    return drawn


def _mask(wanted: Draw, misfit: str | None) -> torch.Tensor | None:
    return None if wanted.allowed is None or misfit is not None else wanted.allowed.cpu().contiguous()


def _edits(wanted: Draw, logits_V: Row) -> tuple[torch.Tensor, torch.Tensor] | None:
    edits = wanted.edits(logits_V)
    return None if edits is None else (torch.from_numpy(edits[0].astype(np.int32)), torch.from_numpy(edits[1]))


def logprobs(
    logits_RV: torch.Tensor, token_ids: Sequence[int], count: int, sampler: Sampler | None = None
) -> list[TokenLogprobs] | None:
    """`logprobs_of` each row for its token; None where a row's largest logit is not finite."""
    if sampler is None:
        if not bool(torch.isfinite(logits_RV.amax(dim=1)).all()):
            return None
        rows = logits_RV.cpu().numpy()
        return [logprobs_of(logits_V, token, count) for logits_V, token in zip(rows, token_ids, strict=True)]
    many, count = len(token_ids), min(count, logits_RV.shape[1])
    none = [0.0] * many
    found = sampler.draw(
        logits_RV,
        Draws(rows=range(many), temperature=none, top_k=[0] * many, top_p=[1.0] * many, min_p=none, uniform=none,
              tops=[count] * many),
    )  # fmt: skip
    if not all(math.isfinite(best) for best in found.best):
        return None
    return [
        _told(logits_V, token, whole, top)
        for logits_V, token, whole, top in zip(logits_RV.numpy(), token_ids, found.whole, found.top, strict=True)
    ]


def logprobs_of(logits_V: Row, token_id: int, count: int) -> TokenLogprobs:
    """The log-probability of ``token_id`` and of the ``count`` likeliest tokens."""
    highest = float(logits_V.max())
    with np.errstate(under="ignore"):
        whole = highest + math.log(float(np.exp(logits_V - np.float32(highest)).sum(dtype=np.float64)))
    return _told(logits_V, token_id, whole, best_of(logits_V, count).tolist() if count else [])


def _told(logits_V: Row, token_id: int, whole: float, top: Sequence[int]) -> TokenLogprobs:
    """``whole``: the log of the sum of e^logit; ``top``: the likeliest tokens."""
    return TokenLogprobs(
        token_id=token_id,
        logprob=min(0.0, float(logits_V[token_id]) - whole),
        top=tuple((token, min(0.0, float(logits_V[token]) - whole)) for token in top),
    )


def _likeliest(logits_RV: torch.Tensor) -> tuple[list[int], list[float]]:
    """Each row's best token, the first of equal ones, and its logit: NaN where the row has one."""
    if logits_RV.device.type != "cpu":
        best_R, tokens_R = logits_RV.max(dim=-1)
        return tokens_R.tolist(), best_R.tolist()
    rows = logits_RV.numpy()
    at = rows.argmax(axis=1)
    return at.tolist(), rows[np.arange(len(at)), at].tolist()


def _draw_row(logits_V: Row, wanted: Draw, token: int) -> Drawn:
    """A row that needs more than its likeliest token."""
    params = wanted.drawer.params
    final_V = logits_V
    if wanted.changed:
        final_V = logits_V.copy()
        edits = wanted.edits(logits_V)
        if edits is not None:
            final_V[edits[0]] = edits[1]
        misfit = wanted.misfit(len(final_V))
        if misfit is not None:
            return Drawn(token, misfit)
        if wanted.allowed is not None:
            final_V[~wanted.allowed.cpu().numpy()] = -math.inf
        token = int(final_V.argmax())
        if final_V[token] == -math.inf:
            return Drawn(token, _NOTHING_LEFT)
    if not params.greedy:
        token = draw(final_V, params, wanted.drawer.uniform(wanted.index))
    found = None if params.logprobs is None else logprobs_of(logits_V, token, params.logprobs)
    return Drawn(token, None, found)


def _why(best: float) -> str:
    kind = "NaN" if math.isnan(best) else "infinite" if best > 0 else "all minus infinite"
    return f"the model's logits are {kind} for this request"


def _bounded(value: float) -> float:
    return min(max(value, -LARGEST), LARGEST)


def _bound(values: Row, before: Row) -> Row:
    """Keep what was changed finite, unless it was minus infinite ``before``."""
    bounded: Row = np.minimum(np.maximum(values, np.where(before == -np.inf, before, _LEAST)), -_LEAST)
    return bounded


def _mix(value: int) -> int:
    """A bijection on 64 bits that leaves no pattern (the finaliser of splitmix64)."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
