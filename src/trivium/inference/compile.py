"""An architecture and its weights become one flat program: no Python between operations when it runs.

DeepSpeed Inference section 3.1. Its four regions are visible in the list: norm + fused q, k, v (+ their norms and
rotation); attention; output projection + residual; norm + first half of the MLP, second half + residual.

[Note: registers] x is the residual stream, h a branch's normed input, t what a branch puts out before its norm. wide
holds queries, keys and values during attention and the MLP's inner columns afterwards: their lives never overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trivium.inference.latent import attend_latent
from trivium.inference.program_builder import Builder, Keep, Pack, Slot
from trivium.kernels.matrix import Matrix
from trivium.kernels.program import (
    Attend,
    CacheSpec,
    Combine,
    Embed,
    Expert,
    Experts,
    Gate,
    Gated,
    Linear,
    Program,
    Rope,
    Rows,
    Span,
)
from trivium.models import architecture as arch
from trivium.models.architecture import Architecture


def compile_program(
    architecture: Architecture,
    get: Callable[[str], torch.Tensor],
    *,
    pack: Pack,
    keep: Keep | None = None,
    max_positions: int | None = None,
    slots: list[Slot] | None = None,
) -> Program:
    """The step of ``architecture`` with the weights that ``get`` returns by canonical name, each asked for in order.

    ``pack(name, weight)`` makes the matrix that a kernel reads; fused projections arrive as one weight under a name of
    their own. ``keep`` says where vectors and tables live (None: where they were made). ``max_positions`` is how many
    positions tables hold (None: the architecture's). ``slots`` is filled with what was made of which tensors, so that
    weights can be replaced later.
    """
    positions = architecture.max_positions if max_positions is None else max_positions
    build = Builder(get=get, pack=pack, keep=keep or _as_it_is, positions=positions, slots=slots)
    x = build.span("x", architecture.dim)
    _embed(build, architecture, x)
    for index, layer in enumerate(architecture.layers):
        _Layer(build, architecture.dim, index, layer).emit(x)
    hidden, logits = _head(build, architecture, x)
    return Program(
        widths=build.widths,
        operations=tuple(build.operations),
        caches=tuple(cache_spec(layer.attention) for layer in architecture.layers),
        logits=logits,
        hidden=hidden,
        num_moe_layers=build.num_moe_layers,
    )


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def cache_spec(attention: arch.Attention) -> CacheSpec:
    """What a layer keeps per token."""
    if attention.latent is not None:
        width = attention.latent.kv_rank + attention.latent.rope
        return CacheSpec(kv_heads=1, head_dim=width, value_dim=0, window=attention.window)
    return CacheSpec(
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        value_dim=attention.value_dim,
        window=attention.window,
    )


def _embed(build: Builder, model: Architecture, x: Span) -> None:
    names = ("embed.weight", "embed_in.weight") if model.embed_dim != model.dim else ("embed.weight",)
    table = build.tensor("embed.table", names, _projected_table)
    positions = build.tensor("positions.weight", ("positions.weight",)) if model.positions else None
    build.add(
        Embed(out=x, table=table, scale=model.embed_scale, positions=positions, position_offset=model.position_offset)
    )
    build.norm("embed_norm", model.embed_norm, x, x)


def _projected_table(parts: list[torch.Tensor]) -> torch.Tensor:
    """The table; a projection that follows it is folded in."""
    return parts[0] if len(parts) == 1 else (parts[0].float() @ parts[1].float().t()).to(parts[0].dtype)


def _head(build: Builder, model: Architecture, x: Span) -> tuple[Span, Span]:
    last = build.span("last", model.dim)
    build.add(Rows(x=x, out=last))
    build.norm("norm", model.final_norm, last, last)
    if model.embed_dim != model.dim:
        narrow = build.span("narrow", model.embed_dim)
        build.add(Linear(x=last, out=narrow, weight=build.matrix("embed_out.weight")))
        last = narrow
    logits = build.span("logits", model.vocabulary)
    weight = build.matrix("head.weight", ("embed.weight",)) if model.tied else build.matrix("head.weight")
    bias = build.vector("head.bias") if model.head_bias else None
    build.add(Linear(x=last, out=logits, weight=weight, bias=bias, scale=model.head_scale))
    if model.head_softcap is not None:
        build.add(Combine(kind="softcap", a=logits, out=logits, scale=model.head_softcap))
    return last, logits


@dataclass(frozen=True)
class _Layer:
    """Emits one layer's operations."""

    build: Builder
    dim: int
    index: int
    layer: arch.Layer

    @property
    def _at(self) -> str:
        return f"layers.{self.index}."

    def emit(self, x: Span) -> None:
        """x → x."""
        layer, h = self.layer, self.build.span("h", self.dim)
        attended = self._normed("attention_norm", layer.attention_norm, x, h)
        inner = self._attend(attended)
        if layer.parallel:
            mixed = attended
            if layer.mlp_norm is not None:
                mixed = self._normed("mlp_norm", layer.mlp_norm, x, self.build.span("h2", self.dim))
            self._branch("attention", inner, x, x, layer.attention_out_norm, layer.attention_sum_norm)
        else:
            residual = attended if layer.residual_after_norm else x
            self._branch("attention", inner, x, residual, layer.attention_out_norm, layer.attention_sum_norm)
            mixed = self._normed("mlp_norm", layer.mlp_norm, x, h)
        feed = self._moe(mixed) if isinstance(layer.feed_forward, arch.Moe) else self._mlp(mixed)
        residual = mixed if layer.residual_after_norm else x
        self._branch("mlp", feed, x, residual, layer.mlp_out_norm, layer.mlp_sum_norm)

    def _normed(self, name: str, norm: arch.Norm | None, x: Span, out: Span) -> Span:
        """Where the normed x is: in ``out``, or x itself without a norm."""
        if norm is None:
            return x
        self.build.norm(self._at + name, norm, x, out)
        return out

    def _branch(
        self,
        name: str,
        emit: Callable[[Span, Span | None], None],
        x: Span,
        residual: Span,
        out_norm: arch.Norm | None,
        sum_norm: arch.Norm | None,
    ) -> None:
        """x = sum_norm(residual + out_norm(branch))."""
        if out_norm is None:
            emit(x, residual)
        else:
            t = self.build.span("t", self.dim)
            emit(t, None)
            self.build.norm(f"{self._at}{name}_out_norm", out_norm, t, t)
            self.build.add(Combine(kind="add", a=residual, b=t, out=x))
        self.build.norm(f"{self._at}{name}_sum_norm", sum_norm, x, x)

    def _attend(self, x: Span) -> Callable[[Span, Span | None], None]:
        """Everything up to the output projection, which the returned function emits."""
        attention, build, at = self.layer.attention, self.build, self._at + "attention."
        mixed = build.span("mixed", attention.heads * attention.value_dim)
        if attention.latent is not None:
            attend_latent(build, at, self.index, attention, attention.latent, x, mixed)
        else:
            self._attend_heads(at, attention, x, mixed)
        weight = build.matrix(at + "o.weight")
        bias = build.vector(at + "o.bias") if attention.out_bias else None
        return lambda out, add: build.add(Linear(x=mixed, out=out, weight=weight, bias=bias, add=add))

    def _attend_heads(self, at: str, attention: arch.Attention, x: Span, mixed: Span) -> None:
        build, width = self.build, attention.head_dim
        queries, keys = attention.heads * width, attention.kv_heads * width
        qkv = build.span("wide", queries + keys + attention.kv_heads * attention.value_dim)
        q, k, v = split(qkv, queries, keys)
        names = tuple(f"{at}{one}.weight" for one in "qkv")
        bias = None
        if attention.q_bias or attention.kv_bias:
            given = (attention.q_bias, attention.kv_bias, attention.kv_bias)
            biases = tuple(f"{at}{one}.bias" if has else None for one, has in zip("qkv", given, strict=True))
            bias = build.joined_vector(at + "qkv.bias", biases, (q.width, k.width, v.width))
        build.add(Linear(x=x, out=qkv, weight=build.matrix(at + "qkv.weight", names), bias=bias))
        self._prepare(at, attention, qkv, q, k)
        slopes, biases_HP = build.alibi(attention.alibi)
        build.add(
            Attend(
                q=q,
                k=k,
                v=v,
                out=mixed,
                cache=self.index,
                heads=attention.heads,
                kv_heads=attention.kv_heads,
                head_dim=width,
                value_dim=attention.value_dim,
                scale=attention.scale,
                window=attention.window,
                softcap=attention.softcap,
                slopes=slopes,
                biases=biases_HP,
                sinks=build.vector(at + "sinks") if attention.sinks else None,
            )
        )

    def _prepare(self, at: str, attention: arch.Attention, qkv: Span, q: Span, k: Span) -> None:
        """Norms, clamp and rotation of queries and keys, in place."""
        build, width = self.build, attention.head_dim
        for name, norm, span in (("q_norm", attention.q_norm, q), ("k_norm", attention.k_norm, k)):
            build.norm(at + name, norm, span, span, group=width if attention.qk_norm == "head" else span.width)
        if attention.clip is not None:
            build.add(Combine(kind="clip", a=qkv, out=qkv, scale=attention.clip))
        if attention.rope is not None:
            both = Span(qkv.register, qkv.start, q.width + k.width)
            heads = attention.heads + attention.kv_heads
            build.add(
                Rope(
                    x=both,
                    heads=heads,
                    head_dim=width,
                    table=build.rope(attention.rope),
                    interleaved=attention.rope.interleaved,
                    first=attention.rope.first,
                )
            )

    def _mlp(self, x: Span) -> Callable[[Span, Span | None], None]:
        mlp = self.layer.feed_forward
        return self._dense(self._at + "mlp.", mlp, x) if isinstance(mlp, arch.Mlp) else self._moe(x)

    def _dense(self, at: str, mlp: arch.Mlp, x: Span) -> Callable[[Span, Span | None], None]:
        build, inner = self.build, self.build.span("wide", mlp.ffn_dim)

        def bias(name: str) -> torch.Tensor | None:
            return build.vector(f"{at}{name}.bias") if mlp.bias else None

        if mlp.gated:
            gate, up = build.matrix(at + "gate.weight"), build.matrix(at + "up.weight")
            build.add(
                Gated(
                    x=x,
                    out=inner,
                    gate=gate,
                    up=up,
                    activation=mlp.activation,
                    gate_bias=bias("gate"),
                    up_bias=bias("up"),
                )
            )
        else:
            up = build.matrix(at + "up.weight")
            build.add(Linear(x=x, out=inner, weight=up, bias=bias("up"), activation=mlp.activation))
        down, down_bias = build.matrix(at + "down.weight"), bias("down")
        return lambda out, add: build.add(Linear(x=inner, out=out, weight=down, bias=down_bias, add=add))

    def _moe(self, x: Span) -> Callable[[Span, Span | None], None]:
        moe, build, at = self.layer.feed_forward, self.build, self._at
        if not isinstance(moe, arch.Moe):
            return self._mlp(x)
        logits = build.span("router", moe.experts)
        router_bias = build.vector(at + "router.bias") if moe.router_bias else None
        build.add(Linear(x=x, out=logits, weight=build.matrix(at + "router.weight"), bias=router_bias))
        gate = Gate(
            top_k=moe.top_k,
            scores=moe.scores,
            renormalise=moe.renormalise,
            renormalise_eps=moe.renormalise_eps,
            scale=moe.scale,
            correction=build.vector(at + "router.correction") if moe.correction else None,
            groups=moe.groups,
            top_groups=moe.top_groups,
        )
        experts = tuple(self._expert(f"{at}experts.{number}.", moe) for number in range(moe.experts))
        layer = build.next_moe_layer()

        def run(out: Span, add: Span | None) -> None:
            build.add(
                Experts(
                    x=x,
                    out=out,
                    logits=logits,
                    experts=experts,
                    gate=gate,
                    activation=moe.activation,
                    layer=layer,
                    clamp=moe.clamp,
                    add=add,
                )
            )

        if moe.shared is None:
            return run
        return self._with_shared(moe, moe.shared, x, run)

    def _expert(self, at: str, moe: arch.Moe) -> Expert:
        build = self.build

        def bias(name: str) -> torch.Tensor | None:
            return build.vector(f"{at}{name}.bias") if moe.bias else None

        return Expert(
            gate=build.matrix(at + "gate.weight") if moe.gated else None,
            up=build.matrix(at + "up.weight"),
            down=build.matrix(at + "down.weight"),
            gate_bias=bias("gate") if moe.gated else None,
            up_bias=bias("up"),
            down_bias=bias("down"),
        )

    def _with_shared(
        self, moe: arch.Moe, shared: arch.Mlp, x: Span, run: Callable[[Span, Span | None], None]
    ) -> Callable[[Span, Span | None], None]:
        """Experts plus a dense MLP, which may be weighed by a sigmoid, or mixed with them by a softmax of two."""
        build, at = self.build, self._at
        dense = self._dense(at + "shared.", shared, x)
        s, weight = build.span("shared", self.dim), build.span("weight", 1)

        def weigh(span: Span, matrix: Matrix, bias: torch.Tensor | None) -> None:
            build.add(Linear(x=x, out=weight, weight=matrix, bias=bias, activation="sigmoid"))
            build.add(Combine(kind="multiply", a=span, b=weight, out=span))

        if moe.mix:
            t = build.span("t", self.dim)
            first, second = build.difference(at + "mix", 0), build.difference(at + "mix", 1)

            def mixed(out: Span, add: Span | None) -> None:
                run(t, None)
                weigh(t, *first)
                dense(s, None)
                weigh(s, *second)
                build.add(Combine(kind="add", a=t, b=s, out=s if add is not None else out))
                if add is not None:
                    build.add(Combine(kind="add", a=add, b=s, out=out))

            return mixed
        scale = build.matrix(at + "shared_gate.weight") if moe.shared_gate else None

        def summed(out: Span, add: Span | None) -> None:
            if scale is None:
                dense(s, add)
            else:
                dense(s, None)
                weigh(s, scale, None)
                if add is not None:
                    build.add(Combine(kind="add", a=add, b=s, out=s))
            run(out, s)

        return summed


def split(whole: Span, *widths: int) -> tuple[Span, ...]:
    """Neighbouring spans of ``widths``, and one with the rest."""
    spans, start = [], whole.start
    for width in widths:
        spans.append(Span(whole.register, start, width))
        start += width
    return (*spans, Span(whole.register, start, whole.start + whole.width - start))
