"""One unit at work: a module, its flats, and how far it has come in the backward pass under way.

ZeRO section 5.3: a layer's parameters live from just before it runs until just after.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.autograd.graph import Node, get_gradient_edge

from trivium.base.errors import ConfigError
from trivium.zero.flat import Flat, State
from trivium.zero.torch_private import will_receive_gradient


class Unit:
    """A module and the flats of its own parameters. ``keep``: stays gathered from forward to backward; ``called``:
    the module has run at least once."""

    def __init__(self, number: int, name: str, module: nn.Module, flats: Sequence[Flat], keep: bool) -> None:
        self.number, self.name, self.module, self.keep = number, name, module, keep
        self.flats = tuple(flats)
        self.pins = 0
        self.called = False
        self.pending_inputs = 0
        self.expected: set[nn.Parameter] | None = None
        self.arrived: set[nn.Parameter] = set()
        self._nodes: list[tuple[nn.Parameter, Node]] = [
            (param, get_gradient_edge(param).node) for flat in self.flats if flat.trainable for param in flat.params
        ]

    def __deepcopy__(self, memo: object) -> Unit:
        raise ConfigError(
            "a sharded model cannot be copied: its hooks and memory belong to this one; copy what "
            "trivium.zero.full_state_dict gives"
        )

    @property
    def sharded(self) -> bool:
        """Whether the unit has parameters that must be gathered."""
        return any(flat.row.parameter for flat in self.flats)

    @property
    def trainable(self) -> bool:
        """Whether any parameter is trained."""
        return any(flat.trainable for flat in self.flats)

    @property
    def has_master(self) -> bool:
        """Whether the optimizer updates an fp32 copy of some parameters."""
        return any(flat.trainable and flat.low_precision for flat in self.flats)

    @property
    def whole(self) -> bool:
        """Whether all parameters can be read now."""
        return all(flat.state is State.WHOLE for flat in self.flats)

    @property
    def held(self) -> bool:
        """Whether whole parameters take memory now, or soon."""
        return any(flat.row.parameter and flat.state is not State.SHARDED for flat in self.flats)

    def start_gather(self, phase: str) -> None:
        """Begin gathering all flats; those under way already are left alone."""
        for flat in self.flats:
            if flat.state is not State.GATHERING:
                flat.start_gather(phase)

    def finish_gather(self) -> None:
        """Wait until all parameters can be read."""
        for flat in self.flats:
            flat.finish_gather()

    def release(self) -> None:
        """Drop the whole parameters, unless someone pinned them."""
        if self.pins == 0:
            for flat in self.flats:
                flat.release()

    def expect(self) -> None:
        """Note which parameters will receive a gradient in the backward pass under way."""
        try:
            self.expected = {param for param, node in self._nodes if will_receive_gradient(node)}
        except RuntimeError as error:
            raise ConfigError(
                "torch.autograd.grad does not reduce gradients: call .backward() on a sharded model's loss"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether every expected gradient is here and nothing before this unit's inputs still reads its parameters."""
        return self.expected is not None and self.pending_inputs == 0 and self.expected <= self.arrived

    def reset(self) -> None:
        """Forget the backward pass."""
        self.pending_inputs, self.expected = 0, None
        self.arrived.clear()
