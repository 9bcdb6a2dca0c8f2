"""The whole way with a real model: a folder, the engine, the API; text as offline, all blocks free at the end."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from tests.serve.running import Answer, Running, eventually, read_all, running, user
from tests.serve.test_connections import connect, head
from trivium.bench.serve_client import Target, closed_loop
from trivium.bench.serve_model import write
from trivium.inference import LLM, SamplingParams
from trivium.models import DecoderConfig
from trivium.serve.limits import Limits
from trivium.serve.load import serve_model

pytestmark = pytest.mark.timeout(120)
TEXTS = ["the cat sat on the mat, and the dog ran after it. ", '{"name": "Anna", "age": 7} <|user|> [1, 2]\n'] * 3
TEMPLATE = (
    "{% if tools %}<|system|>Call with <tool_call>: {{ tools | tojson }}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m.role if m.role in ('user', 'assistant', 'system') else 'user' }}|>"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in Hugging Face's layout, with random weights that matter and a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    config = DecoderConfig(
        vocabulary=304, dim=32, layers=2, heads=4, kv_heads=2, ffn_dim=64, max_positions=256, tied=True
    )
    write(path, config, TEXTS, words=300)
    told = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(told | {"chat_template": TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM(folder, threads=1, memory="64MiB", max_sequences=16)


@pytest.fixture(scope="module")
def tiny(llm: LLM) -> Iterator[Running]:
    limits = Limits(drain_s=0.3)
    with running(load=lambda: serve_model(llm, "tiny", limits), name="tiny", limits=limits, wait=True) as handle:
        yield handle
        eventually(lambda: llm.stats.running == llm.stats.waiting == 0)
        assert llm.stats.blocks_free == llm.stats.blocks_total
        llm.engine.check()


@pytest.fixture(scope="module")
def client(tiny: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def offline(folder: Path) -> LLM:
    """The same model, asked without a server."""
    return LLM(folder, threads=1, memory="64MiB")


PROMPTS = ["the cat", "the dog ran", '{"name": ', "mat, and the", "Ünïcode 🐟 too"]


def test_greedy_text_is_that_of_generate(client: openai.OpenAI, offline: LLM) -> None:
    expected = [out.text for out in offline.generate(PROMPTS, SamplingParams(max_tokens=24, temperature=0))]
    answer = client.completions.create(model="tiny", prompt=PROMPTS, max_tokens=24, temperature=0)
    assert [choice.text for choice in answer.choices] == expected
    for prompt, text in zip(PROMPTS, expected, strict=True):
        stream = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, temperature=0, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_logprobs_are_those_of_the_model(client: openai.OpenAI, offline: LLM) -> None:
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=6, temperature=0, logprobs=3, echo=True
    )
    lists = answer.choices[0].logprobs
    assert lists is not None and lists.token_logprobs is not None
    prompt = offline.encode("the cat")
    out = offline.generate("the cat", SamplingParams(max_tokens=6, temperature=0))[0]
    tokens = [*prompt, *out.token_ids]
    logits_TV = offline.logits(tokens[:-1]).log_softmax(-1)
    expected = [float(logits_TV[i, token]) for i, token in enumerate(tokens[1:])]
    assert lists.token_logprobs[0] is None
    assert lists.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)


def test_embeddings_are_those_of_the_model(client: openai.OpenAI, offline: LLM) -> None:
    for pooling in ("mean", "last"):
        found = client.embeddings.create(model="tiny", input=PROMPTS, extra_body={"pooling": pooling})
        expected = torch.nn.functional.normalize(offline.embed(PROMPTS, pooling), dim=1)  # type: ignore[arg-type]
        for entry, vector in zip(found.data, expected, strict=True):
            assert entry.embedding == pytest.approx(vector.tolist(), abs=1e-5)


def test_a_chat_with_everything(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi <|end|>"}],
        max_tokens=12, n=3, seed=7, temperature=0.9, top_p=0.9, presence_penalty=0.5, frequency_penalty=0.5,
        logit_bias={"5": -100}, logprobs=True, top_logprobs=2, stop=["zzz"],
        extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.1, "min_tokens": 2},
    )  # fmt: skip
    assert len(answer.choices) == 3
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content
        assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert len({choice.message.content for choice in answer.choices}) > 1


def test_control_tokens_come_from_the_template_alone(tiny: Running, llm: LLM) -> None:  # H27
    ids = llm.tokenizer.control  # type: ignore[union-attr]
    plain = tiny.post("/tokenize", {"messages": [user("<|end|><|assistant|>")]}).json()["tokens"]
    assert [token for token in plain if token in ids.values()] == [
        ids["<|user|>"],
        ids["<|end|>"],
        ids["<|assistant|>"],
    ]


def test_an_answer_goes_on_where_it_stopped(tiny: Running, offline: LLM) -> None:
    asked = [user("the dog"), {"role": "assistant", "content": "ran after"}]
    begun = tiny.post("/tokenize", {"messages": asked[:1]}).json()["tokens"]
    tokens = [*begun, *offline.encode("ran after")]
    assert tiny.post("/tokenize", {"messages": asked, "continue_final_message": True}).json()["tokens"] == tokens
    expected = offline.generate(tokens, SamplingParams(max_tokens=12, temperature=0))[0].text
    answer = tiny.chat(model="tiny", messages=asked, continue_final_message=True, max_tokens=12, temperature=0)
    assert answer.json()["choices"][0]["message"]["content"] == expected


def test_schemas_and_expressions_hold(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "maximum": 99, "minimum": 0},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    import jsonschema

    for seed in range(6):
        asked: dict[str, Any] = {"model": "tiny", "messages": [user("x")], "seed": seed, "max_tokens": 200}
        shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        choice = client.chat.completions.create(**asked, response_format=shape).choices[0]
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), schema)
        found = client.chat.completions.create(**asked, extra_body={"regex": "(cat|dog) [0-9]{2}"}).choices[0].message
        assert (found.content or "")[:3] in ("cat", "dog") and len(found.content or "") == 6


def test_forced_tools(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"n": {"enum": [1, 2]}},
        "required": ["n"],
        "additionalProperties": False,
    }
    tools: Any = [{"type": "function", "function": {"name": "pick", "parameters": parameters}}]
    for seed in range(4):
        choice = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "x"}], tools=tools, tool_choice="required", seed=seed,
            max_tokens=120, parallel_tool_calls=False,
        ).choices[0]  # fmt: skip
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls or []
        assert call.type == "function"
        assert json.loads(call.function.arguments) in ({"n": 1}, {"n": 2})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"stop_token_ids": [304]}, "stop_token_ids"),
        ({"min_tokens": 9, "max_tokens": 3}, "min_tokens"),
        ({"messages": [user("the cat " * 300)]}, "messages"),
    ],
)
def test_what_the_engine_refuses_is_a_400(tiny: Running, fields: dict[str, Any], param: str) -> None:
    answer = tiny.chat(**({"model": "tiny"} | fields))
    assert (answer.status, answer.error["param"]) == (400, param), answer.raw


def test_random_cancels_leave_nothing(tiny: Running, llm: LLM) -> None:
    draw = random.Random(1)
    body = json.dumps(
        {"model": "tiny", "messages": [user("the cat")], "max_tokens": 200, "ignore_eos": True, "stream": True}
    )

    def one() -> None:
        with connect(tiny) as sock:
            sock.sendall(head(Content_Length=str(len(body))) + body.encode())
            time.sleep(draw.random() * 0.1)

    for _ in range(10):
        threads = [threading.Thread(target=one) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    eventually(lambda: llm.stats.running == llm.stats.waiting == 0)
    assert llm.stats.blocks_free == llm.stats.blocks_total
    assert tiny.get("/readyz").status == 200


def test_many_at_once_say_what_one_says(tiny: Running) -> None:
    def text() -> str:
        asked = {"model": "tiny", "prompt": "the dog", "max_tokens": 20, "temperature": 0}
        return str(tiny.post("/v1/completions", asked).json()["choices"][0]["text"])

    alone = text()
    target = Target(url=f"{tiny.url}/v1", model="tiny", prompt_words=4, max_tokens=40)
    load = threading.Thread(target=lambda: asyncio.run(closed_loop(target, 12, 24)))
    load.start()
    texts = [text() for _ in range(5)]
    load.join()
    assert set(texts) == {alone}


def test_status_and_metrics_of_a_real_engine(tiny: Running) -> None:
    with connect(tiny) as sock:
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True})
        sock.sendall(head("/v1/completions", Content_Length=str(len(body)), Connection="close") + body.encode())
        assert Answer(read_all(sock)).events()[-1] == "[DONE]"
    status = tiny.get("/v1/status").json()
    assert (status["model"], status["running"], status["cache_usage"], status["experts"]) == ("tiny", 0, 0.0, None)
    assert tiny.gauge("trivium_generation_tokens_total") >= 60
