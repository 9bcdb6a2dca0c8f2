"""Runs a program with torch, operation by operation, on any device: the reference of every native kernel.

DeepSpeed Inference section 3.1. On the CPU all arithmetic is fp32 whatever the weights' format; on CUDA 16-bit weights
multiply in their own dtype, and decode steps are captured once and replayed (`torch_graph`). Not batch-invariant: torch
picks another product order for another number of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from trivium.base import log
from trivium.kernels.batch import check
from trivium.kernels.program import Batch, Cache, Experts, Output, Program, StepRouting
from trivium.kernels.torch_attention import attend
from trivium.kernels.torch_decode import DecodeAttention
from trivium.kernels.torch_experts import run_experts, run_stacked
from trivium.kernels.torch_graph import Capture, Computed, CudaCapture, DecodeGraphs
from trivium.kernels.torch_operations import Step, run_operations
from trivium.kernels.torch_placement import Placed, place


class TorchExecutor:
    """The program's step in torch; see `trivium.kernels.executor.Executor`.

    ``capture``: how decode steps of at most ``max_sequences`` sequences are captured; None: as CUDA graphs on CUDA, not
    at all elsewhere. Where they may be, the executor keeps copies of the program's tensors, which `refresh` renews.
    """

    def __init__(
        self,
        program: Program,
        *,
        device: str | torch.device = "cpu",
        max_sequences: int = 64,
        capture: Capture | None = None,
    ) -> None:
        self._device = torch.device(device)
        if capture is None and self._device.type == "cuda":
            capture = CudaCapture(self._device)
        moved = capture is not None or self._device.type != "cpu"
        self._placed = place(program, self._device) if moved else Placed(program=program, stacks={}, pairs=())
        self._program = self._placed.program
        self._top_k = program.top_k
        self._graphs: DecodeGraphs | None = None
        self._captured = ""
        if capture is not None and (hindrance := self._hindrance()):
            self._captured = f", decode steps not captured: {hindrance}"
            log.get().warning("%s; every operation is launched by itself, which is slow", self.name)
        elif capture is not None:
            # Of what is placed, not of the executor: its graphs would keep it alive, and it them.
            compute = partial(decode, self._placed)
            self._graphs = DecodeGraphs(
                capture, compute, self._program, device=self._device, max_sequences=max_sequences
            )
            self._captured = ", decode steps captured"

    @property
    def name(self) -> str:
        """The backend, its device, and whether it captures decode steps where it could."""
        return f"torch {self._device.type}{self._captured}"

    @property
    def batch_invariant(self) -> bool:
        """Never: torch's products depend on the number of rows."""
        return False

    @property
    def sampler(self) -> None:
        """None: `inference` draws in numpy where there is no kernel."""
        return None

    @torch.no_grad()
    def refresh(self) -> None:
        """See `Executor.refresh`."""
        self._placed.refresh()

    @torch.no_grad()
    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
        """One step; see `Executor.run`."""
        if self._graphs is not None and (replayed := self._graphs.run(batch, caches)) is not None:
            return replayed
        check(self._program, batch, caches)
        step = Step(
            token_ids=batch.token_ids.long().to(self._device),
            positions=batch.positions.long().to(self._device),
            output_rows=batch.output_rows.long().to(self._device),
            caches=caches,
            attend=partial(attend, batch=batch),
            mix=run_experts,
            replay=batch.routing,
        )
        logits, hidden = run_operations(self._program, step)
        return Output(
            logits=logits.clone(),
            hidden=hidden.clone(),
            routing=self._routing(step),
        )

    def _routing(self, step: Step) -> StepRouting | None:
        found, tokens = _in_one_row(step), len(step.token_ids)
        if found is None:
            return None
        experts, weights = (row.cpu() for row in found)
        return StepRouting(experts=experts, weights=weights, top_k=self._top_k, rows=tokens, tokens=tokens)

    def _hindrance(self) -> str:
        """Why decode steps cannot be captured, or must not be: quantised products are hundreds of operations each."""
        if quantised := sorted({"int8", "int4"} & self._placed.formats):
            return f"{' and '.join(quantised)} matrices"
        experts = [op for op in self._program.operations if isinstance(op, Experts)]
        stacked = all(op.layer in self._placed.stacks for op in experts)  # then no shape depends on who is chosen
        return "" if stacked else "experts that are not of one shape and format"


def decode(placed: Placed, inputs: torch.Tensor, caches: Sequence[Cache]) -> Computed:
    """One token per sequence, inputs int32 [S, 2 + B] on the device: its token, its position, its blocks."""
    positions = inputs[:, 1].long()

    def mix(x: torch.Tensor, op: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return run_stacked(x, op, placed.stacks[op.layer], chosen, weights)

    step = Step(
        token_ids=inputs[:, 0].long(),
        positions=positions,
        output_rows=None,
        caches=caches,
        attend=DecodeAttention(positions, inputs[:, 2:].long()).attend,
        mix=mix,
    )
    logits, hidden = run_operations(placed.program, step)
    return Computed(logits=logits, hidden=hidden, routing=_in_one_row(step))


def _in_one_row(step: Step) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Experts and weights of all MoE layers, one after the other."""
    if not step.routing:
        return None
    experts, weights = zip(*(step.routing[layer] for layer in sorted(step.routing)), strict=True)
    return torch.cat([part.flatten() for part in experts]), torch.cat([part.flatten() for part in weights])
