"""What the server counts and tells of itself (H30): as clients were told, from their arrival, in bounded series."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.running import Answer, Running, eventually, read_all, running
from tests.serve.stub import StubEngine
from tests.serve.test_connections import chat_bytes, connect
from tests.serve.test_life import streams
from trivium.serve.errors import ApiError
from trivium.serve.grammar import Grammar, GrammarConstraint, Grammars
from trivium.serve.limits import Limits

pytestmark = pytest.mark.timeout(150)


def test_metrics_stay_bounded(server: Running) -> None:  # H30
    server.chat()

    def series() -> int:
        text = server.get("/metrics").body.decode()
        return sum(not line.startswith("#") for line in text.splitlines())

    server.get("/nothing")
    server.chat(model="nope")
    before = series()
    for index in range(50):
        server.chat(model=f"model-{index}", user=f"user-{index}")
        server.chat(user=f"user-{index}", max_tokens=1)
        server.get(f"/path-{index}")
    assert series() == before


def test_metrics_count_what_happened() -> None:  # H30
    with running() as server:
        server.chat(max_tokens=8)
        server.chat(max_tokens=4, n=2, stream=True)
        assert server.gauge("trivium_generation_tokens_total") == 16
        assert server.gauge("trivium_prompt_tokens_total") == 10
        assert server.gauge('trivium_request_success_total{finished_reason="length"}') == 3
        assert server.gauge("trivium_time_to_first_token_seconds_count") == 3
        assert server.gauge("trivium_inter_token_latency_seconds_count") == 13
        assert server.gauge("trivium_num_requests_running") == 0
        assert server.gauge('trivium_expert_tokens{expert="1",layer="0"}') == 5
        text = server.get("/metrics").body.decode()
        assert "trivium_kv_cache_usage_perc 0.0" in text


def test_metrics_count_the_reason_that_is_told() -> None:
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "clock", "parameters": nothing}}
    with running() as server:
        for stream in (False, True):
            answer = server.chat(
                tools=[tool], tool_choice="required", parallel_tool_calls=False, seed=1, max_tokens=500, stream=stream
            )
            told = answer.events()[-2] if stream else answer.json()
            assert told["choices"][0]["finish_reason"] == "tool_calls"
        assert server.gauge('trivium_request_success_total{finished_reason="tool_calls"}') == 2
        assert server.gauge('trivium_request_success_total{finished_reason="stop"}') == 0
        text = {"model": "stub", "prompt": ["a", "b"], "max_tokens": 2}
        for stream in (False, True):
            assert server.post("/v1/completions", text | {"stream": stream}).status == 200
        assert server.post("/v1/embeddings", {"model": "stub", "input": ["a"]}).status == 200
        assert server.gauge('trivium_request_success_total{finished_reason="length"}') == 5


def errors(server: Running) -> float:
    return server.server._service.metrics.finished.labels("error")._value.get()


@pytest.mark.parametrize("stream", [False, True])
def test_a_failing_choice_ends_all_that_are_left(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    engine = StubEngine()
    advance = engine._advance

    def one_fails(choice: Any) -> Any:
        if choice.index == 2 and choice.count == 3:
            return engine._delta(choice, "", [], "error", "broken")
        return advance(choice)

    monkeypatch.setattr(engine, "_advance", one_fails)
    with running(engine) as server:
        answer = server.chat(n=4, max_tokens=3000, stream=stream)
        assert b"generation_failed" in answer.body
        assert errors(server) == 4
        eventually(lambda: server.gauge("trivium_num_requests_running") == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_choices_that_had_ended_count_as_clients_are_told(
    monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    """Streamed, the first one's end was told; of a whole answer nothing was."""
    engine = StubEngine(step_s=0.05)
    advance = engine._advance

    def one_fails(choice: Any) -> Any:
        if choice.index == 0 and choice.count == 2:
            return engine._delta(choice, "", [], "length")
        if choice.index == 2 and choice.count == 20:
            return engine._delta(choice, "", [], "error", "broken")
        return advance(choice)

    monkeypatch.setattr(engine, "_advance", one_fails)
    text = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    with running(engine) as server:
        answer = server.post(path, {"model": "stub", "n": 3, "max_tokens": 3000, "stream": stream, **text})
        assert b"generation_failed" in answer.body
        assert errors(server) == (2 if stream else 3)
        assert server.gauge('trivium_request_success_total{finished_reason="length"}') == (1 if stream else 0)
        eventually(lambda: server.gauge("trivium_num_requests_running") == 0)


def test_a_dead_engine_fails_all_that_are_left() -> None:
    engine = StubEngine(step_s=0.02)
    with running(engine) as server, streams(server, 3, max_tokens=4000):
        eventually(lambda: engine.stats.running == 3)
        engine.die()
        eventually(lambda: errors(server) == 3)


def test_first_tokens_are_timed_from_the_arrival() -> None:
    """What is waited before the engine is asked is part of it: here for the text to be read."""
    engine = StubEngine()
    engine.tokenizer.gate = threading.Event()
    with running(engine) as server, ThreadPoolExecutor(1) as pool:
        begun = time.monotonic()
        answer = pool.submit(server.chat)
        try:
            eventually(lambda: engine.tokenizer.held)
            held = time.monotonic()
            time.sleep(0.3)
            waited_s = time.monotonic() - held
        finally:
            engine.tokenizer.gate.set()
        assert answer.result().status == 200
        whole_s = time.monotonic() - begun
        for name in ("trivium_time_to_first_token_seconds", "trivium_e2e_request_latency_seconds"):
            assert waited_s <= server.gauge(f"{name}_sum") <= whole_s
            assert server.gauge(f"{name}_count") == 1


def test_rejections_are_counted_by_what_kept_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = StubEngine(step_s=0.02)
    with running(engine, limits=Limits(drain_s=60)) as server:
        busy = ApiError(429, "grammar_workers_busy", "busy", headers={"Retry-After": "1"})

        async def compile(self: Grammars, grammar: Grammar) -> GrammarConstraint:
            raise busy

        monkeypatch.setattr(Grammars, "compile", compile)
        assert server.chat(regex="a").status == 429
        assert server.gauge('trivium_requests_rejected_total{reason="grammar_workers"}') == 1
        rejected = server.server._service.metrics.rejected.labels("shutting_down")
        with streams(server, 1, max_tokens=4000) as (sock,):
            assert b"200 OK" in sock.recv(100_000)
            with connect(server) as late:  # taken before the port is closed to new ones
                server.server.stop()
                eventually(lambda: server.server._service.bridge.draining)
                late.sendall(chat_bytes())
                assert Answer(read_all(late)).error["code"] == "shutting_down"
            assert rejected._value.get() == 1
            assert not server.server._service.able


def test_a_dead_engine_is_not_ready() -> None:
    engine = StubEngine()
    with running(engine) as server:
        assert server.gauge("trivium_ready") == 1
        engine.die()
        assert server.gauge("trivium_ready") == 0


def test_status_tells_of_work() -> None:
    engine = StubEngine(step_s=0.02, slots=2)
    with running(engine) as server, streams(server, 3, max_tokens=4000):
        eventually(lambda: (engine.stats.running, engine.stats.waiting) == (2, 1))
        eventually(lambda: server.get("/v1/status").json()["tokens_per_s"] > 0)
        status = server.get("/v1/status").json()
        assert (status["model"], status["running"], status["waiting"]) == ("stub", 2, 1)
        assert 0 < status["cache_usage"] <= 1
        assert 0 < status["tokens_per_s"] < 150  # 100 where the machine keeps the steps' time
        assert status["experts"] == [[3, 5], [8, 0]]
        json.dumps(status, allow_nan=False)
