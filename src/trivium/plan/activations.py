"""Bytes that a decoder keeps from forward to backward, from its config alone.

ZeRO section 3.2 (residual states: activations); with recomputation one block's input per layer stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig

HEAD_CHUNK_TOKENS = 1024
_FP32 = 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: ``rows`` sequences of ``sequence`` tokens.

    ``recompute``: blocks are checkpointed. ``documents``: packed rows, whose attention takes a mask.
    """

    rows: int = 1
    sequence: int = 2048
    recompute: bool = False
    documents: bool = False

    def __post_init__(self) -> None:
        for name, value in (("micro-batch", self.rows), ("sequence", self.sequence)):
            if value < 1:
                raise ConfigError(f"{name}={value}: expected at least 1")

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.rows * self.sequence


def saved_block_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype) -> int:
    """What autograd keeps of one block: each norm's input, its normalised input and output, q, k, v, the attention's
    output and log-sum, gate, up, silu and product. Norms work in fp32 at least."""
    element, heads = dtype.itemsize, config.heads * config.head_size
    wide = max(element, _FP32)
    norms = 2 * (2 * config.dim * wide + config.dim * element + wide)
    attention = (3 * heads + 2 * config.kv_head_count * config.head_size) * element + config.heads * _FP32
    mlp = 4 * config.ffn_dim * element
    mask = batch.sequence * element if batch.documents else 0
    return batch.tokens * (norms + attention + mlp + mask)


def saved_rest_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype) -> int:
    """What autograd keeps outside the blocks: tokens, rotary tables, the last norm, and a single chunk's softmax."""
    element, wide = dtype.itemsize, max(dtype.itemsize, _FP32)
    norm = 2 * config.dim * wide + config.dim * element + wide
    tables = 2 * (config.head_size // 2) * _FP32 * (batch.tokens if batch.documents else batch.sequence)
    softmax = batch.tokens * config.vocabulary * wide if batch.tokens <= HEAD_CHUNK_TOKENS else 0
    return batch.tokens * (norm + 16) + tables + softmax


def activation_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype) -> int:
    """The peak of one micro-batch: what is kept, and the larger of what the head or one block needs on top."""
    element, wide = dtype.itemsize, max(dtype.itemsize, _FP32)
    block = saved_block_bytes(config, batch, dtype)
    kept = config.layers * (batch.tokens * config.dim * element if batch.recompute else block)
    chunk = min(batch.tokens, HEAD_CHUNK_TOKENS) * config.vocabulary
    head = chunk * (wide + (element if element < wide else 0)) if batch.tokens > HEAD_CHUNK_TOKENS else 0
    head += config.vocabulary * config.dim * wide + batch.tokens * config.dim * element
    passing = batch.tokens * (3 * config.ffn_dim + 2 * config.dim) * element + (block if batch.recompute else 0)
    return kept + saved_rest_bytes(config, batch, dtype) + max(head, passing)
