"""What a request must be before the engine takes it: checked against the model's vocabulary and context, once."""

from __future__ import annotations

from dataclasses import replace

from trivium.inference.request import ContextLengthError, Request, RequestError, check_tokens


def checked(
    request: Request, *, vocabulary: int, max_positions: int, max_sequences: int, has_text: bool, num_moe_layers: int
) -> tuple[Request, int]:
    """The request as it will be served, and how many tokens its prompt and answer have at most.

    ``max_tokens`` beyond the context is clipped; a longer prompt is refused, unless ``truncate_prompt`` keeps its end.

    Raises:
        RequestError: naming the field.
    """
    prompt = check_tokens(request.prompt_token_ids, vocabulary)
    params = request.params
    asked = params.max_tokens
    limit = max_positions if asked == 0 else max_positions - 1
    if len(prompt) > limit and params.truncate_prompt:
        wanted = max_positions // 2 if asked is None else asked
        prompt = prompt[-max(1, max_positions - min(max(wanted, asked != 0), max_positions // 2)) :]
    if len(prompt) > limit:
        room = "" if asked == 0 else " and room for one more"
        raise ContextLengthError(
            f"the prompt has {len(prompt)} tokens, the context holds {max_positions}: expected at most {limit}{room}; "
            "shorten it, or set truncate_prompt to keep its end",
            given=len(prompt),
            limit=limit,
        )
    most = max_positions if asked is None else min(max_positions, len(prompt) + asked)
    _check_ids(request, vocabulary)
    if params.n > max_sequences:
        raise RequestError(f"n={params.n}: expected at most {max_sequences}, the engine's max_sequences", param="n")
    if (params.stop or params.echo) and not has_text:
        name = "stop" if params.stop else "echo"
        raise RequestError(f"{name}: the model has no tokenizer; use stop_token_ids and token ids", param=name)
    _check_collections(request, num_moe_layers, len(prompt))
    return replace(request, prompt_token_ids=prompt), most


def _check_ids(request: Request, vocabulary: int) -> None:
    params = request.params
    for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
        for token in ids:
            if token >= vocabulary:
                raise RequestError(f"{name}: token {token}: expected 0 to {vocabulary - 1}", param=name)
    for name in ("logprobs", "prompt_logprobs"):
        count = getattr(params, name)
        if count is not None and count > vocabulary:
            raise RequestError(f"{name}={count}: the vocabulary has {vocabulary} tokens", param=name)


def _check_collections(request: Request, num_moe_layers: int, num_prompt: int) -> None:
    params = request.params
    if request.collect is not None and params.n != 1:
        raise RequestError(f"collect={request.collect!r} with n={params.n}: expected n=1", param="n")
    if (request.collect == "routing" or request.routing is not None) and not num_moe_layers:
        raise RequestError("routing: the model has no experts", param="routing")
    if request.routing is not None:
        shapes = [list(layer.shape) for layer in request.routing]
        if len(shapes) != num_moe_layers or any(len(shape) != 2 or shape[0] != num_prompt for shape in shapes):
            raise RequestError(
                f"routing of shapes {shapes}: expected {num_moe_layers} layers of [{num_prompt}, k]", param="routing"
            )
        if params.max_tokens != 0:
            raise RequestError("routing is replayed on a prompt alone: set max_tokens=0", param="routing")
