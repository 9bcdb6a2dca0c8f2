"""The scheduler alone, in integers: any mix of requests ends, in any cache that holds one, with the right tokens.

The model is a hash of all earlier tokens, read through the block tables from a cache of integers: a block that is
lost, shared wrongly or overwritten gives other tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trivium.base.errors import CapacityError, ConfigError
from trivium.inference.blocks import BlockError, BlockPool, most_held
from trivium.inference.scheduler import Piece, Scheduler, Sequence, State


def next_token(history: list[int], choice: int, window: int | None = None) -> int:
    """With a ``window`` only so many tokens count: where a layer stops reading."""
    start = 0 if window is None else max(0, len(history) - window)
    return hash((tuple(history[start:]), choice, len(history))) % 5


@dataclass
class Toy:
    """Runs plans as a model would: writes tokens to the cache's blocks, reads all earlier ones back."""

    scheduler: Scheduler
    drafts: bool = False
    cache: dict[tuple[int, int], int] = field(default_factory=dict)
    alive: dict[str, list[Sequence]] = field(default_factory=dict)
    done: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    steps: int = 0
    cached: int = 0

    def step(self) -> None:
        plan = self.scheduler.schedule()
        assert plan.pieces or self.scheduler.idle
        assert plan.num_tokens <= self.scheduler.step_tokens
        if self.scheduler.running:
            assert self.scheduler.running[0] in [piece.sequence for piece in plan.pieces], "the first one stands still"
        for source, target in plan.copies:
            for slot in range(self.scheduler.pool.block_size):
                if (source, slot) in self.cache:
                    self.cache[target, slot] = self.cache[source, slot]
        written = set()
        for piece in plan.pieces:
            written |= self._write(piece)
        assert len(written) == plan.num_tokens, "two sequences write one place"
        for piece in plan.pieces:
            self._finish(piece)
        self.scheduler.check()
        self.steps += 1

    def _write(self, piece: Piece) -> set[tuple[int, int]]:
        sequence, size = piece.sequence, self.scheduler.pool.block_size
        tokens = (*sequence.tokens[piece.start : piece.start + piece.count], *piece.drafts)
        places = set()
        for position, token in enumerate(tokens, start=piece.start):
            place = (sequence.blocks[position // size], position % size)
            assert not self.scheduler.pool.shared(place[0]), "a shared block is written"
            self.cache[place] = token
            places.add(place)
        return places

    def _read(self, sequence: Sequence, upto: int) -> list[int]:
        """All tokens below ``upto``; zeros for those that are behind the window."""
        size, window = self.scheduler.pool.block_size, self.scheduler.window
        first = 0 if window is None else max(0, upto - window)
        return [0] * first + [self.cache[sequence.blocks[p // size], p % size] for p in range(first, upto)]

    def _next(self, history: list[int], choice: int) -> int:
        return next_token(history, choice, self.scheduler.window)

    def _finish(self, piece: Piece) -> None:
        sequence = piece.sequence
        assert piece.last == (piece.start + piece.count == len(sequence.tokens))
        if not piece.last:
            self.scheduler.advance(piece, [])
            return
        ends = range(piece.start + piece.count, piece.start + piece.count + len(piece.drafts) + 1)
        rows = [self._read(sequence, end) for end in ends]  # as a model's: before anyone forks
        group = [sequence, *self.scheduler.fork(sequence)]
        for member in group:
            new: list[int] = []
            for index, row in enumerate(rows):
                new.append(self._next(row, member.choice))
                if index < len(piece.drafts) and new[-1] != piece.drafts[index]:
                    break
            if member is sequence:
                self.scheduler.advance(piece, new)
            else:
                member.tokens.extend(new)
            if len(member.tokens) >= member.max_tokens:
                self.done[member.request_id, member.choice] = member.tokens[: member.max_tokens]
                self.cached += member.num_cached
                self.scheduler.finish(member)
            elif self.drafts:
                history = list(member.tokens)
                for index in range(3):
                    history.append(self._next(history, member.choice) if index < 2 else 0)
                member.drafts = history[-3:]

    def cancel(self, name: str) -> None:
        for sequence in self.alive.pop(name):
            self.scheduler.finish(sequence)
        self.scheduler.check()


def expected(prompt: list[int], max_tokens: int, choice: int, window: int | None = None) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < max_tokens:
        tokens.append(next_token(tokens, choice, window))
    return tokens


requests = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1), min_size=1, max_size=14),
        st.integers(1, 10),
        st.integers(1, 3),
        st.integers(0, 12),
        st.one_of(st.none(), st.integers(0, 25)),
    ),
    min_size=1,
    max_size=9,
)


@settings(max_examples=250)
@given(
    requests,
    st.integers(0, 8),
    st.integers(1, 4),
    st.integers(3, 7),
    st.integers(1, 12),
    st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 12)),
)
@example([([1] * 14, 10, 3, 0, None)] * 6, 0, 1, 3, 1, True, True, None)
@example([([1] * 14, 10, 3, 0, None)] * 6, 0, 1, 3, 1, True, True, 3)
@example([([0], 1, 1, 0, None), ([0] * 5, 1, 1, 0, None)], 0, 1, 3, 1, True, False, 1)
def test_any_mix_in_any_cache_that_holds_one_ends_with_the_right_tokens(
    asked, spare: int, size: int, most: int, extra: int, prefixes: bool, drafts: bool, window: int | None
) -> None:
    holds_one = max(
        most_held(len(prompt) + new, block_size=size, window=window, step_tokens=most + extra)
        for prompt, new, *_ in asked
    )
    pool = BlockPool(holds_one + spare, size)
    scheduler = Scheduler(pool, max_sequences=most, step_tokens=most + extra, prefix_cache=prefixes, window=window)
    toy = Toy(scheduler, drafts=drafts)
    work = sum((len(prompt) + new) * n for prompt, new, n, *_ in asked)
    bound = max(arrival for *_, arrival, _ in asked) + 2 * len(asked) * (work + 1)
    cancelled = set()
    for now in range(bound):
        for index, (prompt, new, n, arrival, _) in enumerate(asked):
            if arrival == now:
                toy.alive[str(index)] = toy.scheduler.add(str(index), prompt, max_tokens=len(prompt) + new, choices=n)
        for index, (*_, arrival, leaves) in enumerate(asked):
            if leaves is not None and arrival + leaves == now:
                cancelled.add(str(index))
                toy.cancel(str(index))
        toy.step()
        if toy.scheduler.idle and now >= max(arrival for *_, arrival, _ in asked):
            break
    assert toy.scheduler.idle, f"not done after {bound} steps"
    assert pool.num_free == pool.num_blocks
    for index, (prompt, new, n, *_) in enumerate(asked):
        for choice in range(n):
            tokens = toy.done.get((str(index), choice))
            assert tokens is not None or str(index) in cancelled
            assert tokens in (None, expected(prompt, len(prompt) + new, choice, window))


@settings(max_examples=60)
@given(st.integers(0, 10**6))
def test_nobody_starves_while_others_keep_coming(seed: int) -> None:
    """A request ends after no more steps than the work that arrived before it and its own need alone."""
    draw = random.Random(seed)
    toy = Toy(Scheduler(BlockPool(draw.randint(6, 14), 2), max_sequences=4, step_tokens=6))
    before = 0
    due: dict[str, int] = {}
    for now in range(120):
        if draw.random() < 0.5:
            prompt = [draw.randint(0, 1) for _ in range(draw.randint(1, 8))]
            toy.alive[str(now)] = toy.scheduler.add(str(now), prompt, max_tokens=len(prompt) + draw.randint(1, 4))
            before += toy.alive[str(now)][0].max_tokens
            due[str(now)] = before + now  # one token a step in arrival order, never repeated, would take that long
        toy.step()
        for name, last in list(due.items()):
            if (name, 0) in toy.done:
                del due[name]
            else:
                assert now <= last, f"{name} still waits"


def test_arrivals_end_in_order_when_equal() -> None:
    toy = Toy(Scheduler(BlockPool(4, 2), max_sequences=8, step_tokens=16))
    for name in range(6):
        toy.alive[str(name)] = toy.scheduler.add(str(name), [name, 1, 2], max_tokens=8)
    while not toy.scheduler.idle:
        toy.step()
    assert [name for name, _ in toy.done] == [str(name) for name in range(6)]


def test_i5_the_last_one_gives_way_and_finds_its_blocks_again() -> None:
    toy = Toy(Scheduler(BlockPool(6, 2), max_sequences=4, step_tokens=32))
    first, *_ = toy.scheduler.add("first", [1, 2, 3], max_tokens=10)
    second, *_ = toy.scheduler.add("second", [4, 5, 6], max_tokens=10)
    while not toy.scheduler.idle:
        toy.step()
    assert first.preemptions == 0
    assert second.preemptions == toy.scheduler.num_preemptions > 0
    assert toy.done["second", 0] == expected([4, 5, 6], 10, 0)


def test_a_prompt_is_cut_to_the_budget_and_decodes_go_along() -> None:
    toy = Toy(Scheduler(BlockPool(32, 4), max_sequences=3, step_tokens=8))
    toy.scheduler.add("decodes", [1], max_tokens=30)
    toy.step()
    toy.scheduler.add("long", list(range(20)), max_tokens=22)
    sizes = []
    for _ in range(3):
        plan = toy.scheduler.schedule()
        sizes.append([piece.count for piece in plan.pieces])
        for piece in plan.pieces:
            toy._write(piece)
        for piece in plan.pieces:
            toy._finish(piece)
    assert sizes == [[1, 7], [1, 7], [1, 6]]


def test_choices_share_the_prompt_and_copy_the_block_they_write() -> None:
    toy = Toy(Scheduler(BlockPool(16, 4), max_sequences=4, step_tokens=16))
    choices = toy.scheduler.add("r", [1, 2, 3, 4, 5, 6], max_tokens=9, choices=3)
    toy.step()
    assert [choice.state for choice in choices] == [State.RUNNING] * 3
    assert toy.scheduler.pool.num_free == 14
    toy.step()
    assert toy.scheduler.pool.num_free == 12  # two copies; the last writer keeps the block
    assert len({choice.blocks[0] for choice in choices}) == 1
    assert len({choice.blocks[1] for choice in choices}) == 3
    while not toy.scheduler.idle:
        toy.step()
    assert [toy.done["r", choice] for choice in range(3)] == [expected([1, 2, 3, 4, 5, 6], 9, c) for c in range(3)]


def test_a_prefix_is_computed_once() -> None:
    toy = Toy(Scheduler(BlockPool(32, 4), max_sequences=4, step_tokens=64))
    prompt = list(range(13))
    toy.scheduler.add("a", prompt, max_tokens=16)
    while not toy.scheduler.idle:
        toy.step()
    again, *_ = toy.scheduler.add("b", prompt[:12], max_tokens=16)
    other, *_ = toy.scheduler.add("c", [*prompt[:5], 99, *prompt[6:]], max_tokens=16)
    rows, *_ = toy.scheduler.add("d", prompt, max_tokens=16, rows_from=5)
    toy.step()
    assert (again.num_cached, other.num_cached, rows.num_cached) == (8, 4, 4)


def test_blocks_behind_the_window_are_given_back_and_the_last_ones_found_again() -> None:
    toy = Toy(Scheduler(BlockPool(8, 4), max_sequences=2, step_tokens=6, window=9))
    assert toy.scheduler.most_held(1000) == 5  # 8 tokens behind, 6 of a step, wherever blocks begin
    prompt = [token % 3 for token in range(100)]
    held = []
    first, *_ = toy.scheduler.add("long", prompt, max_tokens=140)
    while not toy.scheduler.idle:
        toy.step()
        held.append(len(first.held))
    assert max(held) == 3 and toy.done["long", 0] == expected(prompt, 140, 0, 9)
    again, *_ = toy.scheduler.add("again", toy.done["long", 0][:135], max_tokens=140)
    toy.step()
    assert again.num_cached == 132 and again.num_behind > 0, "only the last two blocks are known, and they suffice"
    while not toy.scheduler.idle:
        toy.step()
    assert toy.done["again", 0] == toy.done["long", 0]


def test_choices_begin_with_the_window_alone() -> None:
    """The leader's last step read further back; what only it needed must not count for those that fork."""
    prompt = [token % 3 for token in range(20)]
    for prefixes in (False, True):
        scheduler = Scheduler(BlockPool(8, 4), max_sequences=3, step_tokens=5, window=5, prefix_cache=prefixes)
        toy = Toy(scheduler)
        _, follower = scheduler.add("r", prompt, max_tokens=24, choices=2)
        for _ in range(4):
            toy.step()
        assert follower.state is State.RUNNING and len(follower.held) == 1
        while not scheduler.idle:
            toy.step()
        assert [toy.done["r", choice] for choice in range(2)] == [expected(prompt, 24, c, 5) for c in range(2)]


def test_what_can_never_fit_is_refused_at_once() -> None:
    scheduler = Scheduler(BlockPool(4, 4), max_sequences=2, step_tokens=8)
    with pytest.raises(CapacityError, match="17 tokens need 5 cache blocks of 4 tokens, the cache has 4"):
        scheduler.add("long", [1], max_tokens=17)
    with pytest.raises(CapacityError, match="n=3, at most 2"):
        scheduler.add("wide", [1], max_tokens=4, choices=3)
    with pytest.raises(ConfigError, match="max_sequences=8 and step_tokens=8"):
        Scheduler(BlockPool(4, 4), max_sequences=8, step_tokens=8)
    assert scheduler.idle
    windowed = Scheduler(BlockPool(4, 4), max_sequences=2, step_tokens=8, window=9)
    with pytest.raises(CapacityError, match="25 tokens need 5 cache blocks"):
        windowed.add("long", [1], max_tokens=25)


def test_i20_cancel_at_each_state() -> None:
    scheduler = Scheduler(BlockPool(8, 2), max_sequences=4, step_tokens=6)
    toy = Toy(scheduler)
    toy.alive["decode"] = scheduler.add("decode", [1, 2, 3], max_tokens=12)
    toy.step()
    toy.alive["prefill"] = scheduler.add("prefill", list(range(9)), max_tokens=10, choices=2)
    toy.alive["queued"] = scheduler.add("queued", [5], max_tokens=3)
    toy.step()
    prefill = toy.alive["prefill"]
    assert [choice.state for choice in prefill] == [State.RUNNING, State.FORKING]
    assert prefill[0].num_left > 1
    assert toy.alive["queued"][0].state is State.WAITING
    toy.cancel("queued")
    toy.cancel("prefill")
    assert [choice.state for choice in prefill] == [State.FINISHED] * 2
    toy.alive["second"] = scheduler.add("second", [7, 7, 7], max_tokens=16)
    while scheduler.num_preemptions == 0:
        toy.step()
    assert toy.alive["second"][0].state is State.WAITING  # preempted
    toy.cancel("second")
    toy.cancel("decode")
    assert scheduler.idle and scheduler.pool.num_free == 8
    scheduler.finish(prefill[0])  # ending twice changes nothing
    scheduler.check()


@pytest.mark.parametrize("defect", ["blocks", "order", "state", "count"])
def test_check_sees_defects(defect: str) -> None:
    toy = Toy(Scheduler(BlockPool(8, 2), max_sequences=2, step_tokens=8))
    first, *_ = toy.scheduler.add("a", [1, 2, 3], max_tokens=8)
    second, *_ = toy.scheduler.add("b", [1, 2, 3], max_tokens=8)
    toy.step()
    if defect == "blocks":
        first.blocks.pop()
    elif defect == "order":
        toy.scheduler.running = [second, first]
    elif defect == "state":
        second.state = State.WAITING
    else:
        toy.scheduler._forking = 1
    with pytest.raises(BlockError):
        toy.scheduler.check()
