"""Building blocks of a decoder: each initialises its own direct parameters (`reset_parameters`); none holds buffers."""

from __future__ import annotations

from trivium.nn.attention import Attend, Attention, CacheSpec, causal, document_mask
from trivium.nn.embedding import Embedding
from trivium.nn.head import IGNORE_INDEX, Head, Reduction
from trivium.nn.linear import Linear
from trivium.nn.mlp import MLP
from trivium.nn.norm import RMSNorm
from trivium.nn.rope import document_starts, restarting_positions, rotary, rotate
from trivium.nn.soft_loss import SoftTargets

__all__ = [
    "IGNORE_INDEX",
    "MLP",
    "Attend",
    "Attention",
    "CacheSpec",
    "Embedding",
    "Head",
    "Linear",
    "RMSNorm",
    "Reduction",
    "SoftTargets",
    "causal",
    "document_mask",
    "document_starts",
    "restarting_positions",
    "rotary",
    "rotate",
]
