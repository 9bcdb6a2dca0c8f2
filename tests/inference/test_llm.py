"""The model in the hand: real weights, every backend that is there, and one answer per request."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

import pytest
import torch

import trivium
from tests.inference.toy import Answers
from trivium.base.errors import CapacityError, CheckpointError, ConfigError, NonFiniteError, TriviumError
from trivium.inference import LLM, RequestError, SamplingParams
from trivium.inference.cache import block_bytes
from trivium.inference.outputs import Answer, Output
from trivium.inference.request import Request
from trivium.kernels import build, registry
from trivium.models import Decoder, DecoderConfig
from trivium.models.decoder import Record
from trivium.models.moe_config import MoEConfig
from trivium.moe.routing import Routing

GREEDY = SamplingParams(max_tokens=12, temperature=0.0)
PROMPT = [5, 9, 1, 44, 7, 7, 30, 2, 18, 63, 11, 5, 9, 1, 50, 51, 52, 3, 3, 8]


def decoder(seed: int = 0, moe: bool = False, **changes: object) -> Decoder:
    """A tiny decoder whose attention and experts matter."""
    shape = {"vocabulary": 96, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "max_positions": 160}
    experts = MoEConfig(experts=4, layers=(1,), ffn_dim=24, top_k=2) if moe else None
    model = Decoder(DecoderConfig(**{**shape, "moe": experts, **changes}))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5, generator=draw)
    return model.eval()


@pytest.fixture(scope="module", params=registry.available())
def make(request: pytest.FixtureRequest) -> Callable[..., LLM]:
    """Builds an LLM on one backend; `done` checks its engine when the test ends."""

    def build(model: torch.nn.Module | None = None, **options: object) -> LLM:
        return LLM(decoder() if model is None else model, backend=request.param, threads=1, **options)  # type: ignore[arg-type]

    return build


def done(llm: LLM) -> None:
    llm.engine.check()
    assert llm.engine.idle
    assert llm.stats.blocks_free == llm.stats.blocks_total


@torch.no_grad()
def logits_of(model: Decoder, tokens: list[int]) -> torch.Tensor:
    out = model(torch.tensor([tokens]))
    return (out[0] if isinstance(out, tuple) else out)[0].float()


@pytest.mark.parametrize("moe", [False, True])
def test_logits_and_tokens_are_the_trained_models(make: Callable[..., LLM], moe: bool) -> None:
    model = decoder(moe=moe)
    llm = make(model)
    whole = logits_of(model, PROMPT)
    found = llm.logits(PROMPT)
    assert found.dtype == torch.float32 and found.shape == (len(PROMPT), 96)
    assert float((found - whole).abs().max()) < 2e-5 * float(whole.abs().max())
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    (out,) = llm.generate(PROMPT, GREEDY)
    assert out.token_ids == tokens[len(PROMPT) :]
    assert (out.finish_reason, out.text, out.logprobs) == ("length", "", None)
    done(llm)


def rows_among(llm: LLM, crowd: list[list[int]], asked: SamplingParams) -> tuple[list[int], torch.Tensor]:
    """The tokens answered to PROMPT amid the crowd, and the logits of every position of prompt and answer."""
    prompts = [*crowd[: len(crowd) // 2], PROMPT, *crowd[len(crowd) // 2 :]]
    answers = Answers(llm.engine).run(
        *(
            Request(
                request_id=f"{'mine' if prompt is PROMPT else 'other'}-{i}",
                prompt_token_ids=prompt,
                params=asked,
                collect="logits" if prompt is PROMPT else None,
            )
            for i, prompt in enumerate(prompts)
        )
    )
    mine = f"mine-{len(crowd) // 2}"
    collected = answers.last(mine).collected
    assert collected is not None and collected.logits is not None
    return answers.tokens(mine), collected.logits


@pytest.mark.parametrize("entries", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("moe", [False, True])
def test_one_answer_per_request(make: Callable[..., LLM], moe: bool, entries: str) -> None:
    """Alone, in 2, 8 and 32, in chunks, after a prefix hit, after preemption: tokens, and logits to the bit."""
    model = decoder(moe=moe)
    llm = make(model, cache_dtype=entries)
    if not llm.engine.executor.batch_invariant:
        pytest.skip(f"{llm.engine.executor.name} does not claim it")
    asked = SamplingParams(max_tokens=10, temperature=0.9, seed=4, logprobs=3)
    alone = llm.generate(PROMPT, asked)[0]
    tokens, rows = rows_among(llm, [], asked)
    assert tokens == alone.token_ids and torch.equal(llm.logits(PROMPT), rows[: len(PROMPT)])
    each = block_bytes(llm.model.program.caches, entries, 16)  # type: ignore[arg-type]
    chunked = make(model, cache_dtype=entries, step_tokens=9, max_sequences=8, memory=llm.weight_bytes + 5 * each)
    for batch in (2, 8, 32) if entries == "float32" else (32,):
        crowd = [[(7 * i + j) % 96 for j in range(3 + i % 17)] for i in range(batch - 1)]
        for one in (llm, chunked):
            outs = one.generate([*crowd[: batch // 2], PROMPT, *crowd[batch // 2 :]], asked)
            assert outs[batch // 2].choices == [alone.choices[0]]
            found, amid = rows_among(one, crowd, asked)
            assert found == tokens and torch.equal(amid, rows)
    again = llm.generate(PROMPT, asked)[0]
    assert again.cached_tokens == 16 and again.choices == alone.choices
    assert chunked.stats.preemptions > 0
    for one in (llm, chunked):
        done(one)


@pytest.mark.parametrize(
    ("dtype", "quantize"), [("bfloat16", None), ("float16", None), ("float32", "int8"), ("float32", "int4")]
)
def test_one_answer_per_request_in_every_format(make: Callable[..., LLM], dtype: str, quantize: str | None) -> None:
    model = decoder(moe=True, dim=64)
    llm = make(model, dtype=dtype, quantize=quantize)
    if not llm.engine.executor.batch_invariant:
        pytest.skip(f"{llm.engine.executor.name} does not claim it")
    asked = SamplingParams(max_tokens=10, temperature=0.9, seed=4, logprobs=3)
    alone = llm.generate(PROMPT, asked)[0]
    tokens, rows = rows_among(llm, [], asked)
    each = block_bytes(llm.model.program.caches, llm.engine.cache.dtype, 16)
    chunked = make(
        model, dtype=dtype, quantize=quantize, step_tokens=9, max_sequences=8, memory=llm.weight_bytes + 5 * each
    )
    crowd = [[(7 * i + j) % 96 for j in range(9 + i)] for i in range(7)]
    for one in (llm, chunked):
        assert one.generate([*crowd[:4], PROMPT, *crowd[4:]], asked)[4].choices == [alone.choices[0]]
        found, amid = rows_among(one, crowd, asked)
        assert found == tokens == alone.token_ids and torch.equal(amid, rows)
        done(one)
    assert chunked.stats.preemptions > 0


def test_i11_all_tokens_to_one_expert_and_none_to_others(make: Callable[..., LLM]) -> None:
    model = decoder(moe=True)
    router = next(weight for name, weight in model.named_parameters() if "gate" in name and weight.shape[0] == 4)
    with torch.no_grad():
        router.zero_()  # equal scores: the lower experts, for every token
    llm = make(model)
    whole = logits_of(model, PROMPT)
    assert float((llm.logits(PROMPT) - whole).abs().max()) < 2e-5 * float(whole.abs().max())
    llm.generate([PROMPT, PROMPT[:3]], GREEDY)
    (counts,) = llm.stats.tokens_per_expert
    assert counts[0] > 0 and counts[3] == 0
    done(llm)


def test_i9_a_poisoned_expert_fails_its_requests_alone(make: Callable[..., LLM]) -> None:
    model = decoder(moe=True)
    healthy = make(model).routing(PROMPT)[0][0]
    bad = int(healthy[0, 0])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if f"experts.{bad}." in name or (weight.dim() == 3 and weight.shape[0] == 4):
                (weight if weight.dim() < 3 else weight[bad]).fill_(float("nan"))
    llm = make(model)
    others = [[token] for token in range(96) if bad not in llm.routing([token])[0][0][0].tolist()]
    outs = llm.generate([PROMPT, *others[:4]], SamplingParams(max_tokens=1, temperature=0))
    assert outs[0].finish_reason == "error" and "NaN" in str(outs[0].error)
    assert [out.finish_reason for out in outs[1:]] == ["length"] * 4
    assert llm.stats.finished["error"] == 1
    done(llm)


def test_routing_comes_back_and_can_be_replayed(make: Callable[..., LLM]) -> None:
    model = decoder(moe=True)
    llm = make(model, step_tokens=65)
    routing = llm.routing(PROMPT)
    assert [tuple(experts.shape) for experts, _ in routing] == [(len(PROMPT), 2)]
    chosen = tuple(experts for experts, _ in routing)
    plain = llm.logits(PROMPT)
    assert torch.allclose(llm.logits(PROMPT, routing=chosen), plain, atol=1e-5)
    other = tuple((experts + 1) % 4 for experts in chosen)
    assert not torch.allclose(llm.logits(PROMPT, routing=other), plain, atol=1e-3)
    fresh = make(model, step_tokens=65)
    fresh.logits(PROMPT, routing=other)
    assert fresh.stats.blocks_remembered == 0, "what forced experts computed is nobody else's prefix"
    fresh.logits(PROMPT)
    assert fresh.stats.blocks_remembered > 0
    with pytest.raises(RequestError, match=r"expected 1 layers of \[20, k\]"):
        llm.logits(PROMPT, routing=(chosen[0][:3],))
    strided = torch.stack((other[0], chosen[0]), dim=2)[:, :, 1]
    assert torch.equal(llm.logits(PROMPT, routing=(strided,)), llm.logits(PROMPT, routing=chosen))
    for wrong in (chosen[0].long(), chosen[0] + 99, chosen[0][:, :1]):
        with pytest.raises(TriviumError, match="routing"):
            llm.logits(PROMPT, routing=(wrong,))
    with pytest.raises(RequestError, match="the model has no experts"):
        make().logits(PROMPT, routing=chosen)
    done(llm)


@pytest.mark.parametrize("moe", [False, True])
def test_new_weights_in_place_drop_the_prefix_cache(make: Callable[..., LLM], moe: bool) -> None:
    tied = {"tied": not moe}
    before, after = decoder(0, moe, **tied), decoder(1, moe, **tied)
    llm = make(before)
    old = llm.generate(PROMPT, GREEDY)[0].token_ids
    assert llm.load_weights(after.state_dict().items()) > 0
    out = llm.generate(PROMPT, GREEDY)[0]
    assert out.cached_tokens == 0
    assert out.token_ids == make(after).generate(PROMPT, GREEDY)[0].token_ids != old
    assert torch.equal(llm.logits(PROMPT), make(after).logits(PROMPT))
    with pytest.raises(CheckpointError, match="weight 'nothing' is not one of Decoder's"):
        llm.load_weights([("nothing", torch.zeros(1))])
    name = next(name for name in after.state_dict() if "embed" in name)
    with pytest.raises(CheckpointError, match="new shape"):
        llm.load_weights([(name, torch.zeros(96, 31))])
    whole = (name, after.state_dict()[name])
    for wrong, words in ((torch.zeros(96, 31), "new shape"), (torch.zeros(96, 32).char(), "is int8, expected floats")):
        with pytest.raises(CheckpointError, match=f"{words}.*; some weights have been replaced already"):
            llm.load_weights([whole, (name, wrong)])
    part = next(name for name in after.state_dict() if name.endswith(("q.weight", "wq.weight", "q_proj.weight")))
    with pytest.raises(CheckpointError, match=r"weights that are kept together came apart: [^;]* did not come$"):
        llm.load_weights([(part, after.state_dict()[part])])
    done(llm)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_new_weights_into_a_quantised_model(make: Callable[..., LLM], moe: bool, quantize: str) -> None:
    before, after = decoder(0, moe), decoder(1, moe)
    llm = make(before, quantize=quantize)
    old, size = llm.logits(PROMPT), llm.weight_bytes
    assert llm.load_weights(after.state_dict().items()) > 0
    assert torch.equal(llm.logits(PROMPT), make(after, quantize=quantize).logits(PROMPT))
    assert not torch.equal(llm.logits(PROMPT), old) and llm.weight_bytes == size
    done(llm)


def test_streams_several_at_once_and_closed_early(make: Callable[..., LLM]) -> None:
    llm = make()
    whole = llm.generate(PROMPT, GREEDY)[0].token_ids
    first, second = llm.stream(PROMPT, GREEDY), llm.stream(PROMPT[:3], GREEDY)
    tokens = next(first).token_ids
    next(second)
    second.close()  # type: ignore[attr-defined]
    assert not any(name in llm._inboxes for name in ("llm-2",))
    for delta in first:
        tokens = tokens + delta.token_ids
    assert tokens == whole
    llm.generate([1], GREEDY)
    llm.stream(PROMPT, GREEDY).close()  # type: ignore[attr-defined]
    llm.engine.step()
    done(llm)


def test_prompts_one_or_many_and_params_each(make: Callable[..., LLM]) -> None:
    llm = make()
    assert llm.generate([]) == []
    one, two = llm.generate([[1, 2], (3, 4)], [GREEDY, SamplingParams(max_tokens=3, temperature=0, n=2)])
    assert (len(one.token_ids), [len(choice.token_ids) for choice in two.choices]) == (12, [3, 3])
    assert llm.sampling(max_tokens=3).temperature == 0.0
    for prompts, words in (
        (["text"], "has no tokenizer"),
        ([[1], None], "prompt 1 is a NoneType"),
        ([[]], "no tokens"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate(prompts)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="2 sampling params for 1 prompts"):
        llm.generate([1], [GREEDY, GREEDY])
    done(llm)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block_size": 0}, "block_size=0: expected a whole number of at least 1"),
        ({"block_size": -4}, "block_size=-4"),
        ({"block_size": 1.5}, r"block_size=1\.5"),
        ({"step_tokens": 0}, "step_tokens=0"),
        ({"max_sequences": 0}, "max_sequences=0"),
        ({"max_sequences": 10**9}, "at most 16384"),
        ({"memory": 1.5}, r"memory=1\.5: expected whole bytes, or text such as '8GiB'"),
        ({"memory": True}, "memory=True"),
        ({"max_positions": "x"}, "max_positions='x'"),
        ({"max_positions": True}, "max_positions=True"),
        ({"threads": "x"}, "threads='x'"),
        ({"threads": 0}, "threads=0"),
        ({"speculate": "x"}, "speculate='x': expected True, False or None"),
    ],
)
def test_options_that_are_none(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        LLM(decoder(), **options)  # type: ignore[arg-type]


def test_calls_that_are_none(make: Callable[..., LLM]) -> None:
    llm = make()
    for prompts in (5, None, {"a": 1}, b"ab", torch.tensor([1, 2])):
        with pytest.raises(RequestError, match=f"prompts is a {type(prompts).__name__}: expected text"):
            llm.generate(prompts)  # type: ignore[arg-type]
    for call in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match="params is a dict: expected SamplingParams"):
            call([1, 2], {"max_tokens": 3})  # type: ignore[arg-type]
    assert dict(llm.generate_each([([1], {"max_tokens": 3})]))[0].finish_reason == "error"  # type: ignore[list-item]
    for field, value in (
        ("stop_token_ids", 5), ("stop_token_ids", [True]), ("logit_bias", [1]), ("logit_bias", None), ("echo", "false"),
        ("ignore_eos", "no"), ("include_stop", 1), ("truncate_prompt", None), ("stop", 5), ("seed", 1.5), ("n", True),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=f"{field}=") as raised:
            SamplingParams(**{field: value})  # type: ignore[arg-type]
        assert raised.value.param == field
    done(llm)


def test_what_is_lost_without_native_kernels_is_said_once(monkeypatch, tmp_path, caplog) -> None:
    with caplog.at_level("WARNING", logger="trivium"):
        LLM(decoder(), backend="torch")
        if registry.lost() is None:
            LLM(decoder())
        assert not caplog.records
        monkeypatch.setattr(build, "library", lambda variant, folder=None: tmp_path / "not-built.so")
        LLM(decoder())
        (record,) = caplog.records
        assert record.getMessage() == registry.explain() and "several times slower" in record.getMessage()


def test_a_prompt_of_another_kind_fails_alone(make: Callable[..., LLM]) -> None:
    llm = make()
    asked = [(PROMPT, GREEDY), (7, GREEDY), (None, GREEDY), ({"a": 1}, GREEDY), (PROMPT, GREEDY)]
    found = dict(llm.generate_each(asked))  # type: ignore[arg-type]
    assert [found[index].finish_reason for index in range(5)] == ["length", "error", "error", "error", "length"]
    assert found[1].error == "a prompt is a int: expected text or token ids"
    done(llm)


def test_embeddings(make: Callable[..., LLM]) -> None:
    llm = make()
    mean, last = llm.embed([PROMPT, PROMPT[:2]]), llm.embed(PROMPT, pooling="last")
    assert (mean.shape, last.shape) == ((2, 32), (1, 32))
    assert not torch.allclose(mean[0], last[0], atol=1e-3)
    with pytest.raises(ConfigError, match="pooling='max'"):
        llm.embed(PROMPT, pooling="max")  # type: ignore[arg-type]
    broken = decoder()
    with torch.no_grad():
        next(broken.parameters())[PROMPT[0]] = float("nan")
    with pytest.raises(NonFiniteError, match="prompt 0 are not finite"):
        make(broken).embed(PROMPT)


def test_what_ends_early_is_told_and_not_pooled(make: Callable[..., LLM]) -> None:
    llm = make(step_tokens=65)
    request = llm._collecting(PROMPT * 5, "hidden")
    inbox = llm._deltas([request])
    llm.engine.step()
    llm.engine.cancel(request.request_id)
    (last,) = inbox
    assert (last.finish_reason, last.collected) == ("abort", None)
    output = Output(prompt_token_ids=PROMPT, choices=[Answer()])
    output.add(last)
    with pytest.raises(TriviumError, match=r"ended early \(abort\)"):
        _ = output.whole
    done(llm)


def test_memory_bounds_weights_and_cache(make: Callable[..., LLM]) -> None:
    small = make(memory=10**9)
    weights = small.weight_bytes
    tight = make(memory=weights + 20_000)
    assert tight.meter.live_bytes("cache", "host") <= 20_000
    assert tight.max_positions < small.max_positions == 160
    assert tight.meter.live_bytes("weights", "host") == weights
    with pytest.raises(CapacityError, match="the weights take"):
        make(memory=weights)
    with pytest.raises(ConfigError, match="place and mesh"):
        make(place="disk")
    with pytest.raises(ConfigError, match="cache_dtype='float8'"):
        make(cache_dtype="float8")
    with pytest.raises(ConfigError, match="Linear: expected a folder"):
        make(torch.nn.Linear(2, 2))


def test_speculation_is_bit_equal_with_and_without(make: Callable[..., LLM]) -> None:
    llm, guessing = make(prefix_cache=False), make(prefix_cache=False, speculate=True)
    if not llm.engine.executor.batch_invariant:
        pytest.skip(f"{llm.engine.executor.name} does not claim it")
    params = SamplingParams(max_tokens=60, temperature=0.0, logprobs=1)
    plain, guessed = (one.generate([PROMPT, [1, 2, 1, 2, 1, 2, 1]], params) for one in (llm, guessing))
    assert [out.choices for out in plain] == [out.choices for out in guessed]
    assert guessing.stats.drafted_tokens > 0
    done(guessing)


def test_a_long_step_does_not_hold_the_interpreter(make: Callable[..., LLM]) -> None:
    """In one step of several at least this thread never waits half of it; a step that holds the lock is waited out."""
    llm = make(decoder(dim=512, ffn_dim=2048, layers=4, heads=8), max_sequences=2, step_tokens=150)
    run, steps = llm.engine.executor.run, []

    def timed(*arguments: object) -> object:
        started = time.perf_counter()
        try:
            return run(*arguments)  # type: ignore[arg-type]
        finally:
            steps.append((started, time.perf_counter()))

    llm.engine.executor.run = timed  # type: ignore[method-assign,assignment]
    thread = llm.serve()
    prompts = [[(7 * i + j) % 96 for j in range(150)] for i in range(8)]
    caller = threading.Thread(target=llm.generate, args=(prompts, SamplingParams(max_tokens=1, temperature=0)))
    ticks = [time.perf_counter()]
    caller.start()
    while caller.is_alive():
        time.sleep(0)
        ticks.append(time.perf_counter())
    thread.close()
    shares = []
    for start, end in steps:
        inside = [start, *(tick for tick in ticks if start < tick < end), end]
        shares.append(max(later - earlier for earlier, later in itertools.pairwise(inside)) / (end - start))
    assert len(shares) >= 8
    assert min(shares) < 0.5, f"longest wait by step, as a share of the step: {[round(one, 2) for one in shares]}"


def test_on_a_thread_callers_go_on(make: Callable[..., LLM]) -> None:
    llm = make(decoder(dim=192, ffn_dim=512, layers=3, heads=8))
    alone = llm.generate(PROMPT, GREEDY)[0].token_ids
    thread = llm.serve()
    assert llm.serve() is thread and thread.alive
    answers: list[list[int]] = []
    callers = [
        threading.Thread(target=lambda: answers.append(llm.generate(PROMPT, GREEDY)[0].token_ids)) for _ in range(6)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert answers == [alone] * 6
    llm.load_weights(decoder(1, dim=192, ffn_dim=512, layers=3, heads=8).state_dict().items())
    assert llm.generate(PROMPT, GREEDY)[0].token_ids != alone
    thread.close()
    assert not thread.alive
    llm.engine.check()


def test_the_room_has_the_public_names() -> None:
    assert trivium.inference.LLM is LLM
    assert {"LLM", "SamplingParams", "Engine", "EngineThread"} <= set(trivium.inference.__all__)


@torch.no_grad()
def test_trainer_and_engine_agree_on_log_probabilities_and_replay_each_others_routing(
    make: Callable[..., LLM],
) -> None:
    model = decoder(moe=True)
    llm = make(model)
    tokens = torch.tensor([PROMPT])
    record = Record()
    wanted = torch.log_softmax(model(tokens, record=record)[0], dim=-1)
    trained = record.aux[1].routing
    assert torch.equal(trained.experts_TK.int().sort(dim=1).values, llm.routing(PROMPT)[0][0].sort(dim=1).values)
    for routing in (None, (trained.experts_TK.int(),)):
        found = torch.log_softmax(llm.logits(PROMPT, routing=routing), dim=-1)
        assert float((found - wanted).abs().max()) < 1e-4
    other = (trained.experts_TK + 1) % 4
    replayed = Routing(
        experts_TK=other, weights_TK=trained.weights_TK, kept_TK=torch.ones_like(other, dtype=torch.bool)
    )
    wanted = torch.log_softmax(model(tokens, routings={1: replayed})[0], dim=-1)
    found = torch.log_softmax(llm.logits(PROMPT, routing=(other.int(),)), dim=-1)
    assert float((found - wanted).abs().max()) < 1e-4


@pytest.mark.parametrize("backend", registry.available())
def test_no_threads_and_no_sequences_are_told_before_anything_is_taken(backend: str) -> None:
    with pytest.raises(ConfigError, match="max_sequences=0: expected a whole number of at least 1"):
        LLM(decoder(), backend=backend, max_sequences=0)
    with pytest.raises(ConfigError, match="max_sequences=256 and step_tokens=256"):
        LLM(decoder(), backend=backend, max_sequences=256)
    with pytest.raises(ConfigError, match="threads=0: expected a whole number of at least 1"):
        LLM(decoder(), backend=backend, threads=0)
