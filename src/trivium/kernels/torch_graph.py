"""Decode steps captured once per size and replayed after: buckets of sequences and blocks over static buffers.

DeepSpeed Inference section 3.1: at batch 1 launching small kernels one by one costs more than reading the weights.

[Note: buckets] A step of S sequences with B blocks each runs in the bucket of the next power of two of both (at most
``max_sequences``; at least 8 blocks). Rows that are missing repeat the last real one, so they write what it writes, to
the same place. All sequences of a bucket are read like the longest one: where less than an eighth of that is needed, as
of a long sequence among many short ones, the step is left to be run another way. At most 32 buckets are kept, the one
unused longest goes; their captures share one pool of memory, which is safe because they never run at once and every
result is copied out before the next replay.

[Note: what a capture holds] Addresses: of the weights, of the caches, of its input buffer. Weights are replaced in
place and stay; another set of caches drops every capture.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import is_not
from typing import ClassVar, Protocol

import torch

from trivium.kernels.batch import DecodeCheck
from trivium.kernels.program import Batch, Cache, Output, Program, StepRouting

LEAST_BLOCKS = 8
MOST_BUCKETS = 32
LEAST_SHARE = 1 / 8


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a step left on its device: logits [S, V], hidden [S, dim], and experts and weights [S, K] of all MoE layers,
    one layer after the other in one row each, so that two copies bring all to the host; None: the program has none.
    """

    logits: torch.Tensor
    hidden: torch.Tensor
    routing: tuple[torch.Tensor, torch.Tensor] | None


Compute = Callable[[], Computed]


class Capture(Protocol):
    """Turns a function over static buffers into one that repeats its work on the device, and nothing on the host."""

    def record(self, compute: Compute) -> Compute:
        """Run ``compute``, then record it; the result repeats it and returns the same tensors every time."""

    def forget(self) -> None:
        """All that was recorded is about to be dropped."""


class CudaCapture:
    """Capture as a CUDA graph: one stream to warm up and record on, one pool of memory for all graphs."""

    # Of the process: what begins one capture synchronises and empties torch's cache, which breaks another's.
    _one_at_a_time: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            self._pool = torch.cuda.graph_pool_handle()

    def record(self, compute: Compute) -> Compute:
        """See `Capture.record`. The first run, outside the graph, loads kernels and makes the libraries' handles."""
        own = torch.cuda.device(self._device)
        # The current stream entered, for the way back to it: torch.cuda.graph stays on its own where a capture fails.
        with self._one_at_a_time, own, torch.cuda.stream(torch.cuda.current_stream()):
            self._stream.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(self._stream):
                    compute()
            finally:  # what it has begun still writes to the caches
                torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # Another thread of the process, a trainer's for one, may allocate meanwhile.
            try:
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    held = compute()
            except BaseException:  # for the allocator the pool may still be the failed one's; whole graphs keep theirs
                self._pool = torch.cuda.graph_pool_handle()
                raise

        def replay() -> Computed:
            graph.replay()
            return held

        return replay

    def forget(self) -> None:
        """See `Capture.forget`. A pool whose graphs are gone, or were never whole, must not be named again."""
        with self._one_at_a_time, torch.cuda.device(self._device):
            torch.cuda.synchronize()
            self._pool = torch.cuda.graph_pool_handle()


@dataclass(frozen=True, kw_only=True)
class _Bucket:
    """Static inputs, int32 [S, 2 + B]: token, position, blocks; what fills them on the host; what repeats the step."""

    host: torch.Tensor
    inputs: torch.Tensor
    compute: Compute


class DecodeGraphs:
    """Decode steps through captures; ``compute`` is the step, of inputs int32 [S, 2 + B] on the device and caches."""

    def __init__(
        self,
        capture: Capture,
        compute: Callable[[torch.Tensor, Sequence[Cache]], Computed],
        program: Program,
        *,
        device: torch.device,
        max_sequences: int,
    ) -> None:
        self._capture = capture
        self._compute = compute
        self._program = program
        self._device = device
        self._max_sequences = max_sequences
        self._caches: tuple[Cache, ...] = ()
        self._check: DecodeCheck | None = None
        self._buckets: OrderedDict[tuple[int, int], _Bucket] = OrderedDict()
        self._recorded = 0
        self._top_k = program.top_k

    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output | None:
        """A decode step of at most ``max_sequences`` sequences, its results copies; None: it is another kind of step,
        or its sequences differ too much, or something in it is wrong, and nothing has run.

        Raises:
            ConfigError: ``caches`` do not fit the program.
        """
        if self._check is None or len(caches) != len(self._caches) or any(map(is_not, caches, self._caches)):
            self._capture.forget()
            self._buckets.clear()
            self._check, self._caches = DecodeCheck(self._program, caches), tuple(caches)
        count = len(batch.token_ids)
        if count > self._max_sequences or not self._check.passes(batch):
            return None
        key = min(_power(count), self._max_sequences), max(LEAST_BLOCKS, _power(batch.block_tables.shape[1]))
        if self._check.share(batch, *key, least=LEAST_BLOCKS) < LEAST_SHARE:
            return None
        counted = self._recorded
        found = self._filled(key, batch, count).compute()
        return Output(
            logits=found.logits[:count].clone(),
            hidden=found.hidden[:count].clone(),
            routing=None if found.routing is None else self._routing(key[0], count, *found.routing),
            recorded=self._recorded > counted,
        )

    def _routing(self, sequences: int, count: int, experts: torch.Tensor, weights: torch.Tensor) -> StepRouting:
        """On the CPU, in memory of its own there too."""
        return StepRouting(
            experts=experts.to("cpu", copy=True),
            weights=weights.to("cpu", copy=True),
            top_k=self._top_k,
            rows=sequences,
            tokens=count,
        )

    def _filled(self, key: tuple[int, int], batch: Batch, count: int) -> _Bucket:
        """The bucket of so many sequences and blocks, this batch in its inputs; recorded now where it is new."""
        known = self._buckets.get(key)
        if known is not None:
            self._buckets.move_to_end(key)
            _fill(known.host, batch, count)
            known.inputs.copy_(known.host)
            return known
        with torch.inference_mode(False):  # later steps write them, in that mode or outside
            host = torch.zeros(key[0], 2 + key[1], dtype=torch.int32)
            _fill(host, batch, count)
            inputs = host.to(self._device, copy=True)
        made = _Bucket(
            host=host, inputs=inputs, compute=self._capture.record(partial(self._compute, inputs, self._caches))
        )
        self._buckets[key] = made
        self._recorded += 1
        if len(self._buckets) > MOST_BUCKETS:
            self._buckets.popitem(last=False)
        return made


def _power(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()


def _fill(host: torch.Tensor, batch: Batch, count: int) -> None:
    rows, width = host.numpy(), batch.block_tables.shape[1]
    rows[:count, 0] = batch.token_ids.numpy()
    rows[:count, 1] = batch.positions.numpy()
    rows[:count, 2 : 2 + width] = batch.block_tables.numpy()  # further columns: blocks of earlier steps, never seen
    rows[count:] = rows[count - 1]
