"""Greedy text from a sharded model, without a cache: every token runs the whole text again. For tasks and samples.

Prompts are dealt to the ranks; all ranks run equally many forwards, so that each takes part in every gather. Experts
drop nothing here, as when the model is served: rows stand beside others' padding, which must not take their places.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from trivium.base.errors import ConfigError
from trivium.dist.comm import Comm
from trivium.models import Decoder, MoEBlock
from trivium.train.data import Tokenizer


@contextlib.contextmanager
def drop_free(model: Decoder) -> Iterator[None]:
    """Inside the block ``model`` is in evaluation mode and its experts take every token, whatever their capacity."""
    layers = [block.moe for block in model.blocks if isinstance(block, MoEBlock)]
    training, limits = model.training, [layer.capacity for layer in layers]
    model.eval()
    for layer in layers:
        layer.capacity = None
    try:
        yield
    finally:
        model.train(training)
        for layer, limit in zip(layers, limits, strict=True):
            layer.capacity = limit


def encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of ``prompt`` and of what texts begin with. Raises DataError for what the tokenizer cannot read."""
    ids = tokenizer.encode(prompt)
    begin = [] if tokenizer.begin_id is None or ids[:1] == [tokenizer.begin_id] else [tokenizer.begin_id]
    return [*begin, *ids]


class Generator:
    """Answers prompts with ``model``. Its methods are collectives; every rank passes the same prompts."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer, comm: Comm, device: torch.device) -> None:
        self.model, self.tokenizer, self.comm, self.device = model, tokenizer, comm, device

    def answers(self, prompts: Sequence[str], *, max_tokens: int) -> list[str]:
        """What the model writes after each prompt, up to its end token, ``max_tokens`` or its last position."""
        mine = [encoded(self.tokenizer, prompt) for prompt in prompts][self.comm.rank :: self.comm.size]
        written = self.extend(mine, max_tokens=max_tokens)
        everyone = self.comm.all_gather_json([self.tokenizer.decode(ids) for ids in written])
        return [everyone[i % self.comm.size][i // self.comm.size] for i in range(len(prompts))]

    @torch.no_grad()
    def extend(self, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
        """The ids that follow each of this rank's prompts; ranks may have different prompts, or none."""
        limit = self.model.config.max_positions
        for ids in prompts:
            if not 1 <= len(ids) <= limit:
                raise ConfigError(f"a prompt of {len(ids)} tokens: expected 1 to max_positions={limit}")
        rows = [list(ids) for ids in prompts] or [[self.tokenizer.end_id]]
        written: list[list[int]] = [[] for _ in rows]
        open_rows = [bool(prompts)] * len(rows)
        with drop_free(self.model):
            for _ in range(max_tokens):
                if not self.comm.all_reduce_ints([int(any(open_rows))], "max")[0]:
                    break
                ids = self._next(rows)
                for index, row in enumerate(rows):
                    if not open_rows[index]:
                        continue
                    if ids[index] == self.tokenizer.end_id:
                        open_rows[index] = False
                        continue
                    row.append(ids[index])
                    written[index].append(ids[index])
                    open_rows[index] = len(row) < limit
        return written[: len(prompts)]

    def _next(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest next id of each row; rows are padded on the right, where causal attention does not look."""
        longest = max(len(row) for row in rows)
        padded = [[*row, *[self.tokenizer.pad_id] * (longest - len(row))] for row in rows]
        logits_BTV = self.model(torch.tensor(padded, device=self.device))
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        best: list[int] = logits_BTV[torch.arange(len(rows), device=self.device), last].argmax(-1).tolist()
        return best
