"""What all handlers share: the model once it is there, its tokens, its grammars, the bridge to its engine."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from trivium.base.errors import TriviumError
from trivium.inference import Request
from trivium.serve.bridge import Bridge, Job
from trivium.serve.errors import ApiError, invalid
from trivium.serve.exchange import Exchange
from trivium.serve.grammar import Grammar, GrammarConstraint
from trivium.serve.limits import Limits
from trivium.serve.metrics import Metrics
from trivium.serve.sampling import check_characters
from trivium.serve.served import Served, Tokenizer
from trivium.serve.tools import Dialect, dialect_of

# A text of so many characters is read in less time than it takes to hand it to another thread and back.
_INLINE_CHARS = 2048
T = TypeVar("T")


class Service:
    """The server's state. Everything but the work handed to its two threads happens on the event loop."""

    def __init__(self, limits: Limits, name: str) -> None:
        """``name`` is the model's, known before it is loaded."""
        self.limits = limits
        self.name = name
        self.metrics = Metrics()
        self.created = int(time.time())
        self.fingerprint = "trivium"
        self.served: Served | None = None
        self.dialect: Dialect | None = None
        self.control_ids: frozenset[int] = frozenset()
        self._bridge: Bridge | None = None
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="text")
        self._serial = itertools.count()
        self._bytes: dict[int, bytes] = {}
        self._keys: Counter[int] = Counter()

    def start(self, served: Served, loop: asyncio.AbstractEventLoop) -> None:
        """The model is there: answer from now on."""
        self.dialect = dialect_of(served.template, dict(served.special or {}))
        self.control_ids = frozenset((served.special or {}).values())
        self._bridge = Bridge(served.engine, slots=served.slots, limits=self.limits, metrics=self.metrics, loop=loop)
        self.served = served

    def close(self) -> None:
        """Let the threads go."""
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self.served is not None and self.served.grammars is not None:
            self.served.grammars.close()

    @property
    def bridge(self) -> Bridge:
        """The way to the engine. Raises ApiError 503 while the model is loading."""
        if self._bridge is None:
            message = f"the model {self.name} is still loading"
            raise ApiError(503, "model_loading", message, headers={"Retry-After": "2"})
        return self._bridge

    @property
    def loaded(self) -> bool:
        """Whether the model is there."""
        return self._bridge is not None

    def ready(self) -> Served:
        """The model. Raises ApiError 503 while it is loading, when the engine has failed, and when stopping."""
        bridge = self.bridge
        if bridge.failed is not None:
            raise bridge.failed
        bridge.refuse_if_stopping()
        if self.served is None:
            raise ApiError(503, "model_loading", f"the model {self.name} is still loading")
        return self.served

    @property
    def able(self) -> bool:
        """Whether requests are taken: the model is loaded, its engine runs, and the server is not stopping."""
        served, bridge = self.served, self._bridge
        if served is None or bridge is None:
            return False
        return served.engine.alive and bridge.failed is None and not bridge.draining

    @contextmanager
    def under_way(self, key: int) -> Iterator[None]:
        """Count a request of ``key`` (−1: no keys are asked for) until the block is left, however it is left.

        Raises ApiError 429 where the key has as many as it may have.
        """
        if key < 0:
            yield
            return
        if self._keys[key] >= self.limits.per_key:
            message = f"this key has {self._keys[key]} requests under way; at most {self.limits.per_key} are allowed"
            raise ApiError(429, "concurrency_limit_exceeded", message, headers={"Retry-After": "1"})
        self._keys[key] += 1
        try:
            yield
        finally:
            self._keys[key] -= 1

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any name but the served one's."""
        if name != self.name:
            given = "no model is named" if name is None else f"the model {name[:100]!r} does not exist"
            raise ApiError(404, "model_not_found", f"{given}; this server has {self.name!r}", param="model")

    def note(self, exchange: Exchange, values: Mapping[str, Any]) -> None:
        """What the access log tells of a request: settings of size and the user's own label, never content."""
        for name in ("stream", "n", "max_tokens", "max_completion_tokens", "user", "safety_identifier"):
            if values.get(name) is not None:
                exchange.noted[name] = values[name]

    def engine_id(self, exchange: Exchange) -> str:
        """A name for the engine that no other request has, whatever clients call theirs."""
        return f"{exchange.request_id}.{next(self._serial)}"

    def token_bytes(self, token_id: int) -> bytes:
        """A token's bytes; what was asked once is kept."""
        served = self.ready() if self.served is None else self.served
        found = self._bytes.get(token_id)
        if found is None:
            if served.token_bytes is not None:
                found = served.token_bytes(token_id)
            else:
                found = b"" if served.tokenizer is None else served.tokenizer.decode([token_id]).encode()
            self._bytes[token_id] = found
        return found

    async def compile(self, grammar: Grammar) -> GrammarConstraint:
        """The constraint. Raises ApiError 400 where it is wrong, or the model has no tokenizer to apply it to."""
        grammars = self.ready().grammars
        if grammars is None:
            raise ApiError(400, "unsupported_parameter", "the model has no tokenizer for grammars", param=grammar.param)
        return await grammars.compile(grammar)

    async def prompt_tokens(self, prompts: Sequence[str | list[int]], param: str = "prompt") -> list[list[int]]:
        """Token ids of texts; lists of token ids pass, within the vocabulary. Raises ApiError 400."""
        served = self.ready()
        found: list[list[int]] = []
        for index, prompt in enumerate(prompts):
            name = param if len(prompts) == 1 else f"{param}[{index}]"
            if isinstance(prompt, str):
                found.append(await self.encode(prompt, param=name))
            else:
                check_vocabulary(prompt, served, name)
                found.append(prompt)
        return found

    async def encode(self, text: str, *, param: str, special: bool = True) -> list[int]:
        """Token ids of a text, read off the event loop where it is long. Raises ApiError 400."""
        served = self.ready()
        tokenizer = self.tokenizer(param)
        check_characters(len(text), served, param)
        tokens = await self.off_loop(len(text), lambda: tokenizer.encode(text, special=special), param)
        if not tokens:
            raise invalid(param, f"{param} has no tokens")
        return tokens

    async def chat_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool | None,
        onward: bool,
    ) -> list[int]:
        """Token ids of a chat by the model's template; ``onward``: up to the end of the last message, which goes on.

        ``prompt``: with the beginning of an answer; None: unless ``onward``. Raises ApiError 400 where there is no
        template, or it refuses.
        """
        served = self.ready()
        if onward and prompt:
            message = "add_generation_prompt begins an answer and continue_final_message goes on with one: choose"
            raise invalid("add_generation_prompt", message)
        if onward and (messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]):
            raise invalid("messages", "continue_final_message needs a last message of the assistant's, without calls")
        begin = not onward if prompt is None else prompt
        tokenizer = self.tokenizer("messages")
        if served.template is None:
            message = "the model has no chat template; use /v1/completions"
            raise ApiError(400, "unsupported_parameter", message, param="messages")
        size = sum(len(message["content"]) for message in messages)
        check_characters(size, served, "messages")

        def render() -> list[int]:
            return tokenizer.chat(messages, tools=tools, prompt=begin, continue_final_message=onward)

        return await self.off_loop(None, render, "messages")

    def tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises ApiError 400 where the model has none."""
        tokenizer = self.ready().tokenizer
        if tokenizer is None:
            message = "the model has no tokenizer; send token ids"
            raise ApiError(400, "unsupported_parameter", message, param=param)
        return tokenizer

    async def off_loop(self, size: int | None, call: Callable[[], T], param: str) -> T:
        """``call`` here where its text is short, else (and for None) on a thread. What it refuses is a 400."""
        try:
            if size is not None and size <= _INLINE_CHARS:
                return call()
            return await asyncio.get_running_loop().run_in_executor(self._readers, call)
        except ApiError:
            raise
        except TriviumError as error:
            raise invalid(param, f"{param} cannot be used: {error}") from None

    @contextmanager
    def generating(
        self, exchange: Exchange, requests: Sequence[Request], constraint: GrammarConstraint | None = None
    ) -> Iterator[Job]:
        """Start ``requests`` as one job; at the end its tokens are noted. A grammar's own failure is a 400."""
        job = self.bridge.start(requests, arrived_s=exchange.started_s)
        prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.prompt_size.observe(prompt_tokens)
        try:
            yield job
        except ApiError as error:
            if error.code == "generation_failed" and constraint is not None and constraint.failures:
                message = f"{constraint.param} cannot be followed to its end: {constraint.failures[0]}"
                raise invalid(constraint.param, message, "invalid_grammar") from None
            raise
        finally:
            if job.cancelled:
                self.metrics.cancelled.inc()
            self.metrics.cached_tokens.inc(job.cached)
            self.metrics.answer_size.observe(job.generated)
            exchange.noted |= {"prompt_tokens": prompt_tokens, "generated_tokens": job.generated}
            exchange.noted["cancelled"] = job.cancelled


def check_vocabulary(token_ids: Sequence[int], served: Served, param: str) -> None:
    """Raises ApiError 400 for an id that the model does not have."""
    if token_ids and max(token_ids) >= served.vocabulary:
        place = next(index for index, token in enumerate(token_ids) if token >= served.vocabulary)
        name = f"{param}[{place}]"
        raise invalid(name, f"{name}={token_ids[place]}: the vocabulary has {served.vocabulary} tokens")
