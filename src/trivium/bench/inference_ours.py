"""Trivium in the inference bench: the engine's own steps, scheduling and sampling included."""

from __future__ import annotations

import itertools
import time

from trivium.bench.inference_worker import serve
from trivium.inference import LLM, SamplingParams
from trivium.inference.request import Request
from trivium.kernels.matrix import matrix_bytes
from trivium.kernels.program import Experts, Gated, HeadLinear, Linear, Program


def step_bytes(program: Program) -> int:
    """Bytes of the matrices that one token's step reads: of experts, the chosen share."""
    total = 0
    for op in program.operations:
        if isinstance(op, Linear):
            total += matrix_bytes(op.weight)
        elif isinstance(op, Gated):
            total += matrix_bytes(op.gate) + matrix_bytes(op.up)
        elif isinstance(op, HeadLinear):
            total += sum(matrix_bytes(m) for m in op.weights)
        elif isinstance(op, Experts):
            parts = (m for e in op.experts for m in (e.up, e.down, e.gate) if m is not None)
            total += sum(matrix_bytes(m) for m in parts) * op.gate.top_k // len(op.experts)
    return total


class Ours:
    """An `LLM` driven step by step."""

    def __init__(self, folder: str, form: str, threads: int, way: str) -> None:
        quantised = form in ("int8", "int4")
        self._llm = LLM(
            folder,
            dtype="bfloat16" if quantised else form,  # type: ignore[arg-type]
            quantize=form if quantised else None,  # type: ignore[arg-type]
            device="cuda" if way == "cuda" else "cpu",
            memory=None if way == "cuda" else "8GiB",
            threads=threads,
            max_sequences=16 if way == "cuda" else 64,  # beside others on one GPU, so no cache for more
            max_positions=1024 if way == "cuda" else None,
            step_tokens=2048,
            prefix_cache=False,
        )
        self._numbers = itertools.count()
        self.step_bytes = step_bytes(self._llm.model.program)
        self.kernels = self._llm.engine.executor.name

    def _add(self, tokens: int, count: int) -> None:
        number = next(self._numbers)
        ids = [(number * 31 + i * 7) % self._llm.vocabulary for i in range(tokens)]
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        self._llm.engine.add(Request(request_id=f"bench-{number}", prompt_token_ids=ids, params=params))

    def decode(self, batch: int, context: int, steps: int) -> list[float]:
        """See `inference_worker.Contestant`."""
        for _ in range(batch):
            self._add(context, steps + 2)
        engine = self._llm.engine
        engine.step()
        engine.step()
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            engine.step()
            times.append(time.perf_counter() - start)
        while not engine.idle:
            engine.step()
        return times

    def prefill(self, tokens: int) -> float:
        """See `inference_worker.Contestant`."""
        self._add(tokens, 1)
        start = time.perf_counter()
        self._llm.engine.step()
        taken = time.perf_counter() - start
        while not self._llm.engine.idle:
            self._llm.engine.step()
        return taken


if __name__ == "__main__":
    serve(Ours)
