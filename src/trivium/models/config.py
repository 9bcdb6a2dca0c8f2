"""A decoder's shape, and the arithmetic that follows from it: parameters and FLOPs, exact integers.

ZeRO section 3 counts memory in parameters Ψ; this is where Ψ comes from. DeepSpeed-MoE sections 3 and 4: `moe`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trivium.base.errors import ConfigError
from trivium.models.moe_config import MoEConfig
from trivium.models.numbers import positive_float, positive_int


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of one decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU).

    ``kv_heads`` None means as many as ``heads``; ``head_dim`` None means ``dim / heads``. ``tied`` shares the head's
    weight with the embedding. ``init_std`` is the standard deviation of fresh weights; projections that write into the
    residual stream are divided by ``sqrt(2 · layers)`` besides. ``moe``: which layers have experts in place of the MLP.
    """

    vocabulary: int
    dim: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    ffn_dim: int
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = False
    init_std: float = 0.02
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for key in ("vocabulary", "dim", "layers", "heads", "ffn_dim", "max_positions"):
            positive_int(key, getattr(self, key))
        for key in ("kv_heads", "head_dim"):
            if getattr(self, key) is not None:
                positive_int(key, getattr(self, key))
        if self.head_dim is None and self.dim % self.heads:
            raise ConfigError(
                f"dim={self.dim} is not divisible by heads={self.heads}; choose a multiple or set head_dim"
            )
        if self.head_size % 2:
            raise ConfigError(f"head_dim={self.head_size}: rotary positions need an even number")
        if self.heads % self.kv_head_count:
            raise ConfigError(f"kv_heads={self.kv_heads}: expected a divisor of heads={self.heads}")
        for key in ("rope_theta", "norm_eps", "init_std"):
            positive_float(key, getattr(self, key))
        if not isinstance(self.tied, bool):
            raise ConfigError(f"tied={self.tied!r}: expected true or false")
        self.num_experts  # noqa: B018 - the lists of `moe` must fit the layers

    @property
    def kv_head_count(self) -> int:
        """Key/value heads, with the default filled in."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """Width of one head, with the default filled in."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def residual_init_std(self) -> float:
        """Standard deviation of the projections that write into the residual stream (attention's o, the MLP's down)."""
        return self.init_std / math.sqrt(2 * self.layers)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """Experts of every layer; 0 for a dense one. Raises ConfigError when ``moe`` does not fit ``layers``."""
        return (0,) * self.layers if self.moe is None else self.moe.per_layer(self.layers)

    @property
    def expert_dim(self) -> int:
        """Inner width of one expert, with the default filled in."""
        return self.ffn_dim if self.moe is None or self.moe.ffn_dim is None else self.moe.ffn_dim

    def num_attention_parameters(self) -> int:
        """Weights of one layer's q, k, v and o."""
        return 2 * self.dim * self.head_size * (self.heads + self.kv_head_count)

    def num_mlp_parameters(self) -> int:
        """Weights of one layer's gate, up and down."""
        return 3 * self.dim * self.ffn_dim

    def num_feed_forward_parameters(self, layer: int = 0) -> int:
        """Weights (and an expert's biases) of what follows attention in one layer: an MLP, or router and experts."""
        experts = self.num_experts[layer]
        if self.moe is None or not experts:
            return self.num_mlp_parameters()
        return self.moe.num_parameters(self.dim, self.expert_dim, experts)

    def num_activated_feed_forward_parameters(self, layer: int = 0) -> int:
        """The same, of what one token passes through: router, ``top_k`` experts, and what every token passes."""
        experts = self.num_experts[layer]
        if self.moe is None or not experts:
            return self.num_mlp_parameters()
        return self.moe.num_activated_parameters(self.dim, self.expert_dim, experts)

    def num_block_parameters(self, layer: int = 0) -> int:
        """All parameters of one layer, its two norms included."""
        return self.num_attention_parameters() + self.num_feed_forward_parameters(layer) + 2 * self.dim

    def num_embedding_parameters(self) -> int:
        """Weights of the embedding table and, unless tied, of the head."""
        return self.vocabulary * self.dim * (1 if self.tied else 2)

    def num_parameters(self) -> int:
        """All parameters, a tied weight counted once: Ψ."""
        blocks = sum(self.num_block_parameters(layer) for layer in range(self.layers))
        return self.num_embedding_parameters() + blocks + self.dim

    def num_expert_parameters(self) -> int:
        """Parameters of the routed experts alone: what expert parallelism spreads over ranks."""
        if self.moe is None:
            return 0
        return sum(self.num_experts) * self.moe.num_one_parameters(self.dim, self.expert_dim)

    def num_activated_parameters(self) -> int:
        """Parameters that one token passes through: all but the experts that it was not sent to."""
        idle = sum(
            self.num_feed_forward_parameters(layer) - self.num_activated_feed_forward_parameters(layer)
            for layer in range(self.layers)
        )
        return self.num_parameters() - idle

    def matmul_flops_per_token(self) -> int:
        """Forward FLOPs of the weight products for one token: two per weight, the head included, the look-up not.

        Of a layer with experts the router and ``top_k`` experts; biases are not counted, dropped choices are.
        """
        products = self.vocabulary * self.dim
        for experts in self.num_experts:
            products += self.num_attention_parameters()
            if self.moe is None or not experts:
                products += self.num_mlp_parameters()
            else:
                products += self.moe.num_activated_weights(self.dim, self.expert_dim, experts)
        return 2 * products

    def attention_flops_per_token(self, sequence: int) -> int:
        """Forward FLOPs of QKᵀ and the product with V for one token; the whole square counts (causality not halved)."""
        return 4 * self.layers * self.heads * self.head_size * sequence

    def forward_flops_per_token(self, sequence: int) -> int:
        """Forward FLOPs for one token in a sequence of this length."""
        return self.matmul_flops_per_token() + self.attention_flops_per_token(sequence)

    def flops_per_token(self, sequence: int) -> int:
        """Training FLOPs for one token: forward once, backward twice as much; recomputation is not counted."""
        return 3 * self.forward_flops_per_token(sequence)
