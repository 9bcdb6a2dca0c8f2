"""The fields of each endpoint as tables: what is honoured, what is refused, and in which range."""

from __future__ import annotations

from typing import Any

from trivium.serve import fields as f
from trivium.serve.errors import ApiError, invalid, shown
from trivium.serve.fields import Field
from trivium.serve.limits import Limits
from trivium.serve.messages import NAME_CHARS, message

_HUGE = 2**31 - 1


def completion_fields(limits: Limits) -> tuple[Field, ...]:
    """``/v1/completions``."""
    return (
        _model(),
        Field(name="prompt", read=prompts(limits), required=True, about="a text, token ids, or a list of either"),
        Field(name="max_tokens", read=f.integer(0, _HUGE), default=16, about="16 unless told; 0 only with echo"),
        Field(name="echo", read=f.boolean, default=False, about="the prompt's text (and log-probabilities) first"),
        Field(
            name="logprobs",
            read=f.integer(0, limits.top_logprobs),
            about=f"0 to {limits.top_logprobs} likeliest tokens per position",
        ),
        *_sampling(limits),
        *_streaming(),
        *_grammar(limits),
        Field(name="best_of", read=f.refused("n choices are drawn and all are returned", 1), honoured=False),
        Field(name="suffix", read=f.refused("the models here continue a text and do not fill gaps"), honoured=False),
        _user(),
    )


def chat_fields(limits: Limits) -> tuple[Field, ...]:
    """``/v1/chat/completions``."""
    return (
        _model(),
        Field(
            name="messages",
            read=f.items(message(limits), 1, limits.messages),
            required=True,
            about=f"1 to {limits.messages}; roles system, developer (as system), user, assistant, tool; text content",
        ),
        Field(name="max_completion_tokens", read=f.integer(1, _HUGE), about="to the end of the context unless told"),
        Field(name="max_tokens", read=f.integer(1, _HUGE), about="the older name of max_completion_tokens"),
        Field(name="logprobs", read=f.boolean, default=False),
        Field(name="top_logprobs", read=f.integer(0, limits.top_logprobs), about="needs logprobs"),
        *_sampling(limits),
        *_streaming(),
        *_grammar(limits),
        _continuing(),
        Field(
            name="add_generation_prompt",
            read=f.boolean,
            about="beyond OpenAI's; false leaves the assistant's begin out",
        ),
        Field(
            name="tools",
            read=f.items(tool, 0, limits.tools),
            about="functions, by the model's own chat template; strict or not: arguments always match the schema",
        ),
        Field(name="tool_choice", read=tool_choice, about="none, auto, required, or one function by name"),
        Field(name="parallel_tool_calls", read=f.boolean, about="needs tools; false: one call at most"),
        _user(),
        Field(name="safety_identifier", read=f.text(NAME_CHARS), about="written to the access log as user is"),
        *_refused_chat(),
    )


def embedding_fields(limits: Limits) -> tuple[Field, ...]:
    """``/v1/embeddings``."""
    return (
        _model(),
        Field(name="input", read=prompts(limits), required=True, about="a text, token ids, or a list of either"),
        Field(name="encoding_format", read=f.choice("float", "base64"), default="float"),
        Field(name="pooling", read=f.choice("mean", "last"), default="mean", about="mean of all, or last"),
        Field(name="dimensions", read=f.refused("vectors have the model's own width"), honoured=False),
        _user(),
    )


def tokenize_fields(limits: Limits) -> tuple[Field, ...]:
    """``/tokenize``."""
    return (
        Field(name="model", read=f.text(NAME_CHARS)),
        Field(name="prompt", read=f.text(limits.body_bytes), about="a text; or messages"),
        Field(
            name="messages", read=f.items(message(limits), 1, limits.messages), about="a chat, by the model's template"
        ),
        Field(name="tools", read=f.items(tool, 0, limits.tools), about="needs messages, and a template with tools"),
        Field(
            name="add_special_tokens",
            read=f.boolean,
            about="needs prompt; what the tokenizer adds to a text, true unless told",
        ),
        Field(
            name="continue_final_message",
            read=f.boolean,
            about="needs messages; beyond OpenAI's: up to the end of the last message, the assistant's",
        ),
        Field(
            name="add_generation_prompt",
            read=f.boolean,
            about="needs messages; beyond OpenAI's: whether an answer is begun; true unless continue_final_message is",
        ),
    )


def detokenize_fields(limits: Limits) -> tuple[Field, ...]:
    """``/detokenize``."""
    return (
        Field(name="model", read=f.text(NAME_CHARS)),
        Field(name="tokens", read=token_ids(limits), required=True),
    )


def _model() -> Field:
    return Field(name="model", read=f.text(NAME_CHARS), about="the served name; any other is a 404")


def _continuing() -> Field:
    about = "beyond OpenAI's: the answer goes on from the last message, the assistant's"
    return Field(name="continue_final_message", read=f.boolean, default=False, about=about)


def _user() -> Field:
    return Field(name="user", read=f.text(NAME_CHARS), about="written to the access log; nothing else depends on it")


def _streaming() -> tuple[Field, ...]:
    return (
        Field(name="stream", read=f.boolean, default=False, about="server-sent events, ended by [DONE]"),
        Field(name="stream_options", read=stream_options, about="include_usage; needs stream"),
    )


def _sampling(limits: Limits) -> tuple[Field, ...]:
    return (
        Field(name="n", read=f.integer(1, limits.choices), default=1, about=f"1 to {limits.choices}"),
        Field(name="temperature", read=f.number(0, 2), default=1.0, about="0 to 2; 0 takes the likeliest token"),
        Field(name="top_p", read=f.number(0, 1), default=1.0),
        Field(name="top_k", read=f.integer(-1, _HUGE), default=0, about="beyond OpenAI's; 0 and −1 cut nothing"),
        Field(name="min_p", read=f.number(0, 1), default=0.0, about="beyond OpenAI's"),
        Field(name="presence_penalty", read=f.number(-2, 2), default=0.0),
        Field(name="frequency_penalty", read=f.number(-2, 2), default=0.0),
        Field(name="repetition_penalty", read=f.number(0, 10, above=True), default=1.0, about="beyond OpenAI's"),
        Field(name="logit_bias", read=logit_bias(limits), default={}, about=f"up to {limits.logit_bias} tokens, ±100"),
        Field(name="seed", read=f.integer(-(2**63), 2**63 - 1), about="the same seed draws the same tokens"),
        Field(name="stop", read=stop(limits), default=[], about=f"up to {limits.stops} of {limits.stop_chars} chars"),
        Field(name="stop_token_ids", read=f.items(f.integer(0, _HUGE), 0, 64), default=[], about="beyond OpenAI's"),
        Field(name="ignore_eos", read=f.boolean, default=False, about="beyond OpenAI's"),
        Field(name="min_tokens", read=f.integer(0, _HUGE), default=0, about="beyond OpenAI's"),
    )


def _grammar(limits: Limits) -> tuple[Field, ...]:
    source = f.text(limits.grammar_bytes, empty=False)
    return (
        Field(
            name="response_format",
            read=response_format,
            about="text, json_object or json_schema (strict or not: answers always match the schema; name: checked, "
            "and nothing depends on it; description: refused, for the model is not shown it)",
        ),
        Field(name="regex", read=source, about="beyond OpenAI's: the answer matches this expression"),
        Field(name="grammar", read=source, about="beyond OpenAI's: the answer matches this Lark grammar"),
        Field(name="chat_template", read=f.refused("templates come with the model"), honoured=False),
    )


def _refused_chat() -> tuple[Field, ...]:
    reasons: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
        ("audio", "the models here write text only", ()),
        ("function_call", "use tool_choice", ("none",)),
        ("functions", "use tools", ([],)),
        ("metadata", "nothing is stored", ({},)),
        ("modalities", "the models here write text only", (["text"],)),
        ("moderation", "nothing here moderates", ()),
        ("prediction", "no predicted output is used", ()),
        ("prompt_cache_key", "prefixes are shared by their tokens, without a key", ()),
        ("prompt_cache_options", "prefixes are shared while there is room", ()),
        ("prompt_cache_retention", "prefixes are shared while there is room", ("in_memory",)),
        ("reasoning_effort", "the server passes no settings to templates", ()),
        ("service_tier", "there is one tier", ("auto", "default")),
        ("store", "nothing is stored", (False,)),
        ("verbosity", "ask for it in the prompt", ()),
        ("web_search_options", "the server makes no outbound request", ()),
        ("chat_template_kwargs", "the template is rendered as it stands", ({},)),
    )
    return tuple(Field(name=name, read=f.refused(why, *same), honoured=False, about=why) for name, why, same in reasons)


def prompts(limits: Limits) -> f.Reader:
    """A text, a list of token ids, or a list of either; comes back as a list of prompts."""
    ids = token_ids(limits)

    def one(value: Any, param: str) -> str | list[int]:
        if isinstance(value, str):
            if not value:
                raise invalid(param, f"{param} is empty: expected at least one character")
            return value
        if isinstance(value, list):
            return list(ids(value, param))
        raise invalid(param, f"{param}={shown(value)}: expected a string or a list of token ids", "invalid_type")

    def read(value: Any, param: str) -> list[str | list[int]]:
        if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
            if len(value) > limits.prompts:
                raise invalid(param, f"{param} has {len(value)} prompts: expected at most {limits.prompts}")
            return [one(entry, f"{param}[{index}]") for index, entry in enumerate(value)]
        return [one(value, param)]

    return read


def token_ids(limits: Limits) -> f.Reader:
    """A list of at least one token id."""

    def read(value: Any, param: str) -> list[int]:
        if not isinstance(value, list):
            raise invalid(param, f"{param}={shown(value)}: expected a list of token ids", "invalid_type")
        if not value:
            raise invalid(param, f"{param} is an empty list: expected at least one token")
        if set(map(type, value)) != {int} or min(value) < 0 or max(value) > _HUGE:
            wrong = next(i for i, token in enumerate(value) if type(token) is not int or not 0 <= token <= _HUGE)
            raise invalid(f"{param}[{wrong}]", f"{param}[{wrong}]={shown(value[wrong])}: expected a token id")
        return value

    return read


def stop(limits: Limits) -> f.Reader:
    """One stop string or several."""
    several = f.items(f.text(limits.stop_chars, empty=False), 0, limits.stops)
    return lambda value, param: several([value] if isinstance(value, str) else value, param)


def logit_bias(limits: Limits) -> f.Reader:
    """Token ids, written as strings, to what is added to their logits."""
    bias = f.number(-100, 100)

    def read(value: Any, param: str) -> dict[int, float]:
        pairs = f.mapping(value, param)
        if len(pairs) > limits.logit_bias:
            raise invalid(param, f"{param} has {len(pairs)} entries: expected at most {limits.logit_bias}")
        found: dict[int, float] = {}
        for key, entry in pairs.items():
            if not (key.isascii() and key.isdigit() and len(key) <= 9 and (key == "0" or key[0] != "0")):
                raise invalid(param, f"{param} has the key {shown(key)}: expected a token id")
            found[int(key)] = bias(entry, f"{param}.{key}")
        return found

    return read


def stream_options(value: Any, param: str) -> dict[str, Any]:
    """``include_usage``; obfuscation is refused."""
    table = (
        Field(name="include_usage", read=f.boolean, default=False),
        Field(name="include_obfuscation", read=f.refused("events are not padded", False)),
    )
    return f.read_fields(f.mapping(value, param), table, f"{param}.")


def response_format(value: Any, param: str) -> dict[str, Any] | None:
    """``text`` (None), ``json_object``, or ``json_schema`` with its schema."""
    kinds = ("text", "json_object", "json_schema")
    table = (
        Field(name="type", read=f.choice(*kinds), required=True),
        Field(name="json_schema", read=f.mapping),
    )
    found = f.read_fields(f.mapping(value, param), table, f"{param}.")
    if found["type"] != "json_schema":
        if found["json_schema"] is not None:
            raise invalid(f"{param}.json_schema", f"{param}.json_schema needs {param}.type json_schema")
        return found if found["type"] == "json_object" else None
    if found["json_schema"] is None:
        raise ApiError(
            400, "missing_required_parameter", f"{param}.json_schema is required", param=f"{param}.json_schema"
        )
    inner = (
        Field(name="name", read=f.text(64, empty=False), required=True),
        Field(name="description", read=f.refused("the model is not shown it; say it in a message", ""), honoured=False),
        Field(name="schema", read=f.mapping, default={}),
        Field(name="strict", read=f.boolean),
    )
    found["json_schema"] = f.read_fields(found["json_schema"], inner, f"{param}.json_schema.")
    return found


def tool(value: Any, param: str) -> dict[str, Any]:
    """A function a model may call; comes back as the template is given it, ``parameters`` always there."""
    table = (
        Field(name="type", read=f.choice("function"), required=True),
        Field(name="function", read=f.mapping, required=True),
    )
    function = f.read_fields(f.mapping(value, param), table, f"{param}.")["function"]
    inner = (
        Field(name="name", read=f.function_name, required=True),
        Field(name="description", read=f.text(16384)),
        Field(name="parameters", read=f.mapping, default={"type": "object", "properties": {}}),
        Field(name="strict", read=f.boolean),
    )
    read = f.read_fields(function, inner, f"{param}.function.")
    kept = {name: entry for name, entry in read.items() if entry is not None and name != "strict"}
    return {"type": "function", "function": kept}


def tool_choice(value: Any, param: str) -> str | dict[str, Any]:
    """``none``, ``auto``, ``required``, or ``{"type": "function", "function": {"name"}}``."""
    if isinstance(value, str):
        return str(f.choice("none", "auto", "required")(value, param))
    table = (
        Field(name="type", read=f.choice("function"), required=True),
        Field(name="function", read=f.mapping, required=True),
    )
    found = f.read_fields(f.mapping(value, param), table, f"{param}.")
    name = (Field(name="name", read=f.function_name, required=True),)
    return f.read_fields(found["function"], name, f"{param}.function.")
