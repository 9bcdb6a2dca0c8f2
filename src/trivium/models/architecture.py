"""What a language model computes, as frozen data: every family is one value of `Architecture`, and nothing else.

No paper; DeepSpeed Inference section 3.1 and DeepSpeed-MoE section 5 compile it. Reads no file, holds no weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMS or layer norm: normalised · (offset + weight) + bias."""

    kind: Literal["rms", "layer"]
    eps: float
    weight: bool = True
    bias: bool = False
    offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of ``dim`` columns of each head from column ``first`` on; ``kind`` names the scaling.

    ``factor``, ``original_positions`` and what follows belong to some kinds only; ``attention_factor`` multiplies
    cosines and sines. ``positions`` is the length the model's config tells of.
    """

    dim: int
    theta: float
    positions: int
    first: int = 0
    interleaved: bool = False
    kind: Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"] = "default"
    factor: float = 1.0
    original_positions: int = 0
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Alibi:
    """Biases linear in the distance, one slope per head; ``rounded``: the product with the position is kept in bf16.

    ``scale`` multiplies the (rounded) bias.
    """

    slopes: tuple[float, ...]
    rounded: bool = False
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention: keys and values are made from ``kv_rank`` numbers per token.

    Queries and keys have ``nope`` columns without and ``rope`` columns with positions. ``q_rank`` None: queries come
    straight from the input.
    """

    kv_rank: int
    nope: int
    rope: int
    q_rank: int | None
    q_norm: Norm
    kv_norm: Norm


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention. ``qk_norm`` "head": each head by itself, "all": over all heads at once.

    ``qk_separate``: per-head norms whose weights differ from head to head. ``clip`` clamps q, k and v.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    q_bias: bool = False
    kv_bias: bool = False
    out_bias: bool = False
    window: int | None = None
    softcap: float | None = None
    rope: Rope | None = None
    alibi: Alibi | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    qk_norm: Literal["head", "all"] = "head"
    qk_separate: bool = False
    clip: float | None = None
    sinks: bool = False
    latent: Latent | None = None


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """A feed-forward of ``ffn_dim``, gated or plain."""

    ffn_dim: int
    activation: Activation
    gated: bool = True
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Moe:
    """Experts behind a router; the fields from ``scores`` to ``top_groups`` as `trivium.kernels.program.Gate` has them.

    ``shared`` is a dense MLP that every token passes as well; ``shared_gate``: weighed by a sigmoid of its own.
    ``mix``: the experts' sum and ``shared`` are weighed by a softmax of two logits. ``clamp``: gpt-oss's activation.
    """

    experts: int
    top_k: int
    ffn_dim: int
    activation: Activation
    gated: bool = True
    bias: bool = False
    router_bias: bool = False
    clamp: float | None = None
    scores: Literal["softmax", "sigmoid", "chosen"] = "softmax"
    renormalise: bool = False
    renormalise_eps: float = 0.0
    scale: float = 1.0
    correction: bool = False
    groups: int = 1
    top_groups: int = 1
    shared: Mlp | None = None
    shared_gate: bool = False
    mix: bool = False


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer. Norms are None where there is none.

    ``attention_norm`` and ``mlp_norm`` come before their branch, ``…_out_norm`` on what the branch puts out, and
    ``…_sum_norm`` on the residual stream after it was added. ``parallel``: both branches read the layer's input, the
    MLP through ``mlp_norm``, or through ``attention_norm`` when that is None. ``residual_after_norm``: a branch is
    added to its normed input instead of the stream.
    """

    attention: Attention
    feed_forward: Mlp | Moe
    attention_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    attention_sum_norm: Norm | None = None
    mlp_norm: Norm | None = None
    mlp_out_norm: Norm | None = None
    mlp_sum_norm: Norm | None = None
    parallel: bool = False
    residual_after_norm: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A whole model. ``positions`` > 0: a learned table of so many usable rows, the first at ``position_offset``.

    ``embed_dim`` is the embedding's width where projections lead to and from ``dim``. ``max_positions``: how long a
    sequence may be.
    """

    family: str
    vocabulary: int
    dim: int
    layers: tuple[Layer, ...]
    max_positions: int
    embed_dim: int
    embed_scale: float = 1.0
    positions: int = 0
    position_offset: int = 0
    embed_norm: Norm | None = None
    final_norm: Norm | None = None
    tied: bool = False
    head_bias: bool = False
    head_scale: float = 1.0
    head_softcap: float | None = None

    @property
    def num_moe_layers(self) -> int:
        """How many layers route tokens to experts."""
        return sum(isinstance(layer.feed_forward, Moe) for layer in self.layers)
