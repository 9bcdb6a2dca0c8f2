"""Every private name of torch that `zero` relies on, in one place.

All three are used by torch's own FSDP and DDP in the versions supported (2.11 and later).
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def at_end_of_backward(call: Callable[[], None]) -> None:
    """Run ``call`` when the backward pass under way has finished."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def backward_id() -> int:
    """The number of the backward pass under way on this thread; -1 outside of one. Nested passes have their own."""
    return int(torch._C._current_graph_task_id())


def will_receive_gradient(node: torch.autograd.graph.Node) -> bool:
    """Whether ``node`` (a leaf's gradient accumulator) runs in the backward pass under way."""
    return bool(torch._C._will_engine_execute_node(node))
