"""``/v1/models``, ``/v1/embeddings``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

import base64
from typing import Any

import numpy
import torch

from trivium.inference import Request, SamplingParams
from trivium.serve.errors import ApiError, invalid
from trivium.serve.exchange import Exchange
from trivium.serve.sampling import check_context
from trivium.serve.schema import detokenize_fields, embedding_fields, tokenize_fields
from trivium.serve.service import Service, check_vocabulary


async def models(service: Service, exchange: Exchange) -> None:
    """The one model, also while it is loading."""
    await exchange.reply_json({"object": "list", "data": [_model(service)]})


async def model(service: Service, exchange: Exchange) -> None:
    """The one model by its name. Raises ApiError 404 for any other."""
    service.check_model(exchange.scope["path_params"]["name"])
    await exchange.reply_json(_model(service))


def _model(service: Service) -> dict[str, Any]:
    entry = {"id": service.name, "object": "model", "created": service.created, "owned_by": "trivium"}
    return entry | ({"max_model_len": service.served.max_positions} if service.served is not None else {})


async def embed(service: Service, exchange: Exchange) -> None:
    """A vector per text: the last layer's states, normed by the model, their mean or the last one, of length 1."""
    served = service.ready()
    values = await exchange.fields(embedding_fields(service.limits))
    service.note(exchange, values)
    service.check_model(values["model"])
    service.bridge.refuse_if_full(len(values["input"]))
    prompts = await service.prompt_tokens(values["input"], "input")
    for index, prompt in enumerate(prompts):
        check_context(len(prompt), served, f"input[{index}]", room=0)
    base = service.engine_id(exchange)
    params = SamplingParams(max_tokens=0)
    requests = [
        Request(request_id=f"{base}-{index}", prompt_token_ids=prompt, params=params, collect="hidden")
        for index, prompt in enumerate(prompts)
    ]
    vectors: dict[int, torch.Tensor] = {}
    with service.generating(exchange, requests) as job, exchange.watched(job):
        while batch := await job.take():
            for delta in batch:
                job.told(delta.finish_reason)
                if delta.collected is not None and delta.collected.hidden is not None:
                    vectors[job.order[delta.request_id]] = _pooled(delta.collected.hidden, values["pooling"])
        if job.cancelled:
            return
    if len(vectors) != len(prompts):
        raise ApiError(503, "shutting_down", "the server stopped before all vectors were there")
    data = [
        {"object": "embedding", "index": index, "embedding": _encoded(vectors[index], values["encoding_format"])}
        for index in range(len(prompts))
    ]
    tokens = sum(map(len, prompts))
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    await exchange.reply_json({"object": "list", "data": data, "model": served.name, "usage": usage})


def _pooled(hidden_TD: torch.Tensor, pooling: str) -> torch.Tensor:
    pooled = hidden_TD.float().mean(dim=0) if pooling == "mean" else hidden_TD[-1].float()
    return torch.nn.functional.normalize(pooled, dim=0)


def _encoded(vector: torch.Tensor, form: str) -> list[float] | str:
    if form == "float":
        return [float(entry) for entry in vector.tolist()]
    return base64.b64encode(numpy.ascontiguousarray(vector.numpy(), dtype="<f4").tobytes()).decode()


async def tokenize(service: Service, exchange: Exchange) -> None:
    """Token ids of a text or a chat."""
    served = service.ready()
    values = await exchange.fields(tokenize_fields(service.limits))
    if values["model"] is not None:
        service.check_model(values["model"])
    if (values["prompt"] is None) == (values["messages"] is None):
        raise invalid("prompt", "send either prompt or messages")
    text = values["prompt"] is not None
    needs = "messages" if text else "prompt"
    for name in ("tools", "continue_final_message", "add_generation_prompt") if text else ("add_special_tokens",):
        if values[name] is not None:
            raise invalid(name, f"{name} needs {needs}: with {'prompt' if text else 'messages'} it changes nothing")
    if not text:
        if values["tools"] and served.template is not None and service.dialect is None:
            message = "the model's chat template does not say how it calls tools"
            raise ApiError(400, "unsupported_parameter", message, param="tools")
        tokens = await service.chat_tokens(
            values["messages"],
            tools=values["tools"],
            prompt=values["add_generation_prompt"],
            onward=bool(values["continue_final_message"]),
        )
    elif values["prompt"] == "":
        tokens = []
    else:
        special = values["add_special_tokens"] is not False
        tokens = await service.encode(values["prompt"], param="prompt", special=special)
    await exchange.reply_json({"count": len(tokens), "max_model_len": served.max_positions, "tokens": tokens})


async def detokenize(service: Service, exchange: Exchange) -> None:
    """The text of token ids, control tokens left out."""
    served = service.ready()
    values = await exchange.fields(detokenize_fields(service.limits))
    if values["model"] is not None:
        service.check_model(values["model"])
    tokens: list[int] = values["tokens"]
    check_vocabulary(tokens, served, "tokens")
    tokenizer = service.tokenizer("tokens")
    text = await service.off_loop(len(tokens), lambda: tokenizer.decode(tokens), "tokens")
    await exchange.reply_json({"prompt": text})
