"""Which experts every token goes to, as a value: it comes back from a layer and can be passed in again.

DeepSpeed-MoE section 3.1 (top-1 gating; top-k as an option). T tokens, K choices per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trivium.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The choice of one layer for its tokens on this rank, best expert first.

    ``experts_TK`` (int64) are global expert numbers, ``weights_TK`` (at least fp32) what their outputs are multiplied
    by, ``kept_TK`` (bool) False where the expert was full. Replayed, it fixes experts and drops; weights are computed
    anew from the scores, so that the router keeps its gradient.
    """

    experts_TK: torch.Tensor
    weights_TK: torch.Tensor
    kept_TK: torch.Tensor

    def detach(self) -> Routing:
        """The same routing without its autograd graph, to keep or to send."""
        return Routing(experts_TK=self.experts_TK, weights_TK=self.weights_TK.detach(), kept_TK=self.kept_TK)

    def check(self, num_tokens: int, num_experts: int) -> None:
        """Raise ConfigError unless this routing fits ``num_tokens`` tokens and ``num_experts`` experts."""
        shape = self.experts_TK.shape
        if len(shape) != 2 or shape[0] != num_tokens or self.kept_TK.shape != shape:
            raise ConfigError(
                f"routing of experts {list(shape)} and kept {list(self.kept_TK.shape)}: expected [{num_tokens}, k] "
                f"for {num_tokens} tokens; replay a routing only on the tokens that it was made for"
            )
        if self.experts_TK.dtype != torch.int64 or self.kept_TK.dtype != torch.bool:
            raise ConfigError(
                f"routing has experts of {self.experts_TK.dtype} and kept of {self.kept_TK.dtype}: "
                "expected torch.int64 and torch.bool"
            )
        if self.experts_TK.numel():
            low, high = (int(bound) for bound in torch.aminmax(self.experts_TK))
            if low < 0 or high >= num_experts:
                raise ConfigError(f"routing names expert {low if low < 0 else high}: expected 0 to {num_experts - 1}")
