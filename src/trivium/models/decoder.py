"""The decoder: embedding, blocks, norm, head. Training and inference run this one module, each with its own `attend`.

DeepSpeed-MoE section 3.1: some blocks have experts in place of the MLP (`models/moe_block.py`).
Shapes: B batch, T sequence, C model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trivium.base.errors import ConfigError, DataError
from trivium.dist.mesh import Mesh
from trivium.models.block import Block
from trivium.models.config import DecoderConfig as DecoderConfig
from trivium.models.moe_block import MoEBlock
from trivium.moe import Aux, Routing
from trivium.nn import (
    IGNORE_INDEX,
    Attend,
    Embedding,
    Head,
    Reduction,
    RMSNorm,
    SoftTargets,
    causal,
    restarting_positions,
    rotary,
)

RunBlock = Callable[..., Any]


@dataclass(kw_only=True)
class Record:
    """What a forward tells beside its result, filled in when it is passed as ``record``.

    ``aux``: of every layer with experts, by its number, of this rank's tokens. ``cross_entropy``: the loss without the
    auxiliary losses, reduced alike; None without targets. ``divergence`` from a teacher, where there is one.
    """

    aux: dict[int, Aux] = field(default_factory=dict)
    cross_entropy: torch.Tensor | None = None
    divergence: torch.Tensor | None = None


class Decoder(nn.Module):
    """A Llama-like language model. Children: ``embed``, ``blocks``, ``norm``, ``head`` (tied: with ``embed``'s weight).

    No forward touches another module's parameters, so hooks on any module see every use of what it owns.
    ``mesh`` and ``ep`` spread experts over ranks. ``ep`` is one degree, or one for each layer with experts; None: the
    mesh's.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        mesh: Mesh | None = None,
        ep: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        std = config.init_std
        degrees = iter(expert_degrees(config, ep))
        self.embed = Embedding(config.vocabulary, config.dim, init_std=std, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(
            MoEBlock(config, i, experts, mesh=mesh, ep=next(degrees), device=device, dtype=dtype)
            if experts
            else Block(config, i, device=device, dtype=dtype)
            for i, experts in enumerate(config.num_experts)
        )
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
        routings: Mapping[int, Routing] | None = None,
        step: int | None = None,
        record: Record | None = None,
        soft: SoftTargets | None = None,
        hidden: bool = False,
    ) -> torch.Tensor:
        """Logits [B, T, V], or with targets their cross-entropy (at least fp32; -100 counts nothing).

        In training mode the loss has the experts' auxiliary losses in it: with "mean" their sum over layers, with "sum"
        that times the number of tokens that count, so that the mean over micro-batches is weighted by tokens; "none"
        and evaluation have the cross-entropy alone.

        ``targets_BT[b, t]`` is the token that should follow ``tokens_BT[b, t]``: the caller shifts. ``documents_BT``
        are integer ids; every run of equal ids attends to itself alone and its positions start from 0. ``positions_BT``
        overrides positions, ``attend`` replaces causal attention (then ``documents_BT`` only sets positions).
        ``run_block(block, x, rotary, attend, …)`` replaces the plain call of each block, say by a checkpointed one; it
        returns what the block does: a tensor, or of an `MoEBlock`, which gets ``routing`` and ``step`` besides, also
        its `Aux`. ``routings`` fixes the choice of layers by number. ``step`` keys random choices: the number of this
        micro-batch, another one on every rank. ``record`` is filled in. ``soft``: a teacher's distribution is part of
        the loss (see `SoftTargets`). ``hidden``: [B, T, C], what the head would have got.

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
        told = Record() if record is None else record
        for number, block in enumerate(self.blocks):
            arguments: tuple[Any, ...] = (x_BTC, angles, attend)
            if isinstance(block, MoEBlock):
                arguments += ((routings or {}).get(number), step)
            out = block(*arguments) if run_block is None else run_block(block, *arguments)
            x_BTC = out if isinstance(out, torch.Tensor) else out[0]
            if isinstance(block, MoEBlock):
                told.aux[number] = out[1]
        x_BTC = self.norm(x_BTC)
        if hidden:
            return x_BTC
        result: torch.Tensor = self.head(x_BTC, targets_BT, reduction, soft)
        if targets_BT is None:
            return result
        if soft is not None:
            result, told.cross_entropy, told.divergence = result.unbind()
        else:
            told.cross_entropy = result
        return self._with_aux(result, told.aux, targets_BT, reduction)

    def _with_aux(
        self, loss: torch.Tensor, aux: Mapping[int, Aux], targets_BT: torch.Tensor, reduction: Reduction
    ) -> torch.Tensor:
        if not aux or not self.training or reduction == "none":
            return loss
        extra = torch.stack([one.loss for one in aux.values()]).sum()
        return loss + (extra if reduction == "mean" else extra * (targets_BT != IGNORE_INDEX).sum())

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


def expert_degrees(config: DecoderConfig, ep: int | Sequence[int] | None) -> tuple[int | None, ...]:
    """``ep`` for each layer that has experts. Raises ConfigError when a list does not fit."""
    count = sum(experts > 0 for experts in config.num_experts)
    if ep is None or isinstance(ep, int):
        return (ep,) * count
    if len(ep) != count:
        raise ConfigError(f"ep={list(ep)}: expected one degree for each of {count} layers with experts, or one number")
    return tuple(ep)


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
