"""What takes part in a measurement: one way to train one model, cut into forward, backward and update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn


class Contestant(ABC):
    """A model, its optimizer and how they are trained. One instance per rank; every rank calls the same methods."""

    @abstractmethod
    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """The loss of this rank's batch."""

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, reduced over the ranks."""

    @abstractmethod
    def update(self) -> None:
        """The optimizer's step, after which no gradient is left."""

    def begin_count(self) -> None:
        """Begin counting what only the contestant itself can count."""
        return

    def end_count(self) -> None:
        """Pause counting."""
        return

    def counts(self) -> dict[str, Any]:
        """What was counted, in all."""
        return {}


class Plain(Contestant):
    """A module and an optimizer that are driven as in plain PyTorch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def forward(self, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """The loss of this rank's batch."""
        loss: torch.Tensor = self.model(tokens_BT, targets_BT)
        return loss

    def backward(self, loss: torch.Tensor) -> None:
        """Gradients, reduced over the ranks."""
        loss.backward()  # type: ignore[no-untyped-call]

    def update(self) -> None:
        """The optimizer's step, after which no gradient is left."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
