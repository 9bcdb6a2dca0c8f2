"""An engine without a model, with the interface of the real one: known tokens at a chosen speed, death on demand."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from trivium.inference import ContextLengthError, Delta, Request, TokenLogprobs
from trivium.inference.request import Collected, check_tokens
from trivium.inference.stats import EngineStats
from trivium.inference.stream import Detokenizer, StopFinder
from trivium.serve.grammar import Grammars
from trivium.serve.served import Served

END, USER, ASSISTANT, SYSTEM, TOOL = 256, 257, 258, 259, 260
CONTROL = ("<|im_end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>")
REPLY = "Fish swim, birds fly; élan and 🐟 too. "
TEMPLATE = "{{ messages }} {{ tools }} <tool_call>"
CONTEXT = 4096
BLOCKS = 1000


class ByteTokenizer:
    """A token per byte, and five control tokens."""

    def __init__(self) -> None:
        self.gate: threading.Event | None = None  # chats, long texts and long lists of ids are read once it is set
        self.held: list[int] = []  # the sizes of those that came to it

    def _pass(self, size: int) -> None:
        if self.gate is not None and size > 100:
            self.held.append(size)
            self.gate.wait(60)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        self._pass(len(text))
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        self._pass(len(token_ids))
        return bytes(token for token in token_ids if token < 256).decode("utf-8", errors="replace")

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool,
        continue_final_message: bool,
    ) -> list[int]:
        self._pass(1000)
        ids = {"user": USER, "assistant": ASSISTANT, "system": SYSTEM, "tool": TOOL}
        tokens = [SYSTEM, *json.dumps(tools).encode(), END] if tools else []
        for message in messages:
            tokens += [ids[message["role"]], *message["content"].encode(), END]
        if continue_final_message:
            return tokens[:-1]
        return [*tokens, ASSISTANT] if prompt else tokens


class _Choice:
    def __init__(self, request: Request, index: int, tokenizer: ByteTokenizer, reply: Sequence[int]) -> None:
        self.request, self.index = request, index
        self.detokenizer = Detokenizer(tokenizer, list(request.prompt_token_ids)[-4:])
        self.stops = StopFinder(request.params.stop)
        self.constraint = None if request.constraint is None else request.constraint.fork()
        self.random = random.Random(f"{request.params.seed}-{index}")
        self.count = 0
        self.reply = reply
        self.follow = False
        self.head = tokenizer.decode(request.prompt_token_ids) if request.params.echo else ""

    def token(self) -> int:
        if self.constraint is not None:
            allowed = self.constraint.allowed().nonzero().flatten().tolist()
            if not allowed:
                return -1
            if self.follow:
                if self.count < len(self.reply) and self.reply[self.count] in allowed:
                    return self.reply[self.count]
                return END if END in allowed else min(allowed)
            if END in allowed:
                return END
            return self.random.choice(allowed)
        if self.request.params.seed is not None and self.request.params.temperature > 0:
            return self.random.randrange(97, 123)
        return self.reply[(sum(self.request.prompt_token_ids) + self.count) % len(self.reply)]


class StubEngine:
    """Steps of ``step_s``; ``slots`` choices at once, the rest waits. Blocks: one per running choice."""

    def __init__(self, *, step_s: float = 0.0, slots: int = 64, reply: str = REPLY, spin: bool = False) -> None:
        self.step_s, self.slots = step_s, slots
        self.reply: Sequence[int] = reply.encode()
        self.tokenizer = ByteTokenizer()
        self.last_step_s = time.monotonic()
        self.prefill_s = 0.0
        self.follow = False
        self.submitted = 0
        self.cancelled: list[str] = []
        self.cancels: dict[str, int] = {}  # and the step at which each came
        self.steps_to_abort: list[int] = []
        self._steps = 0
        self._wake = threading.Condition()
        self._queue: list[tuple[_Choice, Callable[[Delta], None]]] = []
        self._running: list[tuple[_Choice, Callable[[Delta], None]]] = []
        self._closed = self._dead = False
        self._wedged = threading.Event()
        self._generated = 0
        self._thread = threading.Thread(target=self._main, name="stub-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._dead

    @property
    def stats(self) -> EngineStats:
        with self._wake:
            running, waiting = len(self._running), len(self._queue)
        return EngineStats(
            running=running, waiting=waiting, blocks_total=BLOCKS, blocks_free=BLOCKS - running, blocks_remembered=0,
            block_size=16, steps=0, prompt_tokens=0, cached_tokens=0, generated_tokens=self._generated, preemptions=0,
            drafted_tokens=0, accepted_tokens=0, finished={}, tokens_per_expert=((3, 5), (8, 0)),
        )  # fmt: skip

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        check_tokens(request.prompt_token_ids, 261)
        if len(request.prompt_token_ids) > CONTEXT:
            raise ContextLengthError("too long", given=len(request.prompt_token_ids), limit=CONTEXT)
        with self._wake:
            self.submitted += 1
            for index in range(request.params.n):
                choice = _Choice(request, index, self.tokenizer, self.reply)
                choice.follow = self.follow
                self._queue.append((choice, on_delta))
            self._wake.notify()

    def cancel(self, request_id: str) -> None:
        with self._wake:
            self.cancelled.append(request_id)
            self.cancels[request_id] = self._steps
            self._wake.notify()

    def close(self, drain_s: float = 0) -> None:
        self._closed = True
        with self._wake:
            self._wake.notify()
        self._wedged.set()
        self._thread.join(5)

    def die(self) -> None:
        self._dead = True
        with self._wake:
            self._wake.notify()

    def wedge(self) -> None:
        self._wedge = True

    _wedge = False

    def _main(self) -> None:
        while not self._closed and not self._dead:
            if self._wedge:
                self._wedged.wait()
            started = time.monotonic()
            for on_delta, delta in self._step():
                on_delta(delta)
            self.last_step_s = time.monotonic()
            with self._wake:
                if not (self._running or self._queue or self.cancelled):
                    self._wake.wait(0.1)
                    continue
            left = self.step_s - (time.monotonic() - started)
            if left > 0:
                time.sleep(left)

    def _step(self) -> list[tuple[Callable[[Delta], None], Delta]]:
        out = []
        with self._wake:
            self._steps += 1
            for request_id in self.cancelled:
                for place in (self._queue, self._running):
                    for entry in [entry for entry in place if entry[0].request.request_id == request_id]:
                        place.remove(entry)
                        self.steps_to_abort.append(self._steps - self.cancels[request_id])
                        out.append((entry[1], self._delta(entry[0], "", [], "abort")))
            self.cancelled.clear()
            while self._queue and len(self._running) < self.slots:
                self._running.append(self._queue.pop(0))
            running = list(self._running)
        for choice, on_delta in running:
            if self.prefill_s and choice.count == 0:
                time.sleep(self.prefill_s)
            delta = self._advance(choice)
            if delta.finish_reason is not None:
                with self._wake:
                    self._running.remove((choice, on_delta))
            out.append((on_delta, delta))
        return out

    def _advance(self, choice: _Choice) -> Delta:
        params = choice.request.params
        if params.max_tokens == 0:
            return self._delta(choice, "", [], "length")
        token = choice.token()
        if token < 0:
            return self._delta(choice, "", [], "error", "no token is allowed here")
        choice.count += 1
        self._generated += 1
        if (token == END and not params.ignore_eos) or token in params.stop_token_ids:
            return self._delta(choice, choice.detokenizer.flush(), [token], "stop")
        if choice.constraint is not None:
            choice.constraint.accept(token)
        text, stop = choice.stops.push(choice.detokenizer.push([token]))
        reason = None
        if stop is not None or (choice.constraint is not None and choice.constraint.finished()):
            reason = "stop"
        elif choice.count >= (params.max_tokens or CONTEXT - len(choice.request.prompt_token_ids)):
            reason = "length"
        if reason is not None and stop is None:
            text += choice.stops.push(choice.detokenizer.flush())[0] + choice.stops.flush()
        return self._delta(choice, text, [token], reason)

    def _delta(self, choice: _Choice, text: str, tokens: list[int], reason: Any, error: str | None = None) -> Delta:
        request, params = choice.request, choice.request.params
        head, choice.head = choice.head, ""
        wanted = params.logprobs
        first = choice.count <= 1
        prompt_logprobs = None
        if params.prompt_logprobs is not None and first:
            rest = [TokenLogprobs(token_id=t, logprob=-1.0) for t in request.prompt_token_ids[1:]]
            prompt_logprobs = [None, *rest]
        hidden = None
        if request.collect == "hidden":
            hidden = Collected(hidden=torch.tensor([[float(t), 1.0] for t in request.prompt_token_ids]))
        return Delta(
            request_id=request.request_id,
            choice=choice.index,
            text=head + text,
            token_ids=tokens,
            logprobs=None if wanted is None else [_logprobs(token, wanted) for token in tokens],
            finish_reason=reason,
            error=error,
            prompt_tokens=len(request.prompt_token_ids),
            prompt_logprobs=prompt_logprobs,
            collected=hidden,
        )


def _logprobs(token: int, wanted: int) -> TokenLogprobs:
    top = tuple(((token + k) % 256, -0.5 - k) for k in range(wanted))
    return TokenLogprobs(token_id=token, logprob=-0.5, top=top)


def served(engine: StubEngine, *, name: str = "stub", grammar_s: float = 20.0) -> Served:
    """The stub as the server takes it; grammars may take long, for the machine may be slow."""
    control = {text: 256 + index for index, text in enumerate(CONTROL)}
    grammars = Grammars(
        [bytes([byte]) for byte in range(256)] + [b""] * 5,
        control=control,
        end_ids=[END],
        width=261,
        limit_s=grammar_s,
    )
    return Served(
        name=name,
        engine=engine,
        tokenizer=engine.tokenizer,
        max_positions=CONTEXT,
        vocabulary=261,
        slots=engine.slots,
        longest_token=12,
        template=TEMPLATE,
        special=control,
        token_bytes=lambda token: bytes([token]) if token < 256 else CONTROL[token - 256].encode(),
        grammars=grammars,
    )
