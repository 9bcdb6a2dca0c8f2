"""All experts of a rank in one pass: gather, projections, activation, weight and scatter, expert by expert.

DeepSpeed-MoE section 5.4: changes of layout of cost T·K·C, with the gate's weight applied on the way.

[Note: one pass]
What a chain of autograd operations would keep for backward (gathered rows, activations, outputs before they are
weighed) is made again in backward from what is cheap to keep: the input and the inner pre-activations. One expert's
rows fit a core's cache, so gathering them twice costs less than writing all of them once. The weight is applied to the
narrow rows, [n, C]; its gradient is the product of an inner row with the gradient that reaches it, so that the outputs
of single experts are not needed again. The rows of one expert come from different input rows, so adding them up in
place never meets twice, and experts follow each other in order: the same bits every time, on any device.

N input rows, R choices sorted by expert, C model width, F inner width; n choices of the expert at hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]


class Form(ABC):
    """One kind of expert as plain matrix operations. ``num_params`` and ``num_inner`` tensors of an expert and kept."""

    num_params: int
    num_inner: int

    @staticmethod
    def width(params: Tensors) -> int:
        """F of an expert: rows of the first matrix."""
        return params[0].shape[0]

    @staticmethod
    @abstractmethod
    def forward(x_nC: torch.Tensor, params: Tensors, inner: Tensors, hidden_nF: torch.Tensor) -> None:
        """Fill the pre-activations ``inner`` and the activations ``hidden_nF``."""

    @staticmethod
    @abstractmethod
    def out(hidden_nF: torch.Tensor, params: Tensors, out_nC: torch.Tensor) -> None:
        """The last projection."""

    @staticmethod
    @abstractmethod
    def recall(inner: Tensors, hidden_nF: torch.Tensor, slope_nF: torch.Tensor) -> None:
        """The activations again; ``slope_nF`` may be filled with what `back` needs."""

    @staticmethod
    @abstractmethod
    def back(inner: Tensors, grad_nF: torch.Tensor, slope_nF: torch.Tensor) -> Tensors:
        """Gradients of ``inner`` from those of the activations; may use up both."""

    @staticmethod
    def last(params: Tensors) -> torch.Tensor:
        """The last projection's matrix [C, F]: the third parameter of either form."""
        return params[2]

    @staticmethod
    @abstractmethod
    def grads(grads_inner: Tensors, x_nC: torch.Tensor, grad_nC: torch.Tensor, last_CF: torch.Tensor) -> Tensors:
        """Gradients of an expert's parameters; ``last_CF`` is that of `last`, ``grad_nC`` the output's, weighed."""


class SwiGLU(Form):
    """``down(silu(gate(x)) · up(x))``: parameters gate, up [F, C], down [C, F]."""

    num_params, num_inner = 3, 2

    @staticmethod
    def forward(x_nC: torch.Tensor, params: Tensors, inner: Tensors, hidden_nF: torch.Tensor) -> None:
        """Two projections."""
        torch.mm(x_nC, params[0].t(), out=inner[0])
        torch.mm(x_nC, params[1].t(), out=inner[1])
        torch.ops.aten.silu.out(inner[0], out=hidden_nF).mul_(inner[1])

    @staticmethod
    def out(hidden_nF: torch.Tensor, params: Tensors, out_nC: torch.Tensor) -> None:
        """One projection."""
        torch.mm(hidden_nF, params[2].t(), out=out_nC)

    @staticmethod
    def recall(inner: Tensors, hidden_nF: torch.Tensor, slope_nF: torch.Tensor) -> None:
        """silu(gate) stays in ``slope_nF``."""
        torch.ops.aten.silu.out(inner[0], out=slope_nF)
        torch.mul(slope_nF, inner[1], out=hidden_nF)

    @staticmethod
    def back(inner: Tensors, grad_nF: torch.Tensor, slope_nF: torch.Tensor) -> Tensors:
        """Of gate and up."""
        slope_nF.mul_(grad_nF)
        grad_nF.mul_(inner[1])
        torch.ops.aten.silu_backward.grad_input(grad_nF, inner[0], grad_input=grad_nF)
        return grad_nF, slope_nF

    @staticmethod
    def grads(grads_inner: Tensors, x_nC: torch.Tensor, grad_nC: torch.Tensor, last_CF: torch.Tensor) -> Tensors:
        """Of gate, up, down."""
        return grads_inner[0].t().mm(x_nC), grads_inner[1].t().mm(x_nC), last_CF


class GELU(Form):
    """``down(gelu(up(x)))`` with biases: parameters up [F, C], its bias [F], down [C, F], its bias [C]."""

    num_params, num_inner = 4, 1

    @staticmethod
    def forward(x_nC: torch.Tensor, params: Tensors, inner: Tensors, hidden_nF: torch.Tensor) -> None:
        """One projection."""
        torch.addmm(params[1], x_nC, params[0].t(), out=inner[0])
        torch.ops.aten.gelu.out(inner[0], out=hidden_nF)

    @staticmethod
    def out(hidden_nF: torch.Tensor, params: Tensors, out_nC: torch.Tensor) -> None:
        """One projection."""
        torch.addmm(params[3], hidden_nF, params[2].t(), out=out_nC)

    @staticmethod
    def recall(inner: Tensors, hidden_nF: torch.Tensor, slope_nF: torch.Tensor) -> None:
        """gelu again."""
        torch.ops.aten.gelu.out(inner[0], out=hidden_nF)

    @staticmethod
    def back(inner: Tensors, grad_nF: torch.Tensor, slope_nF: torch.Tensor) -> Tensors:
        """Of up's output."""
        torch.ops.aten.gelu_backward.grad_input(grad_nF, inner[0], grad_input=slope_nF)
        return (slope_nF,)

    @staticmethod
    def grads(grads_inner: Tensors, x_nC: torch.Tensor, grad_nC: torch.Tensor, last_CF: torch.Tensor) -> Tensors:
        """Of up, its bias, down, its bias."""
        up_nF = grads_inner[0]
        return up_nF.t().mm(x_nC), up_nF.sum(0), last_CF, grad_nC.sum(0)


class ExpertPass(torch.autograd.Function):
    """x [N, C] → [N, C]: row n is the sum over its choices of weight · expert(x[n]); zeros without any choice.

    See [Note: one pass]. All tensors are of one floating-point type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: torch.Tensor,
        weights_R: torch.Tensor | None,
        rows_R: torch.Tensor,
        counts: list[int],
        form: type[Form],
        *params: torch.Tensor,
    ) -> torch.Tensor:
        """``rows_R``: the input row of each choice; ``counts``: choices of each expert, 1 or more; ``params``: all
        those of the first expert, then of the second, … . Keeps [R, F] for each of the form's pre-activations."""
        most, width = max(counts), form.width(params)
        inner_RF = [x_NC.new_empty((len(rows_R), width)) for _ in range(form.num_inner)]
        out_NC = torch.zeros_like(x_NC)
        scratch_C, scratch_F = x_NC.new_empty((most, x_NC.shape[1])), x_NC.new_empty((most, width))
        for mine, rows, weights_n1, *inner in _experts(counts, form, params, rows_R, weights_R, inner_RF):
            held_nC, hidden_nF = scratch_C[: len(rows)], scratch_F[: len(rows)]
            torch.index_select(x_NC, 0, rows, out=held_nC)
            form.forward(held_nC, mine, inner, hidden_nF)
            form.out(hidden_nF, mine, held_nC)
            if weights_n1 is not None:
                held_nC.mul_(weights_n1)
            out_NC.index_add_(0, rows, held_nC)
        ctx.save_for_backward(x_NC, weights_R, rows_R, *inner_RF, *params)
        ctx.counts, ctx.form = counts, form
        return out_NC

    @staticmethod
    def backward(ctx: Any, grad_NC: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the rows, the weights and every expert's parameters, where they are asked for."""
        form: type[Form] = ctx.form
        x_NC, weights_R, rows_R, *rest = ctx.saved_tensors
        inner_RF, params = rest[: form.num_inner], rest[form.num_inner :]
        wants_x, wants_weights, wants_params = ctx.needs_input_grad[0], weights_R is not None, ctx.needs_input_grad[5:]
        most, width = max(ctx.counts), form.width(params)
        grad_x_NC = torch.zeros_like(x_NC) if wants_x else None
        grad_weights_R = torch.empty_like(weights_R) if wants_weights else None
        scratch = [x_NC.new_empty((most, n)) for n in (x_NC.shape[1], x_NC.shape[1], width, width, width)]
        grads: list[torch.Tensor | None] = []
        parts_R = [None] * len(ctx.counts) if grad_weights_R is None else torch.split(grad_weights_R, ctx.counts)
        every = _experts(ctx.counts, form, params, rows_R, weights_R, inner_RF)
        for (mine, rows, weights_n1, *inner), part_n in zip(every, parts_R, strict=True):
            x_nC, grad_nC, grad_nF, hidden_nF, slope_nF = (one[: len(rows)] for one in scratch)
            torch.index_select(grad_NC, 0, rows, out=grad_nC)
            torch.mm(grad_nC, form.last(mine), out=grad_nF)
            form.recall(inner, hidden_nF, slope_nF)
            if part_n is not None:
                torch.linalg.vecdot(hidden_nF, grad_nF, out=part_n)
                if form is GELU:
                    part_n.addmv_(grad_nC, mine[3])
                grad_nC.mul_(weights_n1)
                grad_nF.mul_(weights_n1)
            wanted = wants_params[len(grads) : len(grads) + form.num_params]
            last_CF = grad_nC.t().mm(hidden_nF) if any(wanted) else None
            grads_inner = form.back(inner, grad_nF, slope_nF)
            if last_CF is not None:
                torch.index_select(x_NC, 0, rows, out=x_nC)
                made = form.grads(grads_inner, x_nC, grad_nC, last_CF)
                grads += [one if want else None for one, want in zip(made, wanted, strict=True)]
            else:
                grads += [None] * form.num_params
            if grad_x_NC is not None:
                torch.mm(grads_inner[0], mine[0], out=x_nC)
                for one, matrix in zip(grads_inner[1:], mine[1:], strict=False):
                    x_nC.addmm_(one, matrix)
                grad_x_NC.index_add_(0, rows, x_nC)
        return grad_x_NC, grad_weights_R, None, None, None, *grads


def _experts(
    counts: list[int],
    form: type[Form],
    params: Tensors,
    rows_R: torch.Tensor,
    weights_R: torch.Tensor | None,
    inner_RF: Tensors,
) -> Iterator[tuple[Any, ...]]:
    """Of each expert: parameters, input rows, weights [n, 1] or None, and its part of each of ``inner_RF``."""
    own = [params[at : at + form.num_params] for at in range(0, len(params), form.num_params)]
    weights = [None] * len(own) if weights_R is None else torch.split(weights_R[:, None], counts)
    return zip(
        own, torch.split(rows_R, counts), weights, *(torch.split(inner, counts) for inner in inner_RF), strict=True
    )


class Fused:
    """`ExpertPass`, out of sight of the compiler: its shapes are data.

    Each layer of experts holds one, made with it and not with this file: it loads torch's compiler, which takes longer
    than all of this library, and those who only serve need neither.
    """

    def __init__(self) -> None:
        self._untraced: Callable[..., torch.Tensor] = torch.compiler.disable(ExpertPass.apply)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        x_NC: torch.Tensor,
        weights_R: torch.Tensor | None,
        rows_R: torch.Tensor,
        counts: list[int],
        form: type[Form],
        params: Tensors,
    ) -> torch.Tensor:
        """See `ExpertPass.forward`."""
        return self._untraced(x_NC, weights_R, rows_R, counts, form, *params)

    def __reduce__(self) -> tuple[type[Fused], tuple[()]]:
        """A copy of a layer makes its own."""
        return Fused, ()
