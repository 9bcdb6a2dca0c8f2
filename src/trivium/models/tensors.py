"""Every weight of an `Architecture` by its canonical name, with its shape: what a family's name map must provide.

Weights are [outputs, inputs]. ``layers.{i}.`` stands before a layer's names, ``experts.{e}.`` before an expert's.
"""

from __future__ import annotations

from collections.abc import Iterator

from trivium.models.architecture import Architecture, Attention, Layer, Mlp, Moe, Norm

Named = Iterator[tuple[str, tuple[int, ...]]]


def tensors(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Canonical name → shape, in the order in which a step reads them. A tied head is not listed."""
    found: dict[str, tuple[int, ...]] = {"embed.weight": (model.vocabulary, model.embed_dim)}
    if model.embed_dim != model.dim:
        found["embed_in.weight"] = (model.dim, model.embed_dim)
    if model.positions:
        found["positions.weight"] = (model.positions + model.position_offset, model.dim)
    found.update(_norm("embed_norm", model.embed_norm, model.dim))
    for index, layer in enumerate(model.layers):
        found.update((f"layers.{index}.{name}", shape) for name, shape in _layer(layer, model.dim))
    found.update(_norm("norm", model.final_norm, model.dim))
    if model.embed_dim != model.dim:
        found["embed_out.weight"] = (model.embed_dim, model.dim)
    if not model.tied:
        found["head.weight"] = (model.vocabulary, model.embed_dim)
    if model.head_bias:
        found["head.bias"] = (model.vocabulary,)
    return found


def _norm(name: str, norm: Norm | None, width: int) -> Named:
    if norm is not None and norm.weight:
        yield f"{name}.weight", (width,)
    if norm is not None and norm.bias:
        yield f"{name}.bias", (width,)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Named:
    yield f"{name}.weight", (rows, columns)
    if bias:
        yield f"{name}.bias", (rows,)


def _layer(layer: Layer, dim: int) -> Named:
    yield from _norm("attention_norm", layer.attention_norm, dim)
    yield from _attention(layer.attention, dim)
    yield from _norm("attention_out_norm", layer.attention_out_norm, dim)
    yield from _norm("attention_sum_norm", layer.attention_sum_norm, dim)
    yield from _norm("mlp_norm", layer.mlp_norm, dim)
    if isinstance(layer.feed_forward, Moe):
        yield from _moe(layer.feed_forward, dim)
    else:
        yield from _mlp("mlp", layer.feed_forward, dim)
    yield from _norm("mlp_out_norm", layer.mlp_out_norm, dim)
    yield from _norm("mlp_sum_norm", layer.mlp_sum_norm, dim)


def _attention(attention: Attention, dim: int) -> Named:
    query, value = attention.heads * attention.head_dim, attention.heads * attention.value_dim
    latent = attention.latent
    if latent is not None:
        if latent.q_rank is None:
            yield from _linear("attention.q", query, dim, False)
        else:
            yield from _linear("attention.q_a", latent.q_rank, dim, attention.q_bias)
            yield from _norm("attention.q_a_norm", latent.q_norm, latent.q_rank)
            yield from _linear("attention.q", query, latent.q_rank, False)
        yield from _linear("attention.kv_a", latent.kv_rank + latent.rope, dim, attention.kv_bias)
        yield from _norm("attention.kv_a_norm", latent.kv_norm, latent.kv_rank)
        yield "attention.k.weight", (attention.heads * latent.nope, latent.kv_rank)
        yield "attention.v.weight", (value, latent.kv_rank)
    else:
        keys = attention.kv_heads * attention.head_dim
        yield from _linear("attention.q", query, dim, attention.q_bias)
        yield from _linear("attention.k", keys, dim, attention.kv_bias)
        yield from _linear("attention.v", attention.kv_heads * attention.value_dim, dim, attention.kv_bias)
        yield from _head_norm("attention.q_norm", attention, attention.q_norm, attention.heads)
        yield from _head_norm("attention.k_norm", attention, attention.k_norm, attention.kv_heads)
    if attention.sinks:
        yield "attention.sinks", (attention.heads,)
    yield from _linear("attention.o", dim, value, attention.out_bias)


def _head_norm(name: str, attention: Attention, norm: Norm | None, heads: int) -> Named:
    for full, _ in _norm(name, norm, 0):
        if attention.qk_separate:
            yield full, (heads, attention.head_dim)
        else:
            yield full, (attention.head_dim if attention.qk_norm == "head" else heads * attention.head_dim,)


def _mlp(name: str, mlp: Mlp, dim: int) -> Named:
    if mlp.gated:
        yield from _linear(f"{name}.gate", mlp.ffn_dim, dim, mlp.bias)
    yield from _linear(f"{name}.up", mlp.ffn_dim, dim, mlp.bias)
    yield from _linear(f"{name}.down", dim, mlp.ffn_dim, mlp.bias)


def _moe(moe: Moe, dim: int) -> Named:
    yield from _linear("router", moe.experts, dim, moe.router_bias)
    if moe.correction:
        yield "router.correction", (moe.experts,)
    each = Mlp(ffn_dim=moe.ffn_dim, activation=moe.activation, gated=moe.gated, bias=moe.bias)
    for expert in range(moe.experts):
        yield from _mlp(f"experts.{expert}", each, dim)
    if moe.shared is not None:
        yield from _mlp("shared", moe.shared, dim)
    if moe.shared_gate:
        yield "shared_gate.weight", (1, dim)
    if moe.mix:
        yield from _linear("mix", 2, dim, True)
