"""What the server counts, under the names the field uses; every label is one of a fixed few."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

FINISH_REASONS = ("stop", "length", "tool_calls", "abort", "error")
# The code that a client is told, and the label of what kept it out; any other code of a 429 or 503 is its own label.
REJECTIONS = {
    "queue_full": "queue",
    "concurrency_limit_exceeded": "per_key",
    "grammar_workers_busy": "grammar_workers",
    "grammar_worker_killed": "grammar_worker_killed",
    "grammar_worker_failed": "grammar_worker_failed",
    "shutting_down": "shutting_down",
    "model_loading": "loading",
    "engine_stopped": "engine_stopped",
}
_FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_NEXT_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
_WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)
_TOKENS = (1, 8, 32, 128, 512, 2048, 8192, 32768)


class Metrics:
    """One registry per server; counters are touched on the event loop only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.prompt_tokens = Counter("trivium_prompt_tokens", "Prompt tokens taken.", registry=r)
        self.cached_tokens = Counter("trivium_prompt_tokens_cached", "Prompt tokens found in the cache.", registry=r)
        self.tokens = TokenTally()
        r.register(self.tokens)
        self.first_token = Histogram(
            "trivium_time_to_first_token_seconds", "From arrival to first token.", buckets=_FIRST_TOKEN_S, registry=r
        )
        self.whole = Histogram(
            "trivium_e2e_request_latency_seconds", "From arrival to the end.", buckets=_WHOLE_S, registry=r
        )
        self.prompt_size = Histogram("trivium_request_prompt_tokens", "Prompt sizes.", buckets=_TOKENS, registry=r)
        self.answer_size = Histogram("trivium_request_generation_tokens", "Answer sizes.", buckets=_TOKENS, registry=r)
        self.finished = Counter(
            "trivium_request_success",
            "Choices by how they ended, as clients are told.",
            ["finished_reason"],
            registry=r,
        )
        self.rejected = Counter("trivium_requests_rejected", "Requests answered 429 or 503.", ["reason"], registry=r)
        self.refused = Counter("trivium_connections_refused", "Connections ended by a cap.", ["reason"], registry=r)
        self.answered = Counter("trivium_http_requests", "Answers by status class.", ["status"], registry=r)
        self.cancelled = Counter("trivium_requests_cancelled", "Requests whose client went away.", registry=r)
        for reason in FINISH_REASONS:
            self.finished.labels(reason)
        for reason in REJECTIONS.values():
            self.rejected.labels(reason)

    def watch(self, gauges: Callable[[], dict[str, tuple[str, float]]], experts: Callable[[], object]) -> None:
        """Read ``gauges`` (name → help, value) and the tokens per expert whenever the metrics are asked for."""
        self.registry.register(_Live(gauges, experts))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class TokenTally(Collector):
    """What is counted for every token, in plain integers: a histogram object would cost as much as the token."""

    def __init__(self) -> None:
        self.generated = 0
        self._counts = [0] * (len(_NEXT_TOKEN_S) + 1)
        self._sum_s = 0.0

    def gap(self, seconds: float) -> None:
        """The time from one token to the next."""
        self._counts[bisect.bisect_left(_NEXT_TOKEN_S, seconds)] += 1
        self._sum_s += seconds

    def collect(self) -> Iterable[Metric]:
        """The counter and the histogram."""
        yield CounterMetricFamily("trivium_generation_tokens", "Tokens generated.", value=self.generated)
        edges = [*map(str, _NEXT_TOKEN_S), "+Inf"]
        buckets = list(zip(edges, itertools.accumulate(self._counts), strict=True))
        name = "trivium_inter_token_latency_seconds"
        yield HistogramMetricFamily(name, "From a token to the next.", buckets=buckets, sum_value=self._sum_s)


class _Live(Collector):
    def __init__(self, gauges: Callable[[], dict[str, tuple[str, float]]], experts: Callable[[], object]) -> None:
        self._gauges = gauges
        self._experts = experts

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, (about, value) in self._gauges().items():
            yield GaugeMetricFamily(name, about, value=value)
        layers = self._experts()
        if isinstance(layers, list):
            family = GaugeMetricFamily("trivium_expert_tokens", "Tokens per expert.", labels=["layer", "expert"])
            for layer, counts in enumerate(layers):
                for expert, tokens in enumerate(counts):
                    family.add_metric([str(layer), str(expert)], float(tokens))
            yield family
