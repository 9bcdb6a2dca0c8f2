"""Captures of decode steps for tests: on the CPU a recorder that is as strict as a CUDA graph, and the real one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.steps import BLOCK, INT
from trivium.kernels.program import Batch, Cache, Program
from trivium.kernels.torch_executor import TorchExecutor
from trivium.kernels.torch_graph import Compute, Computed

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here")),
]
TOLERANCE = 2e-5  # whole steps, as in test_invariance
BLOCKS = 96  # of `steps.caches`
# What reads a number on the host, or makes a shape of one.
_DECIDES = {
    "_local_scalar_dense",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "nonzero_static",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
}
# What makes a tensor: on the host, unless the call names the device.
_MAKES = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "zeros"}


class CapturableOnly(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: host decisions, shapes made of numbers, tensors made on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in _DECIDES or name.startswith("lift_fresh"):
            raise AssertionError(f"{name} cannot be captured")
        if name in _MAKES and kwargs.get("device") is None:
            raise AssertionError(f"{name} without a device makes a tensor on the host")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise AssertionError(f"{name} by a mask has a shape that its numbers decide")
        return func(*args, **kwargs)


class Addresses(TorchDispatchMode):
    """Notes the memory of tensors that operations are handed but did not make; refuses any other once `closed`."""

    def __init__(self) -> None:
        super().__init__()
        self.closed = False
        self._handed: set[int] = set()
        self._made: set[int] = set()

    def __enter__(self) -> Any:
        self._made.clear()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for address in _addresses((args, kwargs)) - self._made - self._handed:
            if self.closed:
                raise AssertionError(f"{func.overloadpacket.__name__} is handed memory that the capture does not know")
            self._handed.add(address)
        result = func(*args, **kwargs)
        self._made |= _addresses(result) - self._handed
        return result


def _addresses(values: Any) -> set[int]:
    leaves = tree_leaves(values)
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.numel()}


class Recorder:
    """A capture on the CPU: replays run the same function over the same buffers into the same results."""

    def __init__(self) -> None:
        self.recorded = self.replayed = self.forgotten = 0

    def record(self, compute: Compute) -> Compute:
        compute()
        addresses = Addresses()
        with CapturableOnly(), addresses:
            held = compute()
        addresses.closed = True
        self.recorded += 1
        for tensor in _tensors(held):  # a graph's results hold nothing before its first replay
            tensor.fill_(-7)

        def replay() -> Computed:
            self.replayed += 1
            with addresses:
                fresh = _tensors(compute())
            with torch.inference_mode():  # a replay writes whatever the mode it was recorded in
                for kept, new in zip(_tensors(held), fresh, strict=True):
                    kept.copy_(new)
            return held

        return replay

    def forget(self) -> None:
        self.forgotten += 1


def _tensors(computed: Computed) -> list[torch.Tensor]:
    return [computed.logits, computed.hidden, *(computed.routing or ())]


def steps_of(lengths: tuple[int, ...], count: int, *, block: int = BLOCK, window: int | None = None) -> list[Batch]:
    """A step that reads prompts of these lengths, then ``count`` decode steps; blocks scattered, unused ones −1."""
    draw = torch.Generator().manual_seed(len(lengths))
    total = BLOCKS * BLOCK // block
    each = total // len(lengths)
    whole = torch.randint(0, 50, (len(lengths), max(lengths) + count), generator=draw, dtype=INT)
    blocks = torch.randperm(total, generator=draw)[: each * len(lengths)].view(len(lengths), each).int()
    steps = []
    for step in range(count + 1):
        spans = [(0, n) if step == 0 else (n + step - 1, n + step) for n in lengths]
        tables = blocks.clone()
        for row, (start, end) in enumerate(spans):
            tables[row, -(-end // block) :] = -1
            if window is not None:
                tables[row, : max(0, start - window + 1) // block] = -1
        width = max(-(-end // block) for _, end in spans)
        sizes = [end - start for start, end in spans]
        steps.append(
            Batch(
                token_ids=torch.cat([whole[row, start:end] for row, (start, end) in enumerate(spans)]),
                positions=torch.cat([torch.arange(start, end, dtype=INT) for start, end in spans]),
                sequences=torch.repeat_interleave(torch.arange(len(lengths), dtype=INT), torch.tensor(sizes)),
                block_tables=tables[:, :width].contiguous(),
                output_rows=torch.arange(sum(sizes), dtype=INT),
            )
        )
    return steps


def moved(held: tuple[Cache, ...], device: str) -> tuple[Cache, ...]:
    return tuple(
        Cache(**{f.name: None if (t := getattr(cache, f.name)) is None else t.to(device) for f in fields(cache)})
        for cache in held
    )


def captured(program: Program, device: str, **more: Any) -> tuple[TorchExecutor, Recorder]:
    """On CUDA the executor captures for itself, and the recorder counts nothing."""
    recorder = Recorder()
    capture = {} if device == "cuda" else {"capture": recorder}
    return TorchExecutor(program, device=device, **capture, **more), recorder
