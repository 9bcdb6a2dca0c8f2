"""Score the experts for every token in fp32 and choose the best: the router.

DeepSpeed-MoE section 3.1. T tokens, C model width, E experts, K choices per token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from trivium.base.errors import ConfigError, NonFiniteError


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How scores become weights.

    ``score``: of a softmax over the experts, or of each expert's own sigmoid. ``renormalize``: divide a token's chosen
    scores by their sum (None: yes for top-k above 1). ``jitter``: in training the router's input is multiplied by
    uniform noise from [1 - jitter, 1 + jitter].
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool | None = None
    jitter: float = 0.0
    init_std: float = 0.02


@dataclass(frozen=True, kw_only=True)
class Gating:
    """What a gate returns: scores of all experts and the choice among them.

    ``logits_TE`` and ``probabilities_TE`` (rows sum to 1) feed the losses; ``experts_TK`` is int64, best first.
    """

    logits_TE: torch.Tensor
    probabilities_TE: torch.Tensor
    experts_TK: torch.Tensor
    weights_TK: torch.Tensor


class GateProtocol(Protocol):
    """What a user's ``gate=`` module must do: `Gate.forward`. With ``experts_TK`` it weighs that choice."""

    def __call__(
        self, x_TC: torch.Tensor, *, experts_TK: torch.Tensor | None = None, step: int | None = None
    ) -> Gating:
        """Score ``x_TC`` and choose."""


class Gate(nn.Module):
    """The router: one linear map without bias, computed in fp32 (fp64 for fp64 input) whatever autocast says.

    Equal logits go to the lower expert number. No random choice in eval; in training noise depends only on
    (``seed``, step, ``layer``).
    """

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
        if config.score not in ("softmax", "sigmoid"):
            raise ConfigError(f"gate.score={config.score!r}: expected 'softmax' or 'sigmoid'")
        if not 0.0 <= config.jitter < 1.0:
            raise ConfigError(f"gate.jitter={config.jitter}: expected 0 or more and below 1")
        if config.renormalize and top_k == 1:
            raise ConfigError(
                "gate.renormalize=true with top_k=1 makes every weight 1, and the router would learn nothing: "
                "leave it out or raise top_k"
            )
        self.config, self.top_k, self.seed, self.layer = config, top_k, seed, layer
        self.renormalize = top_k > 1 if config.renormalize is None else config.renormalize
        weight_dtype = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=weight_dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the router's weight [E, C] anew from torch's default generator."""
        with torch.no_grad():
            self.weight.normal_(0.0, self.config.init_std)

    def forward(self, x_TC: torch.Tensor, *, experts_TK: torch.Tensor | None = None, step: int | None = None) -> Gating:
        """Scores and choice for ``x_TC``; given ``experts_TK`` that choice is weighed instead of the best.

        ``step`` keys the noise: the number of the micro-batch, counted over all ranks if noise shall differ on them.

        Raises:
            NonFiniteError: a row of logits holds NaN or an infinity; names it.
            ConfigError: jitter in training without ``step``.
        """
        with torch.autocast(x_TC.device.type, enabled=False):
            dtype = torch.promote_types(torch.promote_types(x_TC.dtype, self.weight.dtype), torch.float32)
            precise_TC = x_TC.to(dtype)
            if self.config.jitter and self.training:
                precise_TC = precise_TC * self._noise(precise_TC, step)
            logits_TE = F.linear(precise_TC, self.weight.to(dtype))
            require_finite(logits_TE, x_TC, f"router of layer {self.layer}")
            if experts_TK is None:
                experts_TK = choose(logits_TE.detach(), self.top_k)
            if self.config.score == "softmax":
                log_scores_TE, probabilities_TE = logits_TE, logits_TE.softmax(-1)
                scores_TE = probabilities_TE
            else:
                log_scores_TE, scores_TE = F.logsigmoid(logits_TE), logits_TE.sigmoid()
                probabilities_TE = log_scores_TE.softmax(-1)
            if self.renormalize:  # as a softmax of the chosen logarithms: tiny scores never divide zero by zero
                weights_TK = log_scores_TE.gather(1, experts_TK).softmax(-1)
            else:
                weights_TK = scores_TE.gather(1, experts_TK)
        return Gating(
            logits_TE=logits_TE, probabilities_TE=probabilities_TE, experts_TK=experts_TK, weights_TK=weights_TK
        )

    def _noise(self, x_TC: torch.Tensor, step: int | None) -> torch.Tensor:
        if step is None:
            raise ConfigError(
                f"gate.jitter={self.config.jitter} in training needs step=: call layer(x, step=number of this "
                "micro-batch), so that a recomputed forward draws the same noise"
            )
        generator = torch.Generator().manual_seed(key(self.seed, step, self.layer))
        drawn_TC = torch.rand(x_TC.shape, generator=generator, dtype=torch.float32)
        return (1 + self.config.jitter * (2 * drawn_TC - 1)).to(x_TC.device, x_TC.dtype)


def key(*numbers: int) -> int:
    """One 63-bit seed from several integers; neighbouring ones give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def choose(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """The ``top_k`` greatest of each row, greatest first, ties to the lower index. [T, E] → int64 [T, K]."""
    left_TE = logits_TE
    chosen: list[torch.Tensor] = []
    for choice in range(top_k):
        if choice:
            left_TE = left_TE.scatter(1, chosen[-1], float("-inf"))
        chosen.append(left_TE.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


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
