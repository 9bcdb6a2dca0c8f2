"""A toy model for the engine's tests: exact, batch-invariant, and wrong as soon as one cache block is.

Its cache holds the tokens themselves; its logits are a hash of all tokens of the sequence as read back through the
block table, so that they depend on every one of them and on nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from tests.kernels.steps import sampler as native_sampler
from tests.kernels.steps import variants
from trivium.inference.cache import PagedCache
from trivium.inference.engine import Engine, EngineConfig
from trivium.inference.request import Delta, Request, SamplingParams
from trivium.kernels.draws import Sampler
from trivium.kernels.program import Batch, Cache, CacheSpec, Output

SPEC = CacheSpec(kv_heads=1, head_dim=1, value_dim=0)
VOCABULARY = 40
_ROWS = 997


# What may draw: numpy, and the native kernels where they are.
DRAWN_BY = [pytest.param("numpy"), *(pytest.param(name, id="native") for name in variants()[:1])]


def sampler(drawn_by: str) -> Sampler | None:
    """One of `DRAWN_BY`, on two threads."""
    return None if drawn_by == "numpy" else native_sampler(drawn_by, 2)


class ToyExecutor:
    """Logits [R, V] by the history. ``poison``: first tokens after which they are NaN.

    With a ``period`` only the last tokens count, so that the text repeats itself.
    """

    name = "toy"
    batch_invariant = True

    def __init__(self, *, vocabulary: int = VOCABULARY, poison: frozenset[int] = frozenset(), period: int = 0,
                 sampler: Sampler | None = None) -> None:  # fmt: skip
        self.sampler = sampler
        self.vocabulary = vocabulary
        self.poison = poison
        self.period = period
        keys = torch.arange(1, _ROWS + 1)[:, None] * 97
        self.table = ((torch.arange(1, vocabulary + 1) * keys) % 10_007).float() / 1_000
        self.best: list[int] = self.table.argmax(dim=1).tolist()
        self.calls: list[int] = []
        self.raises: Exception | None = None

    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
        if self.raises is not None:
            raise self.raises
        keys = caches[0].keys.numpy()
        size = keys.shape[2]
        self.calls.append(len(batch.token_ids))
        tables, rows, positions = batch.block_tables.tolist(), batch.sequences.tolist(), batch.positions.tolist()
        for token, row, position in zip(batch.token_ids.tolist(), rows, positions, strict=True):
            keys[tables[row][position // size], 0, position % size, 0] = token
        at, poisoned, hidden = [], [], []
        for index in batch.output_rows.tolist():
            count = positions[index] + 1
            blocks = tables[rows[index]][: -(-count // size)]
            history = keys[blocks, 0, :, 0].ravel()[:count].tolist()
            at.append(self.key(history))
            poisoned.append(history[0] in self.poison)
            hidden.append(history[-1:] * 2)
        logits = self.table[at]
        if any(poisoned):
            logits[torch.tensor(poisoned)] = float("nan")
        return Output(logits=logits, hidden=torch.tensor(hidden))

    def row(self, history: list[float]) -> torch.Tensor:
        """Logits [V] after ``history``."""
        return self.table[self.key(history)]

    def key(self, history: list[float]) -> int:
        """A number below _ROWS that every token of ``history`` changes."""
        key = 0
        for token in history[-self.period :] if self.period else history:
            key = (key * 1_000_003 + int(token) + 1) % (2**61 - 1)
        return key % _ROWS

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """What the engine must answer."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(self.best[self.key([float(t) for t in tokens])])
        return tokens[len(prompt) :]


class Letters:
    """Token 0 is special (no text), 1 … 26 are letters, 27 a space, 30 … 33 the four bytes of one emoji."""

    def decode(self, token_ids: list[int]) -> str:
        raw = b""
        for token in token_ids:
            if 1 <= token <= 26:
                raw += bytes([96 + token])
            elif token == 27:
                raw += b" "
            elif 30 <= token <= 33:
                raw += "😀".encode()[token - 30 : token - 29]
            elif token:
                raw += b"."
        return raw.decode(errors="replace")


def engine(
    executor: ToyExecutor | None = None,
    *,
    blocks: int = 64,
    size: int = 4,
    max_positions: int = 200,
    eos: tuple[int, ...] = (),
    **config: object,
) -> Engine:
    executor = executor or ToyExecutor()
    return Engine(
        executor,
        PagedCache([SPEC], num_blocks=blocks, block_size=size, dtype="float32"),
        vocabulary=executor.vocabulary,
        max_positions=max_positions,
        eos_ids=frozenset(eos),
        decoder=Letters(),
        config=EngineConfig(**{"max_sequences": 8, "step_tokens": 16, **config}),  # type: ignore[arg-type]
    )


def ask(
    name: str, prompt: list[int], *, collect: object = None, constraint: object = None, **params: object
) -> Request:
    settings = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, **params})  # type: ignore[arg-type]
    return Request(request_id=name, prompt_token_ids=prompt, params=settings, collect=collect, constraint=constraint)  # type: ignore[arg-type]


class Answers:
    """All deltas of an engine, put together by request and choice; ``check`` runs after every step."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.deltas: dict[tuple[str, int], list[Delta]] = {}

    def run(self, *requests: Request, steps: int = 10_000) -> Answers:
        for request in requests:
            self.engine.add(request)
        for _ in range(steps):
            if self.engine.idle:
                break
            for delta in self.engine.step():
                self.deltas.setdefault((delta.request_id, delta.choice), []).append(delta)
            self.engine.check()
        return self

    def tokens(self, name: str, choice: int = 0) -> list[int]:
        return [token for delta in self.deltas[name, choice] for token in delta.token_ids]

    def text(self, name: str, choice: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas[name, choice])

    def last(self, name: str, choice: int = 0) -> Delta:
        return self.deltas[name, choice][-1]
