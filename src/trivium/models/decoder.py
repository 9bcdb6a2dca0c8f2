"""The decoder: embedding, blocks, norm, head. Training and inference run this one module, each with its own `attend`.

Shapes: B batch, T sequence, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from trivium.base.errors import ConfigError, DataError
from trivium.models.config import DecoderConfig as DecoderConfig
from trivium.nn import (
    IGNORE_INDEX,
    MLP,
    Attend,
    Attention,
    Embedding,
    Head,
    Reduction,
    RMSNorm,
    causal,
    restarting_positions,
    rotary,
)

Rotary = tuple[torch.Tensor, torch.Tensor]
RunBlock = Callable[[nn.Module, torch.Tensor, Rotary, Attend], torch.Tensor]


class Block(nn.Module):
    """One layer: ``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(
        self,
        config: DecoderConfig,
        layer: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(
            config.dim,
            config.heads,
            config.kv_head_count,
            config.head_size,
            layer=layer,
            init_std=config.init_std,
            out_init_std=config.residual_init_std,
            device=device,
            dtype=dtype,
        )
        self.mlp_norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        self.mlp = MLP(
            config.dim,
            config.ffn_dim,
            init_std=config.init_std,
            out_init_std=config.residual_init_std,
            device=device,
            dtype=dtype,
        )

    def forward(self, x_BTC: torch.Tensor, rotary: Rotary, attend: Attend) -> torch.Tensor:
        """[B, T, C] → [B, T, C]."""
        x_BTC = x_BTC + self.attention(self.attention_norm(x_BTC), rotary, attend)
        out_BTC: torch.Tensor = x_BTC + self.mlp(self.mlp_norm(x_BTC))
        return out_BTC


class Decoder(nn.Module):
    """A Llama-like language model. Children: ``embed``, ``blocks``, ``norm``, ``head`` (tied: with ``embed``'s weight).

    No forward touches another module's parameters, so hooks on any module see every use of what it owns.
    """

    def __init__(
        self, config: DecoderConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        std = config.init_std
        self.embed = Embedding(config.vocabulary, config.dim, init_std=std, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(config, i, device=device, dtype=dtype) for i in range(config.layers))
        self.norm = RMSNorm(config.dim, eps=config.norm_eps, device=device, dtype=dtype)
        head_device = "meta" if config.tied else device  # a tied head never needs a weight of its own
        self.head = Head(config.dim, config.vocabulary, init_std=std, device=head_device, dtype=dtype)
        if config.tied:
            self.head.weight = self.embed.weight

    def forward(
        self,
        tokens_BT: torch.Tensor,
        targets_BT: torch.Tensor | None = None,
        *,
        positions_BT: torch.Tensor | None = None,
        documents_BT: torch.Tensor | None = None,
        attend: Attend | None = None,
        reduction: Reduction = "mean",
        run_block: RunBlock | None = None,
    ) -> torch.Tensor:
        """Logits [B, T, V], or with targets their cross-entropy (at least fp32; -100 counts nothing).

        ``targets_BT[b, t]`` is the token that should follow ``tokens_BT[b, t]``: the caller shifts. ``documents_BT``
        are integer ids; every run of equal ids attends to itself alone and its positions start from 0. ``positions_BT``
        overrides positions, ``attend`` replaces causal attention (then ``documents_BT`` only sets positions).
        ``run_block(block, x, rotary, attend)`` replaces the plain call of each block, say by a checkpointed one.

        Raises:
            ConfigError: shapes that disagree, or more tokens than ``max_positions``.
            DataError: a token or target outside the vocabulary (checked on the CPU, where looking is free).
        """
        self._check(tokens_BT, targets_BT, positions_BT, documents_BT)
        if positions_BT is None:
            positions_BT = default_positions(tokens_BT, documents_BT)
        angles = rotary(positions_BT, self.config.head_size, self.config.rope_theta)
        if attend is None:
            attend = causal(documents_BT)
        x_BTC: torch.Tensor = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTC = block(x_BTC, angles, attend) if run_block is None else run_block(block, x_BTC, angles, attend)
        out: torch.Tensor = self.head(self.norm(x_BTC), targets_BT, reduction)
        return out

    def _check(self, tokens: torch.Tensor, targets: torch.Tensor | None, *others: torch.Tensor | None) -> None:
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ConfigError(f"tokens have shape {tuple(tokens.shape)}: expected [batch, sequence], at least one long")
        if tokens.shape[1] > self.config.max_positions:
            raise ConfigError(
                f"sequence of {tokens.shape[1]} tokens: the model has max_positions={self.config.max_positions}; "
                f"cut the input or raise max_positions"
            )
        for name, tensor in zip(("targets", "positions", "documents"), (targets, *others), strict=True):
            if tensor is not None and tensor.shape != tokens.shape:
                raise ConfigError(f"{name} have shape {tuple(tensor.shape)}, the tokens {tuple(tokens.shape)}")
        if torch.compiler.is_compiling():
            return
        check_ids("token", tokens, self.config.vocabulary)
        if targets is not None:
            check_ids("target", targets, self.config.vocabulary, allowed=IGNORE_INDEX)


def default_positions(tokens_BT: torch.Tensor, documents_BT: torch.Tensor | None) -> torch.Tensor:
    """0, 1, 2, … along each row, starting again with each document. Without documents [1, T], which broadcasts."""
    if documents_BT is not None:
        return restarting_positions(documents_BT)
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None]


def check_ids(what: str, ids_BT: torch.Tensor, vocabulary: int, *, allowed: int | None = None) -> None:
    """Raise DataError for an id outside ``[0, vocabulary)``, naming its place; on the CPU, where no stream waits."""
    if ids_BT.device.type != "cpu" or type(ids_BT) is not torch.Tensor or ids_BT.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids_BT))
    if low >= 0 and high < vocabulary:
        return
    wrong_BT = (ids_BT < 0) | (ids_BT >= vocabulary)
    if allowed is not None:
        wrong_BT &= ids_BT != allowed
    places = wrong_BT.nonzero()
    if len(places):
        row, column = (int(place) for place in places[0])
        extra = "" if allowed is None else f" or {allowed}"
        raise DataError(
            f"{what} {int(ids_BT[row, column])} at row {row}, column {column} ({len(places)} such ids): "
            f"expected 0 to {vocabulary - 1}{extra}; is this the tokenizer the model was made for?"
        )
