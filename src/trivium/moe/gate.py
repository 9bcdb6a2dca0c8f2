"""Score the experts for every token in fp32 and choose the best: the router.

DeepSpeed-MoE section 3.1. T tokens, C model width, E experts, K choices per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from trivium.base.errors import ConfigError, NonFiniteError
from trivium.moe.choice import check_groups, choose, limit_to_groups
from trivium.moe.draw import gumbel, key, uniform


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How scores choose experts and become weights.

    ``score``: of a softmax over the experts, or of each expert's own sigmoid. ``renormalize``: divide a token's chosen
    scores by their sum (None: yes for top-k above 1). ``scale``: every weight is multiplied by it at last.
    ``num_groups``, ``top_groups``: experts stand in groups of neighbours, and a token chooses inside its best
    ``top_groups`` alone, a group being worth the sum of its two best scores (DeepSeek-V3).
    ``sample_second``: in training the choices after the first are drawn by their scores (GShard), without replacement.
    ``jitter``: in training the router's input is multiplied by uniform noise from [1 - jitter, 1 + jitter].
    ``bias_rate``: above 0, a buffer ``bias`` [E] is added to the scores for the choice, never for the weights, and
    `Gate.update_bias` moves it by this much towards an even load: balance without an auxiliary loss.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool | None = None
    jitter: float = 0.0
    init_std: float = 0.02
    scale: float = 1.0
    num_groups: int = 1
    top_groups: int | None = None
    sample_second: bool = False
    bias_rate: float = 0.0

    def __post_init__(self) -> None:
        if self.score not in ("softmax", "sigmoid"):
            raise ConfigError(f"gate.score={self.score!r}: expected 'softmax' or 'sigmoid'")
        if not 0.0 <= self.jitter < 1.0:
            raise ConfigError(f"gate.jitter={self.jitter}: expected 0 or more and below 1")
        if not (math.isfinite(self.init_std) and self.init_std >= 0):
            raise ConfigError(f"gate.init_std={self.init_std}: expected 0 or more, say 0.02")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise ConfigError(f"gate.scale={self.scale}: expected a number above 0")
        if not (math.isfinite(self.bias_rate) and self.bias_rate >= 0):
            raise ConfigError(f"gate.bias_rate={self.bias_rate}: expected 0 (no bias) or more, say 0.001")

    def renormalizes(self, top_k: int) -> bool:
        """Whether a token's chosen scores are divided by their sum, where it chooses ``top_k``."""
        return top_k > 1 if self.renormalize is None else self.renormalize

    def check(self, num_experts: int, top_k: int) -> int:
        """How many groups a token may choose from; ConfigError where the settings do not go with these numbers."""
        if self.renormalize and top_k == 1:
            raise ConfigError(
                "gate.renormalize=true with top_k=1 makes every weight 1, and the router would learn nothing: "
                "leave it out or raise top_k"
            )
        if self.sample_second and top_k == 1:
            raise ConfigError("gate.sample_second=true with top_k=1 draws nothing: raise top_k or leave it out")
        return check_groups(num_experts, top_k, self.num_groups, self.top_groups)


@dataclass(frozen=True, kw_only=True)
class Gating:
    """What a gate returns: scores of all experts and the choice among them.

    ``logits_TE`` and ``probabilities_TE`` (rows sum to 1) feed the losses; ``experts_TK`` is int64, best first.
    """

    logits_TE: torch.Tensor
    probabilities_TE: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor

    def check(self, num_tokens: int, num_experts: int, top_k: int) -> None:
        """Raise unless this is ``top_k`` choices of ``num_tokens`` tokens among ``num_experts``. One pass over values.

        Raises:
            ConfigError: a wrong type, shape or dtype, or an expert that is not.
            NonFiniteError: a probability or weight is NaN or infinite, a logit NaN or +inf, or all logits of a row are
                -inf, which forbids every expert; names the row.
        """
        scores, choices = [num_tokens, num_experts], [num_tokens, top_k]
        for name, shape in (
            ("logits_TE", scores),
            ("probabilities_TE", scores),
            ("experts_TK", choices),
            ("weights_TK", choices),
        ):
            value = getattr(self, name)
            if not isinstance(value, torch.Tensor) or list(value.shape) != shape:
                told = list(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                raise ConfigError(
                    f"the gate's {name} is {told}: expected {shape}, for {num_tokens} tokens, {num_experts} experts "
                    f"and top_k={top_k}"
                )
            right = value.dtype == torch.int64 if name == "experts_TK" else value.is_floating_point()
            if not right:
                wanted = "torch.int64" if name == "experts_TK" else "floating-point numbers"
                raise ConfigError(f"the gate's {name} holds {value.dtype}: expected {wanted}")
        numbers = (self.logits_TE, self.probabilities_TE, self.weights_TK)
        good_T = torch.stack([torch.isfinite(value).all(1) for value in numbers])
        # An expert is forbidden by a logit of -inf; one at least must be left.
        good_T[0] = (self.logits_TE < torch.inf).all(1) & (self.logits_TE > -torch.inf).any(1)
        wrong_TK = (self.experts_TK < 0) | (self.experts_TK >= num_experts)
        if bool(good_T.all() & ~wrong_TK.any()):
            return
        if bool(wrong_TK.any()):
            row = int(wrong_TK.any(1).nonzero()[0])
            raise ConfigError(
                f"the gate's experts_TK names {self.experts_TK[row].tolist()} in row {row}: expected 0 to "
                f"{num_experts - 1}"
            )
        row = int((~good_T.all(0)).nonzero()[0])
        name = ("logits_TE", "probabilities_TE", "weights_TK")[good_T[:, row].tolist().index(False)]
        forbidden = name == "logits_TE" and bool((self.logits_TE[row] == -torch.inf).all())
        fault = "forbids every expert, by -inf," if forbidden else "is NaN or infinite"
        raise NonFiniteError(f"the gate's {name} {fault} in row {row}: look at the gate and what it was given")


class GateProtocol(Protocol):
    """What a user's ``gate=`` module must do: `Gate.forward`. With ``experts_TK`` it weighs that choice."""

    def __call__(
        self, x_TC: torch.Tensor, *, experts_TK: torch.Tensor | None = None, step: int | None = None
    ) -> Gating:
        """Score ``x_TC`` and choose."""


class Gate(nn.Module):
    """The router: one linear map without bias, computed in fp32 (fp64 for fp64 input) whatever autocast says.

    Equal scores go to the lower expert number. No random choice in eval; in training each depends only on (``seed``,
    step, ``layer``, the token's number): see [Note: counters] in `moe/draw`.
    """

    bias: torch.Tensor | None

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        config: GateConfig | None = None,
        *,
        seed: int = 0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = GateConfig() if config is None else config
        if not 1 <= top_k <= num_experts:
            raise ConfigError(f"top_k={top_k}: expected 1 to num_experts={num_experts}")
        self.top_groups = config.check(num_experts, top_k)
        self.config, self.top_k, self.seed, self.layer = config, top_k, seed, layer
        self.renormalize = config.renormalizes(top_k)
        weight_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=weight_dtype))
        bias = torch.zeros(num_experts, device=device, dtype=torch.float32) if config.bias_rate else None
        self.register_buffer("bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the router's weight [E, C] anew from torch's default generator; the bias of the choice becomes zero."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.config.init_std)
            if self.bias is not None:
                self.bias.zero_()

    def forward(
        self,
        x_TC: torch.Tensor,
        *,
        experts_TK: torch.Tensor | None = None,
        step: int | None = None,
        first_token: int = 0,
    ) -> Gating:
        """Scores and choice for ``x_TC``; given ``experts_TK`` that choice is weighed instead of the best.

        ``step`` keys what is drawn: the number of the micro-batch; ``first_token`` is the number of the first row among
        that micro-batch's tokens on all ranks.

        Raises:
            NonFiniteError: a row of logits holds NaN or an infinity; names it.
            ConfigError: jitter or sampling in training without ``step``.
        """
        with torch.autocast(x_TC.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(x_TC.dtype, self.weight.dtype), torch.float32)
            precise_TC = x_TC.to(dtype)
            if self.config.jitter and self.training:
                seed = self.draw_key(step, "jitter", f"gate.jitter={self.config.jitter}")
                drawn_TC = uniform(seed, first_token, x_TC.shape[0], x_TC.shape[1], x_TC.device)
                precise_TC = precise_TC * (1 + self.config.jitter * (2 * drawn_TC - 1)).to(dtype)
            logits_TE = F.linear(precise_TC, self.weight.to(dtype))
            require_finite(logits_TE, x_TC, f"router of layer {self.layer}")
            if self.config.score == "softmax":
                log_scores_TE, probabilities_TE = logits_TE, logits_TE.softmax(-1)
                scores_TE = probabilities_TE
            else:
                log_scores_TE, scores_TE = F.logsigmoid(logits_TE), logits_TE.sigmoid()
                probabilities_TE = log_scores_TE.softmax(-1)
            if experts_TK is None:
                experts_TK = self._choose(log_scores_TE.detach(), scores_TE.detach(), step, first_token)
            if self.renormalize:  # as a softmax of the chosen logarithms: tiny scores never divide zero by zero
                weights_TK = log_scores_TE.gather(1, experts_TK).softmax(-1)
            else:
                weights_TK = scores_TE.gather(1, experts_TK)
            if self.config.scale != 1.0:
                weights_TK = weights_TK * self.config.scale
        return Gating(
            logits_TE=logits_TE, probabilities_TE=probabilities_TE, experts_TK=experts_TK, weights_TK=weights_TK
        )

    @torch.no_grad()
    def update_bias(self, load_E: torch.Tensor) -> None:
        """Raise the choice's bias by ``bias_rate`` where ``load_E`` is below its mean, lower it where above.

        Call it once at the end of a step, with the choices of all its micro-batches *on all ranks*: the sum is the
        caller's, and with it every rank's bias stays the same. Nothing is moved but this buffer. Sends nothing.

        Raises:
            ConfigError: the gate has no bias, or the load is of other experts.
            NonFiniteError: the load is not finite; the bias stays as it was.
        """
        if self.bias is None:
            raise ConfigError("update_bias() of a gate without a bias: make it with GateConfig(bias_rate=0.001)")
        if load_E.shape != self.bias.shape:
            raise ConfigError(f"load of shape {list(load_E.shape)}: expected [{self.bias.numel()}], one per expert")
        load_E = load_E.to(self.bias.device, torch.float64)
        if not bool(torch.isfinite(load_E).all()):
            raise NonFiniteError(f"load {load_E.tolist()}: expected how many choices fell on each expert")
        self.bias.add_(torch.sign(load_E.mean() - load_E).to(self.bias.dtype), alpha=self.config.bias_rate)

    def draw_key(self, step: int | None, purpose: str, setting: str) -> int:
        """The key of this layer's draws for ``purpose`` in ``step``; ConfigError without a step."""
        return draw_key(self.seed, step, self.layer, purpose, setting)

    def _choose(
        self, log_scores_TE: torch.Tensor, scores_TE: torch.Tensor, step: int | None, first_token: int
    ) -> torch.Tensor:
        """The logarithms order where nothing is added to the scores: they do not saturate."""
        if self.bias is not None:
            scores_TE = log_scores_TE = scores_TE + self.bias.to(scores_TE.dtype)
        if self.config.num_groups > 1:
            allowed_TE = limit_to_groups(scores_TE, self.config.num_groups, self.top_groups)
            log_scores_TE = log_scores_TE.masked_fill(~allowed_TE, float("-inf"))
        if not (self.config.sample_second and self.training):
            return choose(log_scores_TE, self.top_k)
        first_T1 = choose(log_scores_TE, 1)
        seed = self.draw_key(step, "second", "gate.sample_second=true")
        noise_TE = gumbel(seed, first_token, len(scores_TE), scores_TE.shape[1], scores_TE.device).to(scores_TE.dtype)
        law_TE = log_scores_TE if self.bias is None else log_scores_TE.clamp_min(1e-20).log()
        drawn_TE = (law_TE + noise_TE).masked_fill(log_scores_TE == float("-inf"), float("-inf"))
        rest_TK = choose(drawn_TE.scatter(1, first_T1, float("-inf")), self.top_k - 1)
        return torch.cat([first_T1, rest_TK], 1)


def draw_key(seed: int, step: int | None, layer: int, purpose: str, setting: str) -> int:
    """The key of one purpose's draws; ConfigError, naming ``setting``, where training gives no step."""
    if step is None:
        raise ConfigError(
            f"{setting} in training needs step=: call layer(x, step=number of this micro-batch), so that a recomputed "
            "forward draws the same"
        )
    return key(seed, step, layer, *purpose.encode())


def require_finite(logits_TE: torch.Tensor, x_TC: torch.Tensor, what: str) -> None:
    """Raise NonFiniteError, naming the first bad row, unless all logits are finite."""
    if bool(torch.isfinite(logits_TE).all()):
        return
    rows = (~torch.isfinite(logits_TE).all(1)).nonzero().view(-1)
    row = int(rows[0])
    cause = (
        "its input is finite: the router's weights are not"
        if bool(torch.isfinite(x_TC[row]).all())
        else ("so is its input")
    )
    raise NonFiniteError(
        f"{what}: the logits of row {row} are NaN or infinite ({len(rows)} of {len(logits_TE)} rows), and {cause}; "
        "look at the layers before it, or lower the learning rate"
    )
