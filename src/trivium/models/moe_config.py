"""Which layers of a decoder have experts, how many, and how they are chosen: the ``[model.moe]`` table.

DeepSpeed-MoE sections 3.1 (MoE-128), 4.1 (pyramid and residual); its sizes are exact integers here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from trivium.base.errors import ConfigError
from trivium.dist.exchange import ExchangeConfig
from trivium.models.numbers import positive_int
from trivium.moe import CapacityConfig, GateConfig


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Experts in place of the MLP of some layers.

    ``experts``: how many in each such layer; one number, or a list with one for each (a pyramid: ``[32, 32, 64]``).
    ``layers``: which layers, counted from 0; None: every other one, beginning with the second.
    ``ffn_dim``: inner width of one expert; None: the decoder's. ``expert``: ``swiglu``, or ``gelu`` with biases, the
    feed-forward of the paper's models (8·dim² + 5·dim parameters at ffn_dim = 4·dim).
    ``residual``: a dense MLP of one expert's size that every token passes, its output added, or the two mixed by a
    learned softmax. ``shared``: instead, so many experts' width that every token passes, added.
    ``capacity`` None: nothing is dropped. ``balance_weight``, ``z_weight``: of the two losses, averaged over layers'
    tokens and added up over layers. ``exchange``: how rows travel where experts are spread over ranks; results are
    equal bit for bit.
    """

    experts: int | tuple[int, ...]
    layers: tuple[int, ...] | None = None
    top_k: int = 1
    ffn_dim: int | None = None
    expert: Literal["swiglu", "gelu"] = "swiglu"
    residual: Literal["none", "add", "mix"] = "none"
    shared: int = 0
    capacity: CapacityConfig | None = None
    gate: GateConfig = field(default_factory=GateConfig)
    balance_weight: float = 0.01
    z_weight: float = 0.0
    exchange: ExchangeConfig = field(default_factory=ExchangeConfig)

    def __post_init__(self) -> None:
        positive_int("moe.top_k", self.top_k)
        for number in (self.experts,) if isinstance(self.experts, int) else self.experts:
            positive_int("moe.experts", number)
            if self.top_k > number:
                raise ConfigError(f"moe.top_k={self.top_k}: expected 1 to moe.experts={number}")
            self.gate.check(number, self.top_k)
        if isinstance(self.experts, tuple) and not self.experts:
            raise ConfigError("moe.experts=[]: expected a number, or a list with one for each layer that has experts")
        if self.ffn_dim is not None:
            positive_int("moe.ffn_dim", self.ffn_dim)
        for key, value, allowed in (
            ("expert", self.expert, ("swiglu", "gelu")),
            ("residual", self.residual, ("none", "add", "mix")),
        ):
            if value not in allowed:
                raise ConfigError(f"moe.{key}={value!r}: expected {' or '.join(map(repr, allowed))}")
        if isinstance(self.shared, bool) or not isinstance(self.shared, int) or self.shared < 0:
            raise ConfigError(f"moe.shared={self.shared!r}: expected 0 or a number of experts")
        if self.shared and self.residual != "none":
            raise ConfigError(
                f"moe.shared={self.shared} and moe.residual={self.residual!r}: both are a dense MLP beside the "
                "experts; leave one out"
            )
        for key in ("balance_weight", "z_weight"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"moe.{key}={getattr(self, key)}: expected 0 or more")

    def per_layer(self, layers: int) -> tuple[int, ...]:
        """Experts of each of ``layers`` layers, 0 for a dense one. Raises ConfigError when the lists do not fit."""
        places = tuple(range(1, layers, 2)) if self.layers is None else self.layers
        if list(places) != sorted(set(places)) or (places and not 0 <= places[0] <= places[-1] < layers):
            raise ConfigError(
                f"moe.layers={list(places)}: expected different numbers in ascending order from 0 to {layers - 1}"
            )
        if not places:
            raise ConfigError(
                f"no layer has experts: {layers} layer(s), and moe.layers "
                + ("is every other one, beginning with the second" if self.layers is None else "is empty")
            )
        counts = (self.experts,) * len(places) if isinstance(self.experts, int) else self.experts
        if len(counts) != len(places):
            raise ConfigError(
                f"moe.experts lists {len(counts)} layers, but {len(places)} of {layers} have experts "
                f"({_shown(places)}): list one number for each, or set moe.layers"
            )
        found = [0] * layers
        for place, count in zip(places, counts, strict=True):
            found[place] = count
        return tuple(found)

    def node_of(self, degree: int) -> int:
        """How many neighbours of ``degree`` ranks on one host, or as `exchange` says, a hierarchy takes together; 1: it
        is flat. Raises ConfigError where the exchange cannot be had."""
        kind, node, least = self.exchange.kind, self.exchange.node, self.exchange.crossover_bytes
        if kind == "coordinated" and degree > 1:
            raise ConfigError(
                "moe.exchange.kind='coordinated' needs a tensor axis, which a decoder's training has not: take 'auto', "
                "'flat' or 'hierarchical'"
            )
        if kind == "flat" or degree == 1 or (kind == "auto" and (degree < 4 or least is None)):
            return 1
        if kind == "auto" and (node is None or not 1 < node < degree):
            return 1
        node = degree if node is None else node
        if degree % node:
            raise ConfigError(f"moe.exchange.node={node} does not divide the {degree} ranks that share the experts")
        return node

    def num_one_parameters(self, dim: int, ffn_dim: int) -> int:
        """Parameters of one expert."""
        return 3 * dim * ffn_dim if self.expert == "swiglu" else 2 * dim * ffn_dim + dim + ffn_dim

    def num_always_parameters(self, dim: int, ffn_dim: int) -> int:
        """Parameters of what every token passes beside router and experts: residual or shared MLP, and its mixer."""
        if self.residual == "none":
            return self.num_one_parameters(dim, self.shared * ffn_dim) if self.shared else 0
        return self.num_one_parameters(dim, ffn_dim) + (2 * dim + 2 if self.residual == "mix" else 0)

    def num_parameters(self, dim: int, ffn_dim: int, experts: int) -> int:
        """Parameters of one layer: router, experts, and what every token passes."""
        one = self.num_one_parameters(dim, ffn_dim)
        return dim * experts + experts * one + self.num_always_parameters(dim, ffn_dim)

    def num_activated_parameters(self, dim: int, ffn_dim: int, experts: int) -> int:
        """Parameters of one layer that one token passes through."""
        one = self.num_one_parameters(dim, ffn_dim)
        return dim * experts + self.top_k * one + self.num_always_parameters(dim, ffn_dim)

    def num_activated_weights(self, dim: int, ffn_dim: int, experts: int) -> int:
        """The same without biases: what is multiplied."""
        matrices = 3 if self.expert == "swiglu" else 2
        always = self.shared if self.residual == "none" else 1
        mixer = 2 * dim if self.residual == "mix" else 0
        return dim * experts + (self.top_k + always) * matrices * dim * ffn_dim + mixer


def _shown(places: Sequence[int]) -> str:
    told = ", ".join(map(str, places[:6]))
    return told if len(places) <= 6 else f"{told}, …"
