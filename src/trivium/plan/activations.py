"""Bytes that a decoder keeps from forward to backward, from its config alone.

ZeRO section 3.2 (residual states: activations); with recomputation one block's input per layer stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trivium.base.errors import ConfigError
from trivium.models import DecoderConfig

HEAD_CHUNK_TOKENS = 1024
_FP32 = 4
_CHOICE_BYTES = 12  # an expert's number and a weight


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


def saved_block_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype, layer: int = 0, degree: int = 1) -> int:
    """What autograd keeps of one block: each norm's input, its normalised input and output, q, k, v, the attention's
    output and log-sum, gate, up, silu and product. Norms work in fp32 at least. With experts: see `_saved_experts`."""
    element, heads = dtype.itemsize, config.heads * config.head_size
    wide = max(element, _FP32)
    norms = 2 * (2 * config.dim * wide + config.dim * element + wide)
    attention = (3 * heads + 2 * config.kv_head_count * config.head_size) * element + config.heads * _FP32
    experts = config.num_experts[layer]
    mlp = _saved_experts(config, experts, dtype, degree) if experts else 4 * config.ffn_dim * element
    mask = batch.sequence * element if batch.documents else 0
    return batch.tokens * (norms + attention + mlp + mask)


def _saved_experts(config: DecoderConfig, experts: int, dtype: torch.dtype, degree: int) -> int:
    """Bytes per token of one layer with ``experts`` on ``degree`` ranks, all choices kept, none more than its share.

    The router's logits and scores in fp32; of each choice what its expert needs again: in fp32 what goes into the
    activation, in 16 bits also the row, what comes out of the activation and the expert's output. Rows that came from
    other ranks, and came back, are kept besides.
    """
    moe = config.moe
    if moe is None:
        return 0
    element, width = dtype.itemsize, config.expert_dim
    entering = 2 if moe.expert == "swiglu" else 1
    whole = 4 if moe.expert == "swiglu" else 2
    fused = element >= _FP32
    row = entering * width * element if fused else (whole * width + 2 * config.dim) * element
    row += 2 * config.dim * element if degree > 1 and fused else 0
    router = 2 * experts * _FP32 + (0 if fused else config.dim * _FP32)
    always = (moe.shared if moe.residual == "none" else 1) * whole * width * element
    mixed = 2 * config.dim * element if moe.residual == "mix" else 0
    return router + moe.top_k * (row + 2 * _CHOICE_BYTES) + always + mixed


def saved_rest_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype) -> int:
    """What autograd keeps outside the blocks: tokens, targets, rotary tables, the last norm."""
    tables = 2 * (config.head_size // 2) * _FP32 * (batch.tokens if batch.documents else batch.sequence)
    return 16 * batch.tokens + tables + _last_norm_bytes(config, batch, dtype)


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes at the moments that can be the worst: backward through the head, the last block, the first (``closing``).

    Gradients of parameters are not in here, but what the head needs to sum them in fp32 is.
    """

    head: int = 0
    block: int = 0
    closing: int = 0

    @property
    def peak(self) -> int:
        """The largest."""
        return max(self.head, self.block, self.closing)


def activations(config: DecoderConfig, batch: Batch, dtype: torch.dtype, degrees: Sequence[int] = ()) -> Activations:
    """One micro-batch's activations at their worst; the softmax of one chunk of tokens exists at a time.

    ``degrees``: over how many ranks the experts of each layer that has any are spread (none given: one).
    """
    element, wide = dtype.itemsize, max(dtype.itemsize, _FP32)
    narrow = element if element < wide else 0
    spread = iter(degrees)
    each = [
        saved_block_bytes(config, batch, dtype, layer, next(spread, 1) if experts else 1)
        for layer, experts in enumerate(config.num_experts)
    ]
    saved = max(each)
    stream = batch.tokens * config.dim * element
    kept = config.layers * stream if batch.recompute else sum(each)
    kept += saved_rest_bytes(config, batch, dtype)
    alive = min(batch.tokens, HEAD_CHUNK_TOKENS)
    logits = alive * config.vocabulary * (wide + narrow)
    widened = config.vocabulary * config.dim * wide if narrow else 0
    passing = batch.tokens * _passing_width(config) * element + stream - _last_norm_bytes(config, batch, dtype)
    return Activations(
        head=kept + logits + widened + stream,
        block=kept + passing + (saved if batch.recompute else 0),
        closing=each[0] + passing + saved_rest_bytes(config, batch, dtype) - _last_norm_bytes(config, batch, dtype),
    )


def _passing_width(config: DecoderConfig) -> int:
    """Elements per token that backward through the last block's feed-forward holds beside what was saved."""
    moe = config.moe
    if moe is None or not config.num_experts[-1]:
        return 2 * config.ffn_dim
    always = moe.shared if moe.residual == "none" else 1
    return 2 * always * config.expert_dim + 2 * moe.top_k * config.dim


def _last_norm_bytes(config: DecoderConfig, batch: Batch, dtype: torch.dtype) -> int:
    wide = max(dtype.itemsize, _FP32)
    return batch.tokens * (2 * config.dim * wide + config.dim * dtype.itemsize + wide)
