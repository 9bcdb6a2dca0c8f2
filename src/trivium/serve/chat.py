"""``/v1/chat/completions``: a chat in, the assistant's next message out, whole or as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trivium.inference import Delta, Request, TokenLogprobs
from trivium.serve.bridge import Job
from trivium.serve.errors import invalid
from trivium.serve.exchange import Exchange, quoted
from trivium.serve.logprobs import chat_logprobs
from trivium.serve.sampling import check_context, grammar_of, refuse_undoing, sampling_params
from trivium.serve.schema import chat_fields
from trivium.serve.service import Service
from trivium.serve.tool_reader import Call, ToolReader
from trivium.serve.tools import ToolPlan, plan_tools


@dataclass(kw_only=True)
class _Settings:
    """What shapes the answer to one request."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    choices: int
    logprobs: int | None
    usage: bool
    tools: ToolPlan | None
    stream: bool


async def chat(service: Service, exchange: Exchange) -> None:
    """Answer one chat request."""
    served = service.ready()
    values = await exchange.fields(chat_fields(service.limits))
    service.note(exchange, values)
    service.check_model(values["model"])
    service.bridge.refuse_if_full(values["n"])
    _check_needs(values)
    grammar = grammar_of(values)
    plan = plan_tools(
        values["tools"], values["tool_choice"], values["parallel_tool_calls"] is not False, service.dialect
    )
    if plan is not None:
        if grammar is not None:
            raise invalid(grammar.param, f"{grammar.param} and tools exclude each other, unless tool_choice is none")
        refuse_undoing(values, "tools")
        grammar = plan.grammar
    if grammar is not None and values["continue_final_message"]:
        message = f"continue_final_message and {grammar.param} exclude each other: what is written begins anew"
        raise invalid("continue_final_message", message)
    constraint = None if grammar is None else await service.compile(grammar)
    tokens = await service.chat_tokens(
        values["messages"],
        tools=values["tools"] if plan is not None else None,
        prompt=values["add_generation_prompt"],
        onward=values["continue_final_message"],
    )
    check_context(len(tokens), served, "messages")
    top = (values["top_logprobs"] or 0) if values["logprobs"] else None
    most = values["max_completion_tokens"] or values["max_tokens"]
    params = sampling_params(values, max_tokens=most, logprobs=None if top is None else min(top, served.vocabulary))
    settings = _Settings(
        id=f"chatcmpl-{exchange.request_id}",
        created=int(time.time()),
        model=served.name,
        prompt_tokens=len(tokens),
        choices=params.n,
        logprobs=top,
        usage=bool((values["stream_options"] or {}).get("include_usage")),
        tools=plan,
        stream=values["stream"],
    )
    request = Request(
        request_id=service.engine_id(exchange), prompt_token_ids=tokens, params=params, constraint=constraint
    )
    with service.generating(exchange, [request], constraint) as job, exchange.watched(job):
        await (_stream if settings.stream else _whole)(service, exchange, job, settings)


def _check_needs(values: Mapping[str, Any]) -> None:
    """Raises ApiError 400 for a field that would change nothing without another, and for two that say the same."""
    for name, needs in (
        ("stream_options", "stream"),
        ("top_logprobs", "logprobs"),
        ("parallel_tool_calls", "tools"),
    ):
        if values[name] is not None and not values[needs]:
            raise invalid(name, f"{name} needs {needs}")
    if None not in (values["max_tokens"], values["max_completion_tokens"]):
        message = "max_completion_tokens and max_tokens, its older name, exclude each other"
        raise invalid("max_completion_tokens", message)


class _Choice:
    """What one choice has come to."""

    def __init__(self, service: Service, plan: ToolPlan | None) -> None:
        self.reader = None if plan is None else ToolReader(plan, service.token_bytes, service.control_ids)
        self.content: list[str] = []
        self.calls: list[dict[str, Any]] = []
        self.logprobs: list[TokenLogprobs] = []
        self.finish: str | None = None

    def read(self, delta: Delta) -> tuple[str, list[Call]]:
        """The content and the calls that ``delta`` makes certain."""
        calls: list[Call] = []
        text = delta.text
        if self.reader is not None:
            text, calls = self.reader.push(text, delta.token_ids)
            if delta.finish_reason is not None:
                text += self.reader.flush()
        if delta.finish_reason is not None:
            called = self.reader is not None and self.reader.whole
            self.finish = "tool_calls" if called and delta.finish_reason == "stop" else delta.finish_reason
        return text, calls

    def add(self, delta: Delta) -> None:
        """Keep what a whole answer is made of."""
        text, calls = self.read(delta)
        self.content.append(text)
        self.logprobs += delta.logprobs or []
        for call in calls:
            if call.name is not None:
                self.calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
            self.calls[call.index]["function"]["arguments"] += call.arguments


async def _whole(service: Service, exchange: Exchange, job: Job, settings: _Settings) -> None:
    choices = [_Choice(service, settings.tools) for _ in range(settings.choices)]
    async for delta in job.unstreamed():
        choices[delta.choice].add(delta)
    if job.cancelled:
        return
    answers = []
    for index, choice in enumerate(choices):
        job.told(choice.finish)
        content = "".join(choice.content)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if choice.calls:
            message |= {"content": content or None, "tool_calls": choice.calls}
        logprobs = None
        if settings.logprobs is not None:
            logprobs = chat_logprobs(choice.logprobs, service.token_bytes, settings.logprobs)
        answers.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": choice.finish})
    await exchange.reply_json(
        {
            "id": settings.id,
            "object": "chat.completion",
            "created": settings.created,
            "model": settings.model,
            "choices": answers,
            "usage": job.usage(settings.prompt_tokens),
            "system_fingerprint": service.fingerprint,
        }
    )


async def _stream(service: Service, exchange: Exchange, job: Job, settings: _Settings) -> None:
    writer = _Writer(service, settings)
    choices = [_Choice(service, settings.tools) for _ in range(settings.choices)]
    begun: set[int] = set()
    while batch := await job.take():
        events: list[bytes] = []
        for delta in batch:
            if delta.choice not in begun:
                begun.add(delta.choice)
                events.append(writer.delta(delta.choice, {"role": "assistant", "content": ""}))
            choice = choices[delta.choice]
            text, calls = choice.read(delta)
            if text or delta.logprobs:
                events.append(writer.text(delta, text))
            events += [writer.call(delta.choice, call) for call in calls]
            if choice.finish is not None:
                job.told(choice.finish)
                events.append(writer.delta(delta.choice, {}, choice.finish))
        if not exchange.began:
            await exchange.start_events()
        if events:
            await exchange.chunk(b"".join(events))
    if job.cancelled:
        return
    if settings.usage:
        await exchange.chunk(writer.usage(job.usage(settings.prompt_tokens)))
    await exchange.end_events()


class _Writer:
    """Chunks of a stream; what is the same in all of them is laid out once."""

    def __init__(self, service: Service, settings: _Settings) -> None:
        head = {
            "id": settings.id,
            "object": "chat.completion.chunk",
            "created": settings.created,
            "model": settings.model,
            "system_fingerprint": service.fingerprint,
        }
        self._head = b"data: " + json.dumps(head, ensure_ascii=False).encode()[:-1]
        self._tail = (b', "usage": null}' if settings.usage else b"}") + b"\n\n"
        choices = range(settings.choices)
        self._plain = [self._head + f', "choices": [{{"index": {i}, "delta": {{"content": '.encode() for i in choices]
        self._rest = b'}, "logprobs": null, "finish_reason": null}]' + self._tail
        self._service = service
        self._top = settings.logprobs

    def delta(self, index: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        """A chunk with one choice."""
        return self._choice(index, json.dumps(delta, ensure_ascii=False), "null", json.dumps(finish))

    def text(self, delta: Delta, text: str) -> bytes:
        """More content."""
        if self._top is None:
            return self._plain[delta.choice] + quoted(text).encode() + self._rest
        entries = chat_logprobs(delta.logprobs or [], self._service.token_bytes, self._top)
        logprobs = json.dumps(entries, ensure_ascii=False)
        return self._choice(delta.choice, f'{{"content": {json.dumps(text, ensure_ascii=False)}}}', logprobs, "null")

    def call(self, index: int, call: Call) -> bytes:
        """A call's beginning, or more of its arguments."""
        entry: dict[str, Any] = {"index": call.index, "function": {"arguments": call.arguments}}
        if call.name is not None:
            entry |= {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        return self.delta(index, {"tool_calls": [entry]})

    def usage(self, usage: dict[str, Any]) -> bytes:
        """The last chunk, without choices."""
        return self._head + b', "choices": [], "usage": ' + json.dumps(usage).encode() + b"}\n\n"

    def _choice(self, index: int, delta: str, logprobs: str, finish: str) -> bytes:
        choice = (
            f', "choices": [{{"index": {index}, "delta": {delta}, "logprobs": {logprobs}, "finish_reason": {finish}}}]'
        )
        return self._head + choice.encode() + self._tail
