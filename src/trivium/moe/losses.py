"""What keeps a router even and its logits small. Returned to the caller, never collected behind its back.

DeepSpeed-MoE section 3.1: load balance E · Σ_e mean(gate_e) · mean(mask_e), weight 0.01.

T tokens, E experts, K choices.
"""

from __future__ import annotations

import torch


def load_balance(probabilities_TE: torch.Tensor, experts_TK: torch.Tensor) -> torch.Tensor:
    """1 for a uniform router, up to E when one expert takes all; 0 without tokens. Gradient through the gate only.

    The mask counts choices before any are dropped, K per token, and is divided by K.
    """
    num_tokens, num_experts = probabilities_TE.shape
    if num_tokens == 0:
        return probabilities_TE.sum()
    load_E = torch.bincount(experts_TK.reshape(-1), minlength=num_experts).to(probabilities_TE.dtype)
    return num_experts * (probabilities_TE.mean(0) * (load_E / experts_TK.numel())).sum()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of the squared log-sum-exp of their logits; 0 without tokens."""
    if logits_TE.shape[0] == 0:
        return logits_TE.sum()
    return logits_TE.logsumexp(-1).square().mean()


def entropy(probabilities_TE: torch.Tensor) -> torch.Tensor:
    """Mean entropy in nats of the tokens' score distributions (log E when undecided); 0 without tokens. Detached."""
    probabilities_TE = probabilities_TE.detach()
    if probabilities_TE.shape[0] == 0:
        return probabilities_TE.sum()
    entropy_T: torch.Tensor = torch.special.entr(probabilities_TE).sum(-1)
    return entropy_T.mean()
