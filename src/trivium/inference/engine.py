"""The engine: schedule a step, run it, finish it. One thread, no tokens of its own: all it says is in the deltas.

DeepSpeed Inference section 3.1. R rows of a step's output, V vocabulary.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch

from trivium.base.errors import ConfigError, TriviumError
from trivium.inference.admission import checked
from trivium.inference.batch import BatchBuilder, Rows
from trivium.inference.blocks import BlockError, BlockPool
from trivium.inference.cache import PagedCache
from trivium.inference.choice import Choice, new_choice
from trivium.inference.request import Delta, Request, RequestError
from trivium.inference.sampler import Draw, Drawn, logprobs, sample
from trivium.inference.scheduler import Piece, Scheduler, Sequence, check_budget
from trivium.inference.speculate import Guesser, StepCost
from trivium.inference.stats import Counters, EngineStats
from trivium.inference.stream import Decoder
from trivium.kernels.executor import Executor
from trivium.kernels.program import Output

_FAILS_TO_DRAW = (TriviumError, MemoryError, RuntimeError)  # of the sampler, of numpy, of torch


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of a step. ``step_tokens`` bounds how long one step takes, and so the pause that a prompt makes in others.

    ``speculate``: guess tokens that stood before; None: where the backend's answer cannot depend on it.
    """

    max_sequences: int = 64
    step_tokens: int = 256
    prefix_cache: bool = True
    speculate: bool | None = False

    def __post_init__(self) -> None:
        check_budget(self.max_sequences, self.step_tokens)


@dataclass(frozen=True, slots=True)
class _Run:
    """What one call of the executor computed."""

    pieces: list[Piece]
    rows: list[Rows]
    output: Output


class Engine:
    """Answers requests with one executor over one cache. Not for several threads: see `thread.EngineThread`."""

    def __init__(
        self,
        executor: Executor,
        cache: PagedCache,
        *,
        vocabulary: int,
        max_positions: int,
        eos_ids: frozenset[int] = frozenset(),
        decoder: Decoder | None = None,
        config: EngineConfig | None = None,
        num_experts: tuple[int, ...] = (),
    ) -> None:
        """``max_positions``: of the model; a cache that holds fewer tokens lowers it."""
        self.config = config or EngineConfig()
        self.executor = executor
        self.cache = cache
        self.vocabulary = vocabulary
        self.max_positions = cache.longest(max_positions, self.config.step_tokens)
        self.eos_ids = eos_ids
        self.decoder = decoder
        self._scheduler = Scheduler(
            BlockPool(cache.num_blocks, cache.block_size),
            max_sequences=self.config.max_sequences,
            step_tokens=self.config.step_tokens,
            prefix_cache=self.config.prefix_cache,
            window=cache.window,
        )
        self._batches = BatchBuilder(
            max_sequences=self.config.max_sequences,
            block_size=cache.block_size,
            most_blocks=-(-self.max_positions // cache.block_size),
        )
        self._choices: dict[Sequence, Choice] = {}
        self._requests: dict[str, list[Choice]] = {}
        self._pending: list[Delta] = []
        self._seeds = random.SystemRandom()
        self._counters = Counters(num_experts)
        self._cost = StepCost()
        wanted = self.config.speculate
        self._speculate = executor.batch_invariant if wanted is None else wanted

    @property
    def idle(self) -> bool:
        """Whether `step` has nothing to do and nothing to tell."""
        return self._scheduler.idle and not self._pending

    @property
    def stats(self) -> EngineStats:
        """Counts as they are now."""
        return self._counters.snapshot(self._scheduler)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: something in it cannot be served; ContextLengthError: its prompt is too long.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id {request.request_id!r} is being answered already", param="request_id")
        request, most = self.checked(request)
        params = request.params
        all_rows = request.collect is not None or params.prompt_logprobs is not None or request.routing is not None
        sequences = self._scheduler.add(
            request.request_id,
            list(request.prompt_token_ids),
            max_tokens=most,
            choices=params.n,
            rows_from=0 if all_rows else None,
        )
        for sequence in sequences:
            sequence.private = request.routing is not None
        seed = self._seeds.getrandbits(63) if params.seed is None else params.seed
        try:
            choices = [
                new_choice(
                    request,
                    sequence,
                    seed=seed,
                    eos_ids=self.eos_ids,
                    decoder=self.decoder,
                    guesser=Guesser(self._cost) if self._speculate else None,
                )
                for sequence in sequences
            ]
        except BaseException:  # a constraint that cannot be forked, for one
            for sequence in sequences:
                self._scheduler.finish(sequence)
            raise
        self._requests[request.request_id] = choices
        self._choices.update(zip(sequences, choices, strict=True))
        self._counters.prompt_tokens += len(request.prompt_token_ids)

    def checked(self, request: Request) -> tuple[Request, int]:
        """The request as it will be served and its length at most; any thread may ask. Raises as `add`."""
        request, most = checked(
            request,
            vocabulary=self.vocabulary,
            max_positions=self.max_positions,
            max_sequences=self.config.max_sequences,
            has_text=self.decoder is not None,
            num_moe_layers=len(self._counters.num_experts),
        )
        return request, most

    def cancel(self, request_id: str) -> bool:
        """End a request now; its blocks are free when this returns, its last deltas come with the next step."""
        choices = self._requests.get(request_id)
        if choices is None:
            return False
        for choice in list(choices):
            if not choice.num_generated:  # no row has shown yet that what it computed is finite
                self._scheduler.distrust(choice.sequence)
            self._pending.append(choice.delta("", [], reason="abort"))
            self._end(choice, "abort")
        return True

    def knows(self, request_id: str) -> bool:
        """Whether a request is being answered."""
        return request_id in self._requests

    def step(self) -> list[Delta]:
        """One step; what it added to whom. Empty when idle, and in steps that only read prompts.

        When the executor's run raises, nothing has changed: the step can be tried again, or the requests cancelled.
        What its sampler raises ends the requests that were to draw, with that error.
        """
        started = time.perf_counter()
        plan = self._scheduler.schedule()
        if not plan.pieces:
            deltas, self._pending = self._pending, []
            return deltas
        self.cache.copy(plan.copies)
        runs, refused = self._run(plan.pieces)
        deltas, self._pending = self._pending, []
        for choice, why in refused:
            self._fail(choice, why, deltas)
        for run in runs:
            self._finish(run, deltas)
        self._counters.steps += 1
        timed = self._speculate and not any(run.output.recorded for run in runs)
        if timed and all(piece.count == 1 and piece.last for piece in plan.pieces):
            guessing = any(piece.drafts for piece in plan.pieces)
            self._cost.observe((time.perf_counter() - started) / len(plan.pieces), guessing=guessing)
        return deltas

    def check(self) -> None:
        """Verify that blocks, queues and requests add up. Raises BlockError when they do not."""
        self._scheduler.check()
        known = set(self._scheduler.sequences())
        if known != set(self._choices) or known != {c.sequence for many in self._requests.values() for c in many}:
            raise BlockError(f"{len(known)} sequences are scheduled, {len(self._choices)} are being answered")
        pool = self._scheduler.pool
        if not known and pool.num_free != pool.num_blocks:
            raise BlockError(f"idle with {pool.num_blocks - pool.num_free} cache blocks held")

    def forget_prefixes(self) -> None:
        """Drop the prefix cache: with other weights it is wrong. Requests under way must have ended.

        Raises:
            RequestError: requests are being answered.
        """
        if self._requests:
            raise RequestError(f"{len(self._requests)} requests are being answered; let them end, or cancel them",
                               param="request_id")  # fmt: skip
        self._scheduler.pool.forget_all()

    def _run(self, pieces: list[Piece]) -> tuple[list[_Run], list[tuple[Choice, str]]]:
        """All pieces in one call, but those that replay choices of experts in a call of their own each.

        Also returns whose choices of experts the executor refused, and why: their own requests alone end.
        """
        alone = [piece for piece in pieces if self._choices[piece.sequence].request.routing is not None]
        groups = [[piece] for piece in alone]
        if len(alone) < len(pieces):
            groups.append([piece for piece in pieces if piece not in alone] if alone else pieces)
        runs: list[_Run] = []
        refused: list[tuple[Choice, str]] = []
        for group in groups:
            routing = self._choices[group[0].sequence].request.routing
            if routing is not None:
                start, end = group[0].start, group[0].start + group[0].count
                routing = tuple(layer[start:end] for layer in routing)
            step = self._batches.build(group, routing)
            try:
                output = self.executor.run(step.batch, self.cache.caches)
            except ConfigError as error:
                if routing is None:
                    raise
                refused.append((self._choices[group[0].sequence], str(error)))
                continue
            runs.append(_Run(group, step.rows, output))
        return runs, refused

    def _finish(self, run: _Run, deltas: list[Delta]) -> None:
        """Draw tokens, then tell and advance piece by piece."""
        self._counters.route(run.output.routing)
        members: list[list[Choice]] = []
        draws: list[Draw] = []
        at: list[int] = []
        for piece, rows in zip(run.pieces, run.rows, strict=True):
            choice = self._choices[piece.sequence]
            self._collect(choice, piece, rows, run.output)
            group = [choice]
            if piece.last and piece.sequence.followers:
                group += [self._choices[follower] for follower in self._scheduler.fork(piece.sequence)]
                for follower in group[1:]:
                    follower.inherit(choice)
            members.append(group)
            if piece.last and choice.request.params.max_tokens != 0:
                first = rows.first + rows.count - rows.samples
                for member in group:
                    for ahead in range(rows.samples):
                        draws.append(member.draw(ahead))
                        at.append(first + ahead)
        drawn = self._sample(run.output.logits, at, draws)
        place = 0
        for piece, rows, group in zip(run.pieces, run.rows, members, strict=True):
            if not piece.last:
                self._scheduler.advance(piece, [])
                continue
            for member in group:
                count = 0 if member.request.params.max_tokens == 0 else rows.samples
                self._advance(member, piece, drawn[place : place + count], deltas)
                place += count

    def _sample(self, logits_RV: torch.Tensor, at: list[int], draws: list[Draw]) -> list[Drawn]:
        if not draws:
            return []
        try:
            return sample(logits_RV, draws, at=at, sampler=self.executor.sampler)
        except _FAILS_TO_DRAW as error:
            return [Drawn(0, f"no token could be drawn: {error}")] * len(draws)

    def _advance(self, choice: Choice, piece: Piece, drawn: list[Drawn], deltas: list[Delta]) -> None:
        """One choice after its newest token was computed: right drafts and one more token, or its end."""
        sequence = choice.sequence
        right = 0
        while right < len(piece.drafts) and drawn[right].error is None and drawn[right].token_id == piece.drafts[right]:
            right += 1
        drawn = drawn[: right + 1]
        error = choice.fault or next((draw.error for draw in drawn if draw.error is not None), None)
        if error is not None:
            self._fail(choice, error, deltas)
            return
        if drawn:
            delta, tokens = choice.take(drawn, choice.num_generated)
        else:
            delta, tokens = choice.delta("", [], reason="length"), []
        if choice.fault is not None:
            self._fail(choice, choice.fault, deltas)
            return
        deltas.append(delta)
        self._counters.generated_tokens += len(tokens)
        if sequence is piece.sequence:
            self._counters.cached_tokens += sequence.num_cached if choice.num_generated == 0 else 0
            self._scheduler.advance(piece, tokens)
        else:
            sequence.tokens.extend(tokens)
        if delta.finish_reason is not None:
            self._end(choice, delta.finish_reason)
        elif choice.guesser is not None:
            self._counters.drafted_tokens += len(piece.drafts)
            self._counters.accepted_tokens += right
            choice.guesser.observe(len(piece.drafts), right)
            sequence.drafts = choice.guesser.guess(sequence.tokens)

    def _fail(self, choice: Choice, error: str, deltas: list[Delta]) -> None:
        """End one choice with an error; what it left in blocks that only it holds is wiped and forgotten."""
        blocks = choice.sequence.held
        pool = self._scheduler.pool
        self.cache.clear([block for block in blocks if not pool.shared(block)])
        pool.forget(blocks)
        self._scheduler.distrust(choice.sequence)
        deltas.append(choice.delta("", [], reason="error", error=error))
        self._end(choice, "error")

    def _end(self, choice: Choice, reason: str) -> None:
        """Take a choice out of every book."""
        self._scheduler.finish(choice.sequence)
        del self._choices[choice.sequence]
        choices = self._requests[choice.request.request_id]
        choices.remove(choice)
        if not choices:
            del self._requests[choice.request.request_id]
        self._counters.finished[reason] += 1

    def _collect(self, choice: Choice, piece: Piece, rows: Rows, output: Output) -> None:
        """Keep what the request wants of these rows: log-probabilities of its prompt, logits, hidden, routing."""
        if piece.sequence.rows_from is None:
            return
        request = choice.request
        keep = slice(rows.first, rows.first + rows.count)
        if request.collect == "logits":
            choice.rows.append(output.logits[keep].cpu())
        elif request.collect == "hidden":
            choice.rows.append(output.hidden[keep].cpu())
        elif request.collect == "routing":
            skip = rows.position - piece.start
            span = slice(rows.token + skip, rows.token + piece.count)
            layers = () if output.routing is None else output.routing.by_layer()
            choice.routing.append(tuple((experts[span], weights[span]) for experts, weights in layers))
        if choice.prompt_logprobs is not None and request.params.prompt_logprobs is not None:
            targets = piece.sequence.tokens[
                rows.position + 1 : min(rows.position + rows.count + 1, piece.sequence.num_prompt)
            ]
            if targets:
                wanted = output.logits[rows.first : rows.first + len(targets)]
                try:
                    found = logprobs(wanted, targets, request.params.prompt_logprobs, self.executor.sampler)
                except _FAILS_TO_DRAW as error:
                    choice.fault = f"the prompt's log-probabilities could not be computed: {error}"
                    return
                if found is None:
                    choice.fault = "the model's logits are not finite for this request's prompt"
                    return
                choice.prompt_logprobs += found
