"""What the routers do while a model trains: load by layer and expert, drops, entropy, dead experts; their biases.

DeepSpeed-MoE section 3.1. Numbers are per micro-batch and rank in the layer, and sums over all ranks here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trivium.dist.comm import Comm
from trivium.models import Decoder, MoEBlock, Record
from trivium.moe import Aux, Gate, Tally
from trivium.train.data import Tokenizer
from trivium.train.evaluate import drop_free
from trivium.train.tasks import TaskConfig, held_out_examples

# The ledger's phases of rows on their way to experts and back, and of the counts that are agreed before.
EXCHANGE_PHASES = ("dispatch.counts", "dispatch", "combine", "dispatch.backward", "combine.backward")
# Task → layer (as a word, as JSON has it) → choices of each expert.
TaskChoices = Mapping[str, Mapping[str, Sequence[int]]]


class RouterLog:
    """Adds up what the routers of ``model`` chose. Methods with ``comm`` are collectives."""

    def __init__(self, model: Decoder) -> None:
        blocks = enumerate(model.blocks)
        self._layers = {number: block.moe for number, block in blocks if isinstance(block, MoEBlock)}
        self._gates = {
            number: layer.gate
            for number, layer in self._layers.items()
            if isinstance(layer.gate, Gate) and layer.gate.bias is not None
        }
        self._tallies = self._fresh()
        self._loads: dict[int, torch.Tensor] = {}

    def add(self, aux: Mapping[int, Aux]) -> None:
        """Count one micro-batch."""
        for number, one in aux.items():
            self._tallies[number].add(one)
            if number in self._gates:
                self._loads[number] = one.load + self._loads.get(number, 0)

    def update_biases(self, comm: Comm, *, keep: bool) -> None:
        """Move the gates' biases towards an even load, by all ranks' choices of this step; not if ``keep`` is False."""
        for number, gate in self._gates.items():
            load = self._loads.pop(number)
            everyone = comm.all_reduce_ints(load.tolist())
            if keep:
                gate.update_bias(torch.tensor(everyone))

    def read(self, comm: Comm) -> list[dict[str, Any]]:
        """One row per layer, over all ranks, of what was counted since the last call."""
        mine = [self._numbers(number) for number in self._layers]
        self._tallies = self._fresh()
        everyone = comm.all_gather_json(mine)
        return [self._row(number, [rows[place] for rows in everyone]) for place, number in enumerate(self._layers)]

    def _fresh(self) -> dict[int, Tally]:
        return {number: Tally() for number in self._layers}

    def _numbers(self, number: int) -> dict[str, Any]:
        report = self._tallies[number].report()
        return {"load": list(report.load), "dropped": report.dropped, "entropy": report.router_entropy}

    def _row(self, number: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        counted = [row for row in rows if row["load"]]
        load = [sum(column) for column in zip(*(row["load"] for row in counted), strict=True)]
        total = sum(load)
        entropy = sum(row["entropy"] * sum(row["load"]) for row in counted)
        return {
            "layer": number,
            "load": load,
            "drop_rate": sum(row["dropped"] for row in counted) / total if total else 0.0,
            "entropy": entropy / total if total else 0.0,
            "dead": [expert for expert, count in enumerate(load) if not count],
        }


def task_choices(
    model: Decoder, config: TaskConfig, using: Tokenizer, comm: Comm, device: torch.device, count: int = 32
) -> TaskChoices:
    """How often each layer sends the tokens of ``count`` held-out examples of each task to each expert. Collective."""
    examples = held_out_examples(config, count)
    found: dict[str, dict[str, list[int]]] = {}
    for name in config.names:
        texts = [example.prompt + example.answer for example in examples if example.task == name]
        mine = choices(model, using.encode_batch(texts[comm.rank :: comm.size]), using.pad_id, device)
        everyone = comm.all_gather_json([mine[layer] for layer in mine])
        found[name] = {
            str(layer): [sum(column) for column in zip(*(rows[place] for rows in everyone), strict=True)]
            for place, layer in enumerate(mine)
        }
    return found


@torch.no_grad()
def choices(model: Decoder, rows: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> dict[int, list[int]]:
    """How often each layer sends these texts' tokens to each expert. Collective at stage 3 or with experts apart.

    ``rows``: token ids; ranks may have different ones, or none. Nothing is dropped: see `drop_free`.
    """
    longest = max((len(row) for row in rows), default=1)
    padded = [[*row, *[pad_id] * (longest - len(row))] for row in rows] or [[pad_id]]
    counts = torch.tensor([len(row) for row in rows] or [0], device=device)
    used_T = (torch.arange(longest, device=device)[None] < counts[:, None]).view(-1)
    record = Record()
    with drop_free(model):
        model(torch.tensor(padded, device=device), record=record)
    found = {}
    for number, aux in record.aux.items():
        chosen = aux.routing.experts_TK[used_T].view(-1)
        found[number] = torch.bincount(chosen, minlength=len(aux.load)).tolist()
    return found
