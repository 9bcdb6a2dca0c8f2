"""``/v1/completions``: texts or token ids in, their continuations out, whole or as they come."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

from trivium.inference import Delta, Request, TokenLogprobs
from trivium.serve.bridge import Job
from trivium.serve.errors import invalid
from trivium.serve.exchange import Exchange, quoted
from trivium.serve.logprobs import completion_logprobs
from trivium.serve.sampling import check_context, grammar_of, sampling_params
from trivium.serve.schema import completion_fields
from trivium.serve.service import Service


@dataclass(kw_only=True)
class _Settings:
    """What shapes the answer to one request."""

    id: str
    created: int
    model: str
    prompts: list[list[int]]
    n: int
    logprobs: int | None
    echo: bool
    usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Over all prompts."""
        return sum(map(len, self.prompts))


async def complete(service: Service, exchange: Exchange) -> None:
    """Answer one completion request."""
    served = service.ready()
    values = await exchange.fields(completion_fields(service.limits))
    service.note(exchange, values)
    service.check_model(values["model"])
    service.bridge.refuse_if_full(values["n"] * len(values["prompt"]))
    if values["stream_options"] is not None and not values["stream"]:
        raise invalid("stream_options", "stream_options needs stream")
    if values["max_tokens"] == 0 and not values["echo"]:
        raise invalid("max_tokens", "max_tokens=0 asks for nothing, unless echo is true")
    grammar = grammar_of(values)
    constraint = None if grammar is None else await service.compile(grammar)
    prompts = await service.prompt_tokens(values["prompt"])
    for index, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        check_context(len(prompt), served, param, room=min(1, values["max_tokens"]))
    logprobs = None if values["logprobs"] is None else min(values["logprobs"], served.vocabulary)
    params = sampling_params(
        values,
        max_tokens=values["max_tokens"],
        logprobs=logprobs,
        echo=values["echo"],
        prompt_logprobs=logprobs if values["echo"] else None,
    )
    settings = _Settings(
        id=f"cmpl-{exchange.request_id}",
        created=int(time.time()),
        model=served.name,
        prompts=prompts,
        n=params.n,
        logprobs=logprobs,
        echo=params.echo,
        usage=bool((values["stream_options"] or {}).get("include_usage")),
    )
    base = service.engine_id(exchange)
    requests = [
        Request(request_id=f"{base}-{index}", prompt_token_ids=prompt, params=params, constraint=constraint)
        for index, prompt in enumerate(prompts)
    ]
    with service.generating(exchange, requests, constraint) as job, exchange.watched(job):
        await (_stream if values["stream"] else _whole)(service, exchange, job, settings)


class _Choice:
    """What one choice has come to; ``offset`` is the length of the text whose tokens have been laid out."""

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.text: list[str] = []
        self.token_ids: list[int] = []
        self.entries: list[TokenLogprobs | None] = []
        self.offset = 0
        self.finish: str | None = None

    def add(self, delta: Delta) -> None:
        """Keep a delta."""
        self.text.append(delta.text)
        if delta.prompt_logprobs is not None:
            self.token_ids += self.prompt
            self.entries += delta.prompt_logprobs
        if delta.logprobs:
            self.token_ids += delta.token_ids[: len(delta.logprobs)]
            self.entries += delta.logprobs
        self.finish = delta.finish_reason or self.finish

    def logprobs(self, service: Service, top: int | None) -> dict[str, Any] | None:
        """The lists for what was kept since the last time."""
        if top is None:
            return None
        lists = completion_logprobs(self.entries, self.token_ids, service.token_bytes, top, self.offset)
        self.offset += sum(map(len, lists["tokens"]))
        self.token_ids, self.entries = [], []
        return lists


def _choices(settings: _Settings) -> list[_Choice]:
    return [_Choice(prompt) for prompt in settings.prompts for _ in range(settings.n)]


async def _whole(service: Service, exchange: Exchange, job: Job, settings: _Settings) -> None:
    choices = _choices(settings)
    async for delta in job.unstreamed():
        choices[job.order[delta.request_id] * settings.n + delta.choice].add(delta)
    if job.cancelled:
        return
    for choice in choices:
        job.told(choice.finish)
    answers = [
        {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": choice.logprobs(service, settings.logprobs),
            "finish_reason": choice.finish,
        }
        for index, choice in enumerate(choices)
    ]
    await exchange.reply_json(
        _head(service, settings) | {"choices": answers, "usage": job.usage(settings.prompt_tokens)}
    )


async def _stream(service: Service, exchange: Exchange, job: Job, settings: _Settings) -> None:
    choices = _choices(settings)
    head = b"data: " + json.dumps(_head(service, settings), ensure_ascii=False).encode()[:-1]
    tail = (b', "usage": null}' if settings.usage else b"}") + b"\n\n"
    while batch := await job.take():
        events: list[bytes] = []
        for delta in batch:
            index = job.order[delta.request_id] * settings.n + delta.choice
            choice = choices[index]
            choice.add(delta)
            choice.text.clear()
            job.told(delta.finish_reason)
            text = quoted(delta.text)
            if not delta.text and not choice.entries and delta.finish_reason is None:
                continue
            lists = choice.logprobs(service, settings.logprobs)
            logprobs = "null" if lists is None else json.dumps(lists, ensure_ascii=False)
            finish = "null" if delta.finish_reason is None else f'"{delta.finish_reason}"'
            body = f'"index": {index}, "text": {text}, "logprobs": {logprobs}, "finish_reason": {finish}'
            events.append(head + f', "choices": [{{{body}}}]'.encode() + tail)
        if not exchange.began:
            await exchange.start_events()
        if events:
            await exchange.chunk(b"".join(events))
    if job.cancelled:
        return
    if settings.usage:
        usage = json.dumps(job.usage(settings.prompt_tokens)).encode()
        await exchange.chunk(head + b', "choices": [], "usage": ' + usage + b"}\n\n")
    await exchange.end_events()


def _head(service: Service, settings: _Settings) -> dict[str, Any]:
    return {
        "id": settings.id,
        "object": "text_completion",
        "created": settings.created,
        "model": settings.model,
        "system_fingerprint": service.fingerprint,
    }
