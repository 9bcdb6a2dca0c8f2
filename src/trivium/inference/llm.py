"""A model in the hand: load it, ask it, read what it computes, give it new weights.

DeepSpeed Inference section 3.1. T tokens, V vocabulary, N prompts.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from trivium.base import log
from trivium.base.errors import ConfigError, NonFiniteError, SetupError, TriviumError
from trivium.inference.arguments import Prompt, check_options, device_of, experts_of, many, memory_bytes, params_of
from trivium.inference.cache import CacheDtype, PagedCache, check_dtype
from trivium.inference.engine import Engine, EngineConfig
from trivium.inference.module import load_module
from trivium.inference.outputs import Answer, Output
from trivium.inference.packing import Quantize
from trivium.inference.replace import Weights, replace_weights
from trivium.inference.request import Collect, Collected, Delta, Request, RequestError, SamplingParams
from trivium.inference.sizing import BLOCK_SIZE, cache_blocks, program_bytes
from trivium.inference.stats import EngineStats
from trivium.inference.thread import EngineThread
from trivium.inference.tokenizer import Tokenizer
from trivium.inference.weights import DType, load
from trivium.kernels.registry import executor, layout, lost
from trivium.memory.meter import Meter

Pooling = Literal["mean", "last"]
_WAIT_S = 0.1


class LLM:
    """A loaded model with an engine of its own.

    ``path_or_model``: a Hugging Face folder, a Trivium checkpoint or run, a `trivium.models.Decoder`, or a transformers
    model. ``memory`` (bytes, or text such as "8GiB") bounds weights and cache together; None gives the cache a quarter
    of what is free. ``max_positions`` bounds the context. ``cache_dtype`` "auto" is float32 for float32 weights, else
    bfloat16. ``place`` and ``mesh`` are for models over several devices, which this version does not have.

    Several threads may call `generate` and `stream` at once; they share steps. `serve` moves the engine to a thread of
    its own.

    Example:
        >>> llm = LLM("checkpoints/small")
        >>> llm.generate("Once upon", SamplingParams(max_tokens=16, temperature=0))[0].text
    """

    def __init__(
        self,
        path_or_model: str | Path | torch.nn.Module,
        dtype: DType = "auto",
        quantize: Quantize = None,
        device: str = "auto",
        memory: int | str | None = None,
        place: None = None,
        mesh: None = None,
        *,
        backend: str = "auto",
        threads: int | None = None,
        max_positions: int | None = None,
        max_sequences: int = 64,
        step_tokens: int = 256,
        cache_dtype: Literal["auto"] | CacheDtype = "auto",
        block_size: int = BLOCK_SIZE,
        prefix_cache: bool = True,
        speculate: bool | None = False,
    ) -> None:
        if place is not None or mesh is not None:
            raise ConfigError("place and mesh: this version runs a model whole on one device; leave them out")
        check_options(speculate, threads=threads, max_positions=max_positions, max_sequences=max_sequences,
                      step_tokens=step_tokens, block_size=block_size)  # fmt: skip
        limit = memory_bytes(memory)
        config = EngineConfig(
            max_sequences=max_sequences, step_tokens=step_tokens, prefix_cache=prefix_cache, speculate=speculate
        )
        self.device = device_of(device)
        self._backend, self._threads = backend, threads
        form = layout(backend) if self.device == "cpu" else "plain"
        if isinstance(path_or_model, torch.nn.Module):
            self.model = load_module(
                path_or_model, dtype=dtype, quantize=quantize, layout=form, max_positions=max_positions
            )
        else:
            self.model = load(path_or_model, dtype=dtype, quantize=quantize, layout=form, max_positions=max_positions)
        self.tokenizer = None if self.model.tokenizer is None else Tokenizer.load(self.model.tokenizer)
        self.meter = Meter()
        self.weight_bytes = program_bytes(self.model.program)
        self.meter.add("weights", self.weight_bytes, "host" if self.device == "cpu" else "device")
        self.engine = self._build(config, limit, cache_dtype, block_size)
        if backend == "auto" and self.device == "cpu" and (told := lost()):
            log.get().warning("%s", told)
        self._lock = threading.RLock()
        self._inboxes: dict[str, queue.SimpleQueue[Delta]] = {}
        self._numbers = itertools.count()
        self._thread: EngineThread | None = None

    @property
    def name(self) -> str:
        """The folder's or the module's name."""
        return self.model.name

    @property
    def max_positions(self) -> int:
        """Tokens of the longest prompt and answer together."""
        return self.engine.max_positions

    @property
    def vocabulary(self) -> int:
        """Width of the logits."""
        return self.model.program.logits.width

    @property
    def stats(self) -> EngineStats:
        """The engine's counts."""
        return self.engine.stats

    def sampling(self, **changes: Any) -> SamplingParams:
        """What the model's folder recommends (the likeliest token where it says nothing), with ``changes``."""
        return SamplingParams(**{**self.model.generation.recommended(), **changes})

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, with what the model expects at its beginning. Text needs a tokenizer."""
        if not isinstance(prompt, (str, Sequence)) or isinstance(prompt, (bytes, bytearray)):
            raise RequestError(f"a prompt is a {type(prompt).__name__}: expected text or token ids", param="prompt")
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: give token ids instead of text", param="prompt")
        return self.tokenizer.encode(prompt)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a chat by the model's template, up to where the assistant begins.

        Raises:
            RequestError: the model has no tokenizer; ConfigError, DataError: no template, or it refuses the messages.
        """
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer: give token ids instead of messages", param="messages")
        return self.tokenizer.chat(messages)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Output]:
        """Answer prompts, all at once; one `Output` each, in order. ``params``: for all, or one each.

        Raises:
            RequestError: a prompt or setting that cannot be served; nothing was computed.
        """
        tokens = [self.encode(prompt) for prompt in many(prompts)]
        settings = params_of(params, len(tokens), self.sampling)
        return self._answer([self._request(prompt, one) for prompt, one in zip(tokens, settings, strict=True)])

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer's deltas as they come. Closing the iterator ends the request."""
        return self._deltas([self._request(prompt, params_of(params, 1, self.sampling)[0])])

    def generate_each(self, asked: Iterable[tuple[Prompt, SamplingParams | None]]) -> Iterator[tuple[int, Output]]:
        """Answer any number of prompts, read as they are needed: (index, output) of each as it ends.

        A prompt that cannot be served ends with the finish reason "error", and the others go on.
        """
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        source = enumerate(asked)
        under_way: dict[str, tuple[int, Output]] = {}
        thread = self._thread
        try:
            while True:
                while len(under_way) < 2 * self.engine.config.max_sequences:
                    index, (prompt, params) = next(source, (-1, ("", None)))
                    if index < 0:
                        break
                    output = Output(prompt_token_ids=[], choices=[Answer()])
                    try:
                        request = self._request(prompt, params_of(params, 1, self.sampling)[0])
                        self._submit([request], inbox, thread)
                    except (TriviumError, UnicodeError) as error:
                        output.choices = [Answer(finish_reason="error", error=str(error))]
                        yield index, output
                        continue
                    output.prompt_token_ids = request.prompt_token_ids
                    output.choices = [Answer() for _ in range(request.params.n)]
                    under_way[request.request_id] = (index, output)
                if not under_way:
                    return
                delta = self._next(inbox, thread)
                index, output = under_way[delta.request_id]
                output.add(delta)
                if output.done:
                    del under_way[delta.request_id]
                    yield index, output
        finally:
            self._leave(list(under_way), thread)

    def logits(self, token_ids: Sequence[int], *, routing: tuple[torch.Tensor, ...] | None = None) -> torch.Tensor:
        """Logits [T, V] of all positions, fp32 on the CPU. ``routing``: choices of experts to replay, [T, K] each."""
        found = self._collect(token_ids, "logits", routing).logits
        return torch.empty(0, self.vocabulary) if found is None else found

    def routing(self, token_ids: Sequence[int]) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
        """Per MoE layer each token's experts (int32 [T, K]) and their weights (fp32 [T, K])."""
        return self._collect(token_ids, "routing").routing or ()

    def embed(self, prompts: Prompt | Sequence[Prompt], pooling: Pooling = "mean") -> torch.Tensor:
        """One vector per prompt [N, dim], fp32 on the CPU: the last norm's output, its mean or the last token's.

        Raises:
            NonFiniteError: a vector is not finite.
        """
        if pooling not in ("mean", "last"):
            raise ConfigError(f"pooling={pooling!r}: expected 'mean' or 'last'")
        outputs = self._answer([self._collecting(self.encode(prompt), "hidden") for prompt in many(prompts)])
        pooled: list[torch.Tensor] = []
        for output in outputs:
            rows = output.whole.hidden
            if rows is None or not bool(torch.isfinite(rows).all()):
                raise NonFiniteError(f"{self.name}: the hidden states of prompt {len(pooled)} are not finite")
            pooled.append(rows.mean(dim=0) if pooling == "mean" else rows[-1])
        return torch.stack(pooled) if pooled else torch.empty(0, self.model.program.hidden.width)

    def load_weights(self, weights: Weights) -> int:
        """Replace weights in place, by the names that the model was loaded with, and drop the prefix cache.

        Returns how many tensors were used. Weights that are not named stay as they are.

        Raises:
            RequestError: requests are being answered.
            CheckpointError: an unknown name, another shape, whole numbers for floats, or a part of a fused weight
                without the rest.
        """
        used = 0

        def swap(engine: Engine) -> None:
            nonlocal used
            engine.forget_prefixes()
            try:
                used = replace_weights(self.model, weights)
            finally:  # an error says what was replaced before it
                engine.executor.refresh()

        if self._thread is not None:
            self._thread.between_steps(swap)
        else:
            with self._lock:
                swap(self.engine)
        return used

    def serve(self) -> EngineThread:
        """Move the engine to a thread of its own, once; all methods go on working, through it."""
        with self._lock:
            if self._thread is None:
                if self._inboxes:
                    raise SetupError(f"{len(self._inboxes)} requests are being answered; let them end first")
                self._thread = EngineThread(self.engine)
            return self._thread

    def _build(self, config: EngineConfig, memory: int | None, cache_dtype: str, block_size: int) -> Engine:
        model, program, device = self.model, self.model.program, self.device
        plain = model.dtype == torch.float32 and model.quantize is None
        entries = check_dtype(("float32" if plain else "bfloat16") if cache_dtype == "auto" else cache_dtype)
        sized = partial(
            cache_blocks,
            program.caches,
            dtype=entries,
            weight_bytes=self.weight_bytes,
            memory_bytes=memory,
            max_sequences=config.max_sequences,
            max_positions=model.max_positions,
            step_tokens=config.step_tokens,
            device=device,
            block_size=block_size,
        )
        blocks = 0 if memory is None else sized()  # what does not fit is told before anything is copied to the device
        bound = executor(
            program, backend=self._backend, threads=self._threads, device=device, max_sequences=config.max_sequences
        )
        blocks = blocks or sized()  # of the memory that is free once the weights are on their device
        return Engine(
            bound,
            PagedCache(
                program.caches, num_blocks=blocks, block_size=block_size, dtype=entries, device=device, meter=self.meter
            ),
            vocabulary=program.logits.width,
            max_positions=model.max_positions,
            eos_ids=frozenset(model.generation.eos_token_ids),
            decoder=self.tokenizer,
            config=config,
            num_experts=experts_of(program),
        )

    def _next_id(self) -> str:
        return f"llm-{next(self._numbers)}"

    def _request(self, prompt: Prompt, params: SamplingParams) -> Request:
        return Request(request_id=self._next_id(), prompt_token_ids=self.encode(prompt), params=params)

    def _collecting(
        self, token_ids: Sequence[int], collect: Collect, routing: tuple[torch.Tensor, ...] | None = None
    ) -> Request:
        return Request(
            request_id=self._next_id(),
            prompt_token_ids=token_ids,
            params=SamplingParams(max_tokens=0),
            collect=collect,
            routing=routing,
        )

    def _collect(
        self, token_ids: Sequence[int], collect: Collect, routing: tuple[torch.Tensor, ...] | None = None
    ) -> Collected:
        (output,) = self._answer([self._collecting(list(token_ids), collect, routing)])
        return output.whole

    def _answer(self, requests: list[Request]) -> list[Output]:
        outputs = {
            request.request_id: Output(
                prompt_token_ids=request.prompt_token_ids, choices=[Answer() for _ in range(request.params.n)]
            )
            for request in requests
        }
        for delta in self._deltas(requests):
            outputs[delta.request_id].add(delta)
        return list(outputs.values())

    def _deltas(self, requests: list[Request]) -> Iterator[Delta]:
        """Submit ``requests`` now; an iterator over what comes of them, which ends them when it is closed."""
        inbox: queue.SimpleQueue[Delta] = queue.SimpleQueue()
        thread = self._thread
        self._submit(requests, inbox, thread)
        deltas = self._receive(inbox, {request.request_id: request.params.n for request in requests}, thread)
        next(deltas)  # into its try: a generator that was never begun does nothing when it is closed
        return deltas

    def _submit(self, requests: list[Request], inbox: queue.SimpleQueue[Delta], thread: EngineThread | None) -> None:
        """Hand in all of them, or none when one cannot be served."""
        for request in requests:
            self.engine.checked(request)
        if thread is not None:
            for request in requests:
                thread.submit(request, inbox.put)
        else:
            with self._lock:
                for request in requests:
                    self.engine.add(request)
                    self._inboxes[request.request_id] = inbox

    def _receive(
        self, inbox: queue.SimpleQueue[Delta], left: dict[str, int], thread: EngineThread | None
    ) -> Iterator[Delta]:
        try:
            yield Delta(request_id="", choice=0, text="", token_ids=[])
            while left:
                delta = self._next(inbox, thread)
                if delta.finish_reason is not None:
                    left[delta.request_id] -= 1
                    if not left[delta.request_id]:
                        del left[delta.request_id]
                yield delta
        finally:
            self._leave(list(left), thread)

    def _next(self, inbox: queue.SimpleQueue[Delta], thread: EngineThread | None) -> Delta:
        """The next delta, stepping the engine here where it has no thread."""
        while True:
            try:
                return inbox.get(block=thread is not None, timeout=_WAIT_S)
            except queue.Empty:
                if thread is None:
                    self._step()
                elif not thread.alive and inbox.empty():
                    raise TriviumError(f"the engine stopped: {thread.error}") from None

    def _step(self) -> None:
        """One step for all who wait; whoever comes first makes it."""
        with self._lock:
            for delta in self.engine.step():
                inbox = self._inboxes.get(delta.request_id)
                if inbox is not None:
                    inbox.put(delta)

    def _leave(self, left: list[str], thread: EngineThread | None) -> None:
        if thread is not None:
            for request_id in left:
                thread.cancel(request_id)
            return
        with self._lock:
            for request_id in left:
                self.engine.cancel(request_id)
            self._inboxes = {
                request_id: inbox for request_id, inbox in self._inboxes.items() if self.engine.knows(request_id)
            }
