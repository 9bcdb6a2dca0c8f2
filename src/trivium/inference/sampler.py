"""Which token comes next: penalties, biases, masks and cuts on logits, then the likeliest token or a draw.

R rows, V vocabulary, C candidates of a row. Every row is treated by its own numbers alone, and a draw depends on
(seed, choice, index of the token) only: the answer is the same in any batch, and after a preemption.

[Note: order] repetition penalty, frequency and presence penalty, bias, masks; then temperature, top-k, top-p over what
top-k left, min-p; then the draw. Log-probabilities are of the logits as the model gave them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.inference.request import SamplingParams, TokenLogprobs

_LARGEST = 1e30
_FIRST_CUT = 1024
_MASK64 = (1 << 64) - 1


class Drawer:
    """One choice's own numbers: its settings, its seed, and how often it has said each token."""

    def __init__(
        self, params: SamplingParams, *, seed: int, choice: int, prompt: Sequence[int], vocabulary: int
    ) -> None:
        self.params = params
        self._key = _mix(_mix(seed & _MASK64) ^ _mix(choice + 1) ^ ((seed >> 64) & _MASK64))
        self._said_V: torch.Tensor | None = None
        self._seen_V: torch.Tensor | None = None
        if params.penalised:
            self._said_V = torch.zeros(vocabulary)
            self._seen_V = torch.zeros(vocabulary, dtype=torch.bool)
            self._seen_V[torch.tensor(list(prompt))] = True
        bias = params.logit_bias
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64) if bias else None
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float64).clamp(-_LARGEST, _LARGEST).float()

    @property
    def changes(self) -> bool:
        """Whether `change` does anything."""
        return self._said_V is not None or self._bias_ids is not None

    def said(self, token_id: int) -> None:
        """Count a token of the answer."""
        if self._said_V is not None and self._seen_V is not None:
            self._said_V[token_id] += 1
            self._seen_V[token_id] = True

    def change(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Logits after penalties and bias, finite where they were."""
        params = self.params
        device = logits_V.device
        if self._said_V is not None and self._seen_V is not None:
            if params.repetition_penalty != 1.0:
                factor = min(max(params.repetition_penalty, 1 / _LARGEST), _LARGEST)
                less_V = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
                logits_V = torch.where(self._seen_V.to(device), less_V, logits_V)
            said_V = self._said_V.to(device)
            taken_V = said_V * _bounded(params.frequency_penalty) + (said_V > 0) * _bounded(params.presence_penalty)
            logits_V = logits_V.clamp(-_LARGEST, _LARGEST) - taken_V
        if self._bias_ids is not None:
            logits_V = logits_V.index_add(0, self._bias_ids.to(device), self._bias.to(device))
        return logits_V.clamp(-_LARGEST, _LARGEST)

    def uniform(self, index: int) -> float:
        """A number in [0, 1) that depends on seed, choice and ``index`` alone."""
        return (_mix(self._key + index * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53


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
    best_R, tokens_R = logits_RV.max(dim=-1)
    tokens: list[int] = tokens_R.tolist()
    errors: list[str | None] = [None if math.isfinite(best) else _why(best) for best in best_R.tolist()]
    changed: list[int] = []
    random: list[int] = []
    for row, draw in enumerate(draws):
        if errors[row] is None:
            if draw.banned or draw.allowed is not None or draw.drawer.changes:
                changed.append(row)
            if not draw.drawer.params.greedy:
                random.append(row)
    final_RV = logits_RV
    if changed:
        final_RV = logits_RV.clone()
        for row in changed:
            final_RV[row] = _change(logits_RV[row], draws[row])
        best_C, tokens_C = final_RV[changed].max(dim=-1)
        for row, best, token in zip(changed, best_C.tolist(), tokens_C.tolist(), strict=True):
            tokens[row] = token
            if best == -math.inf:
                errors[row] = "no token is allowed here: the constraint, the bans and the biases leave none"
        random = [row for row in random if errors[row] is None]
    for row, token in _draw(final_RV, random, draws):
        tokens[row] = token
    wanted = [row for row, draw in enumerate(draws) if draw.drawer.params.logprobs is not None and errors[row] is None]
    found: list[TokenLogprobs | None] = [None] * len(tokens)
    if wanted:
        counts = [draws[row].drawer.params.logprobs or 0 for row in wanted]
        for row, entry in zip(
            wanted, logprobs(logits_RV[wanted], [tokens[row] for row in wanted], counts), strict=True
        ):
            found[row] = entry
    return [Drawn(*entry) for entry in zip(tokens, errors, found, strict=True)]


def logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """Each row's log-probability of its token and of its ``counts[row]`` likeliest ones."""
    logprobs_RV = torch.log_softmax(logits_RV.float(), dim=-1)
    own = logprobs_RV.gather(1, torch.tensor(token_ids, device=logits_RV.device)[:, None])[:, 0].tolist()
    found = []
    for row, (token, value, count) in enumerate(zip(token_ids, own, counts, strict=True)):
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, ids = logprobs_RV[row].topk(min(count, logits_RV.shape[1]))
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found.append(TokenLogprobs(token_id=token, logprob=value, top=top))
    return found


def _change(logits_V: torch.Tensor, draw: Draw) -> torch.Tensor:
    if draw.drawer.changes:
        logits_V = draw.drawer.change(logits_V)
    if draw.banned:
        logits_V = logits_V.index_fill(0, torch.tensor(draw.banned, device=logits_V.device), -math.inf)
    if draw.allowed is not None:
        logits_V = logits_V.masked_fill(~draw.allowed.to(logits_V.device), -math.inf)
    return logits_V


def _draw(logits_RV: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """Draw for ``rows``; those that are cut alike go together."""
    groups: dict[int, list[int]] = {}
    width = logits_RV.shape[1]
    for row in rows:
        params = draws[row].drawer.params
        cut = width
        if params.top_k > 0:
            cut = min(params.top_k, width)
        elif params.top_p < 1.0:
            cut = min(_FIRST_CUT, width)
        groups.setdefault(cut, []).append(row)
    drawn: list[tuple[int, int]] = []
    for cut, members in groups.items():
        probabilities_GV = _probabilities(logits_RV, members, draws)
        drawn += _draw_whole(probabilities_GV, members, draws) if cut == width else []
        if cut < width:
            drawn += _draw_cut(probabilities_GV, cut, members, draws)
    return drawn


def _probabilities(logits_RV: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> torch.Tensor:
    """Softmax at each row's temperature, exact at its extremes: the best token's exponent is 0 at any temperature."""
    logits_GV = logits_RV[rows]
    heats = [min(max(draws[row].drawer.params.temperature, 1 / _LARGEST), _LARGEST) for row in rows]
    heat_G = torch.tensor(heats, dtype=torch.float32, device=logits_RV.device)
    return torch.softmax((logits_GV - logits_GV.amax(dim=-1, keepdim=True)) / heat_G[:, None], dim=-1)


def _draw_whole(probabilities_GV: torch.Tensor, rows: list[int], draws: Sequence[Draw]) -> list[tuple[int, int]]:
    """Rows without top-k: in the order of the vocabulary, or sorted where top-p asks for it."""
    drawn = []
    for place, row in enumerate(rows):
        params = draws[row].drawer.params
        uniform = draws[row].drawer.uniform(draws[row].index)
        probabilities_V = probabilities_GV[place]
        ids_V: torch.Tensor | None = None
        if params.top_p < 1.0 or params.top_k > 0:
            probabilities_V, ids_V = probabilities_V.sort(descending=True, stable=True)
        drawn.append((row, _pick(probabilities_V, ids_V, params, uniform)))
    return drawn


def _draw_cut(
    probabilities_GV: torch.Tensor, cut: int, rows: list[int], draws: Sequence[Draw]
) -> list[tuple[int, int]]:
    """Rows of which the ``cut`` likeliest tokens are enough; where top-p reaches further, the whole row is sorted."""
    drawn = []
    best_GC, ids_GC = probabilities_GV.topk(cut, dim=-1)
    mass = best_GC.double().sum(dim=-1).tolist()
    for place, row in enumerate(rows):
        params = draws[row].drawer.params
        if params.top_k <= 0 and mass[place] < params.top_p:
            drawn += _draw_whole(probabilities_GV[place : place + 1], [row], draws)
            continue
        uniform = draws[row].drawer.uniform(draws[row].index)
        drawn.append((row, _pick(best_GC[place], ids_GC[place], params, uniform)))
    return drawn


def _pick(probabilities_C: torch.Tensor, ids_C: torch.Tensor | None, params: SamplingParams, uniform: float) -> int:
    """The candidate at which the running sum passes ``uniform`` of the whole; sorted when there are ``ids_C``."""
    running_C = probabilities_C.double().cumsum(0)
    if ids_C is not None:
        keep = len(probabilities_C)
        if params.top_p < 1.0:
            whole = float(running_C[-1]) if params.top_k > 0 else 1.0
            keep = min(keep, 1 + int((running_C < params.top_p * whole).sum()))
        if params.min_p > 0.0:
            keep = min(keep, max(1, int((probabilities_C >= params.min_p * probabilities_C[0]).sum())))
        running_C = running_C[:keep]
    elif params.min_p > 0.0:
        kept_C = probabilities_C >= params.min_p * probabilities_C.max()
        running_C = (probabilities_C * kept_C).double().cumsum(0)
    place = int(torch.searchsorted(running_C, uniform * float(running_C[-1]), right=True))
    if place >= len(running_C):  # rounding at the very end: the last candidate with any probability
        place = int(torch.searchsorted(running_C, running_C[-1]))
    return place if ids_C is None else int(ids_C[place])


def _why(best: float) -> str:
    kind = "NaN" if math.isnan(best) else "infinite" if best > 0 else "all minus infinite"
    return f"the model's logits are {kind} for this request"


def _bounded(value: float) -> float:
    return min(max(value, -_LARGEST), _LARGEST)


def _mix(value: int) -> int:
    """A bijection on 64 bits that leaves no pattern (the finaliser of splitmix64)."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
