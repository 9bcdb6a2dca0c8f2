"""Which tokens of which requests the next step computes: continuous batching in integers, no tensor.

DeepSpeed Inference section 3.1: one step mixes decodes and pieces of prompts under one budget of tokens.

[Note: no deadlock] Sequences have a fixed order: arrival, then choice. (1) Only one that fits alone into the whole
cache is taken in. (2) The running ones are always the first ones of that order: admission never skips, and the one that
gives way to another is always the last running one. (3) Whoever needs a block takes it from the last in the order, so
the first one never gives way except to nobody, and with all others gone it fits by (1). (4) Decodes take one token of
the budget each and there are fewer of them than the budget, and prompts are served in order, so the first sequence
computes at least one token in every step. With a window a prompt's blocks are taken piece by piece, as (3) says, and
(1) counts what is held at once. Hence it ends after finitely many steps, the next one becomes first, and all
end; whatever preemption throws away belongs to later ones and delays them, never the first.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from trivium.base.errors import CapacityError, ConfigError
from trivium.inference.blocks import HOLE, ROOT_DIGEST, BlockError, BlockPool, chain, most_held


class State(Enum):
    """Where a sequence stands. FORKING waits, without blocks, for its leader to have computed their common prompt."""

    WAITING = "waiting"
    FORKING = "forking"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """One choice of one request: its tokens and how far the cache holds them.

    ``tokens`` are the prompt's and the answer's; the cache holds positions below ``num_computed``. ``max_tokens``
    bounds both together. The first ``num_behind`` of ``blocks`` are behind the window: HOLE. From ``rows_from`` on each
    row of the model's output is wanted (None: only the last one), so that those positions are never taken from the
    prefix cache. Nothing ``private`` is put there: more than its tokens decided it. ``drafts``: guesses of what comes.
    """

    request_id: str
    choice: int
    order: tuple[int, int]
    tokens: list[int]
    num_prompt: int
    max_tokens: int
    rows_from: int | None = None
    state: State = State.WAITING
    num_computed: int = 0
    num_cached: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    followers: list[Sequence] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    num_published: int = 0
    num_behind: int = 0
    preemptions: int = 0
    private: bool = False

    def __lt__(self, other: Sequence) -> bool:
        return self.order < other.order

    @property
    def num_left(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.num_computed

    @property
    def held(self) -> list[int]:
        """Its blocks, without those behind the window."""
        return self.blocks[self.num_behind :]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens ``start … start + count`` of a sequence, then ``drafts``; ``last``: they end at its newest token."""

    sequence: Sequence
    start: int
    count: int
    last: bool
    drafts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: first copy blocks (from, to), then compute the pieces."""

    pieces: list[Piece]
    copies: list[tuple[int, int]]
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        """Tokens that the step computes."""
        return sum(piece.count + len(piece.drafts) for piece in self.pieces)


def check_budget(max_sequences: int, step_tokens: int) -> None:
    """Raises ConfigError where sequences that run would leave no room in a step for a piece of a prompt."""
    if not 0 < max_sequences < step_tokens:
        given = f"max_sequences={max_sequences} and step_tokens={step_tokens}"
        raise ConfigError(f"{given}: expected 0 < max_sequences < step_tokens, so that every step can take a prompt on")


class Scheduler:
    """Owns the block pool and the queues; whoever runs the model calls `schedule`, then `advance` for each piece."""

    def __init__(
        self,
        pool: BlockPool,
        *,
        max_sequences: int,
        step_tokens: int,
        prefix_cache: bool = True,
        window: int | None = None,
    ) -> None:
        """At most ``max_sequences`` run at once, ``step_tokens`` tokens in a step. Raises as `check_budget` does.

        ``window``: no layer reads further back, so that blocks behind it are given back.
        """
        check_budget(max_sequences, step_tokens)
        self.pool = pool
        self.max_sequences = max_sequences
        self.step_tokens = step_tokens
        self.prefix_cache = prefix_cache
        self.window = window
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.num_preemptions = 0
        self._forking = 0
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.running and not self.waiting

    def add(
        self, request_id: str, prompt: list[int], *, max_tokens: int, choices: int = 1, rows_from: int | None = None
    ) -> list[Sequence]:
        """Queue a request; ``max_tokens`` bounds its prompt and answer together. Returns its choices, the leader first.

        Raises:
            CapacityError: one choice of it would not fit into the whole cache, or it has too many choices.
        """
        needed = self.most_held(max_tokens)
        if needed > self.pool.num_blocks:
            raise CapacityError(
                f"request {request_id}: {max_tokens} tokens need {needed} cache blocks of "
                f"{self.pool.block_size} tokens, the cache has {self.pool.num_blocks}; shorten it, or give the engine "
                "more memory"
            )
        if choices > self.max_sequences:
            raise CapacityError(
                f"request {request_id}: n={choices}, at most {self.max_sequences} sequences run at once"
            )
        leader, *followers = (
            Sequence(request_id, choice, (self._arrivals, choice), list(prompt), len(prompt), max_tokens, rows_from)
            for choice in range(choices)
        )
        self._arrivals += 1
        for follower in followers:
            follower.state = State.FORKING
        leader.followers = followers
        insort(self.waiting, leader)
        return [leader, *followers]

    def schedule(self) -> Plan:
        """The next step; an empty plan only when idle. Blocks are held when it returns."""
        plan = Plan([], [], [])
        decodes, prefills = self._go_on(plan)
        budget = self.step_tokens - len(decodes) - sum(piece.count for piece in prefills)
        while not plan.preempted and self.waiting and budget > 0 and self._admit(self.waiting[0]):
            prefills.append(self._prefill(self.running[-1], budget))
            self._reserve(self.running[-1], prefills[-1].start + prefills[-1].count, plan)
            budget -= prefills[-1].count
        for sequence in decodes:
            plan.pieces.append(self._decode(sequence, budget))
            budget -= len(plan.pieces[-1].drafts)
        plan.pieces.extend(prefills)
        return plan

    def advance(self, piece: Piece, new_tokens: list[int]) -> None:
        """A computed piece: all but the last of ``new_tokens`` were its drafts (none: it was not last)."""
        sequence = piece.sequence
        sequence.tokens.extend(new_tokens)
        self._computed(sequence, piece.start + piece.count + max(0, len(new_tokens) - 1))
        if sequence.rows_from is not None:
            sequence.rows_from = max(sequence.rows_from, sequence.num_computed)
        if piece.drafts:
            keep = -(-len(sequence.tokens) // self.pool.block_size)
            self.pool.release(reversed(sequence.blocks[keep:]))
            del sequence.blocks[keep:]

    def fork(self, leader: Sequence) -> list[Sequence]:
        """The followers of a leader whose prompt is computed, now running on its blocks."""
        followers, leader.followers = leader.followers, []
        for follower in followers:
            self._computed(leader, leader.num_prompt)
            self.pool.share(leader.held)
            follower.blocks = list(leader.blocks)
            follower.num_behind = leader.num_behind
            follower.digests = list(leader.digests)
            follower.num_published = leader.num_published
            follower.rows_from = None
            follower.num_computed = leader.num_computed
            follower.num_cached = leader.num_cached
            follower.state = State.RUNNING
            insort(self.running, follower)
        self._forking -= len(followers)
        return followers

    def finish(self, sequence: Sequence) -> None:
        """End a sequence in any state, with those that wait to fork from it; its blocks are free when this returns."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._forking -= len(sequence.followers)
        elif sequence.state is State.WAITING:
            self.waiting.remove(sequence)
        for follower in sequence.followers:
            follower.state = State.FINISHED
        sequence.followers = []
        self._release(sequence)
        sequence.state = State.FINISHED

    def distrust(self, sequence: Sequence) -> None:
        """Take out of the prefix cache what the sequence put there, also before it gave way to another."""
        if sequence.preemptions or sequence.state is State.RUNNING:
            for digest in sequence.digests[sequence.num_cached // self.pool.block_size :]:
                self.pool.forget(self.pool.match([digest]))

    def sequences(self) -> Iterator[Sequence]:
        """All that are not finished."""
        for sequence in (*self.running, *self.waiting):
            yield sequence
            yield from sequence.followers

    def check(self) -> None:
        """Verify blocks, order and states. Raises BlockError when something does not add up."""
        self.pool.check(sequence.held for sequence in self.sequences())
        if self.running != sorted(self.running) or self.waiting != sorted(self.waiting):
            raise BlockError("a queue is out of order")
        if self.running and self.waiting and self.waiting[0] < self.running[-1]:
            raise BlockError("a later sequence runs while an earlier one waits")
        if self._forking != sum(len(sequence.followers) for sequence in self.running):
            raise BlockError(f"{self._forking} choices counted as waiting to fork")
        if len(self.running) + self._forking > self.max_sequences:
            raise BlockError(f"{len(self.running)} sequences run and {self._forking} wait to fork: too many")
        for sequence in self.sequences():
            expected = State.RUNNING if sequence in self.running else sequence.state
            if sequence.state is not expected or sequence.state is State.FINISHED:
                raise BlockError(f"{sequence.request_id}: state {sequence.state.value}")
            if len(sequence.blocks) * self.pool.block_size < sequence.num_computed:
                raise BlockError(
                    f"{sequence.request_id}: {sequence.num_computed} tokens in {len(sequence.blocks)} blocks"
                )
            if len(sequence.held) > self.most_held(sequence.max_tokens) or HOLE in sequence.held:
                raise BlockError(f"{sequence.request_id}: holds {len(sequence.held)} blocks, or lacks one it reads")
            if sequence.state is not State.RUNNING and (sequence.blocks or sequence.num_computed):
                raise BlockError(f"{sequence.request_id}: holds blocks while {sequence.state.value}")

    def most_held(self, tokens: int) -> int:
        """Blocks that a sequence of ``tokens`` holds at most."""
        size = self.pool.block_size
        return most_held(tokens, block_size=size, window=self.window, step_tokens=self.step_tokens)

    def _go_on(self, plan: Plan) -> tuple[list[Sequence], list[Piece]]:
        """The running sequences with one token left, and pieces of the others' prompts; all have blocks to write to."""
        ready: list[Sequence] = []
        prefills: list[Piece] = []
        budget = self.step_tokens - sum(sequence.num_left == 1 for sequence in self.running)
        for sequence in list(self.running):
            if sequence.state is not State.RUNNING:  # it has given way
                break
            piece = self._prefill(sequence, 1 if sequence.num_left == 1 else budget)
            if piece.count == 0:
                continue
            if not self._reserve(sequence, piece.start + piece.count, plan):
                break
            if sequence.num_left == 1:
                ready.append(sequence)
            else:
                prefills.append(piece)
                budget -= piece.count
        return ready, prefills

    def _reserve(self, sequence: Sequence, upto: int, plan: Plan) -> bool:
        """Blocks for positions below ``upto``, the one written first not shared; False: it had to give way itself."""
        size = self.pool.block_size
        while True:
            at = sequence.num_computed // size
            copied = at < len(sequence.blocks) and self.pool.shared(sequence.blocks[at])
            needed = -(-upto // size) - len(sequence.blocks) + copied
            if needed <= self.pool.num_free:
                break
            victim = self.running[-1]
            self._preempt(victim, plan)
            if victim is sequence:
                return False
        if copied:
            (fresh,) = self.pool.allocate(1)
            plan.copies.append((sequence.blocks[at], fresh))
            self.pool.release([sequence.blocks[at]])
            sequence.blocks[at] = fresh
            needed -= 1
        if needed > 0:
            sequence.blocks.extend(self.pool.allocate(needed))
        return True

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Back to the queue without blocks; what it had published may be found again."""
        self.running.pop()
        self._forking -= len(sequence.followers)
        self._release(sequence)
        sequence.state = State.WAITING
        sequence.preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, sequence)
        plan.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.pool.release(reversed(sequence.held))
        sequence.blocks = []
        sequence.num_computed = sequence.num_behind = 0
        sequence.drafts = []

    def _admit(self, sequence: Sequence) -> bool:
        """Start the first waiting sequence if there is room for all its tokens, and one block more per running one."""
        if len(self.running) + self._forking + 1 + len(sequence.followers) > self.max_sequences:
            return False
        hits = self._hits(sequence)
        found = [block for block in hits if block != HOLE]
        needed = self.most_held(len(sequence.tokens)) - len(found)
        if needed + self.pool.num_unused(found) + len(self.running) > self.pool.num_free:
            return False
        self.pool.share(found)
        sequence.num_behind = len(hits) - len(found)
        sequence.blocks = hits + (self.pool.allocate(needed) if self.window is None else [])
        sequence.num_published = len(hits)
        sequence.num_computed = len(hits) * self.pool.block_size
        if sequence.preemptions == 0:
            sequence.num_cached = sequence.num_computed if found else 0
        sequence.state = State.RUNNING
        self.waiting.pop(0)
        self.running.append(sequence)
        self._forking += len(sequence.followers)
        return True

    def _hits(self, sequence: Sequence) -> list[int]:
        """Known blocks, as far back as a window reads; the last token and those whose rows are wanted are computed."""
        if not self.prefix_cache:
            return []
        last = len(sequence.tokens) - 1
        full = (last if sequence.rows_from is None else min(last, sequence.rows_from)) // self.pool.block_size
        self._extend_digests(sequence, full)
        reach = None if self.window is None else -(-(self.window - 1) // self.pool.block_size)
        return self.pool.match(sequence.digests[:full], reach)

    def _prefill(self, sequence: Sequence, budget: int) -> Piece:
        count = min(sequence.num_left, budget)
        return Piece(sequence, sequence.num_computed, count, count == sequence.num_left)

    def _decode(self, sequence: Sequence, budget: int) -> Piece:
        """One token and as many of its drafts as budget, length and free blocks allow; drafts never displace anyone."""
        size = self.pool.block_size
        room = len(sequence.blocks) + self.pool.num_free
        most = min(len(sequence.drafts), budget, sequence.max_tokens - len(sequence.tokens) - 1)
        most = max(0, min(most, room * size - len(sequence.tokens)))
        drafts, sequence.drafts = tuple(sequence.drafts[:most]), []
        short = -(-(len(sequence.tokens) + most) // size) - len(sequence.blocks)
        if short > 0:
            sequence.blocks.extend(self.pool.allocate(short))
        return Piece(sequence, sequence.num_computed, 1, True, drafts)

    def _computed(self, sequence: Sequence, upto: int) -> None:
        """The cache holds the positions below ``upto``: full blocks can be found, those behind the window go back."""
        sequence.num_computed = upto
        full = upto // self.pool.block_size
        if self.prefix_cache and not sequence.private and full > sequence.num_published:
            self._extend_digests(sequence, full)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.blocks[index], sequence.digests[index])
            sequence.num_published = full
        behind = 0 if self.window is None else max(0, upto - self.window + 1) // self.pool.block_size
        if behind > sequence.num_behind:
            self.pool.release(sequence.blocks[sequence.num_behind : behind])
            sequence.blocks[sequence.num_behind : behind] = [HOLE] * (behind - sequence.num_behind)
            sequence.num_behind = behind

    def _extend_digests(self, sequence: Sequence, full: int) -> None:
        size = self.pool.block_size
        digests = sequence.digests
        while len(digests) < full:
            start = len(digests) * size
            digests.append(chain(digests[-1] if digests else ROOT_DIGEST, sequence.tokens[start : start + size]))
