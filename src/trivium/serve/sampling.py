"""From a request's fields to what the engine is asked: sampling settings, the grammar, and whether the prompt fits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trivium.inference import RequestError, SamplingParams
from trivium.serve.bridge import refusal
from trivium.serve.errors import ApiError, invalid
from trivium.serve.grammar import Grammar
from trivium.serve.served import Served


def sampling_params(values: Mapping[str, Any], **more: Any) -> SamplingParams:
    """The settings in ``values``. Raises ApiError 400."""
    seed = values["seed"]
    try:
        return SamplingParams(
            min_tokens=values["min_tokens"],
            temperature=values["temperature"],
            top_k=values["top_k"],
            top_p=values["top_p"],
            min_p=values["min_p"],
            repetition_penalty=values["repetition_penalty"],
            presence_penalty=values["presence_penalty"],
            frequency_penalty=values["frequency_penalty"],
            logit_bias=values["logit_bias"],
            seed=None if seed is None else seed & (2**63 - 1),
            n=values["n"],
            stop=values["stop"],
            stop_token_ids=values["stop_token_ids"],
            ignore_eos=values["ignore_eos"],
            **more,
        )
    except RequestError as error:
        raise refusal(error) from None


def grammar_of(values: Mapping[str, Any]) -> Grammar | None:
    """The one grammar that a request asks for, if any. Raises ApiError 400 for several, and for what undoes one."""
    found: list[Grammar] = []
    shape = values["response_format"]
    if shape is not None:
        if shape["type"] == "json_schema":
            source = json.dumps(shape["json_schema"]["schema"])
            found.append(Grammar(kind="json_schema", source=source, param="response_format.json_schema.schema"))
        else:
            found.append(Grammar(kind="json_schema", source='{"type": "object"}', param="response_format"))
    if values["regex"] is not None:
        found.append(Grammar(kind="regex", source=values["regex"], param="regex"))
    if values["grammar"] is not None:
        found.append(Grammar(kind="lark", source=values["grammar"], param="grammar"))
    if len(found) > 1:
        raise invalid(found[1].param, f"{found[0].param} and {found[1].param} exclude each other")
    if found:
        refuse_undoing(values, found[0].param)
    return found[0] if found else None


def refuse_undoing(values: Mapping[str, Any], param: str) -> None:
    """A grammar ends the text where it is complete: no field may ask for more, and none may cut it before."""
    for name in ("ignore_eos", "min_tokens", "stop", "stop_token_ids"):
        if values[name]:
            why = "could cut it before" if name.startswith("stop") else "asks for more"
            message = f"{name} and {param} exclude each other: a grammar says where the text ends, and {name} {why}"
            raise invalid(name, message)


def check_context(tokens: int, served: Served, param: str, *, room: int = 1) -> None:
    """Raises ApiError 400 where a prompt leaves no room for one more token."""
    most = served.max_positions - room
    if tokens > most:
        raise too_long(f"{param} has {tokens} tokens", served, param, most)


def check_characters(characters: int, served: Served, param: str) -> None:
    """The cheap check before a text is read: no token is longer than the longest."""
    most = served.max_positions * served.longest_token
    if characters > most:
        raise too_long(f"{param} has {characters} characters", served, param, served.max_positions - 1)


def too_long(what: str, served: Served, param: str, most: int) -> ApiError:
    """A prompt beyond the context."""
    message = f"{what}; the context holds {served.max_positions} tokens: send at most {most}"
    return ApiError(400, "context_length_exceeded", message, param=param)
