"""Is it alive, is it ready, and what is it doing: ``/livez``, ``/readyz``, ``/metrics``, ``/v1/status``.

Ready means that a token came lately, or that one comes when asked for; nothing else counts.
"""

from __future__ import annotations

import asyncio
import time

from trivium.inference import Request, SamplingParams
from trivium.serve.errors import ApiError
from trivium.serve.exchange import Exchange
from trivium.serve.service import Service

_FRESH_S = 0.4
_PROBE_S = 1.2
_RATE_S = 5.0
_READY = "Whether the model is loaded, its engine runs, and the server is not stopping."


class Health:
    """What is known of the engine's health, and how fast it is."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._probe: asyncio.Task[bool] | None = None
        self._marks: list[tuple[float, int]] = []

    async def livez(self, service: Service, exchange: Exchange) -> None:
        """The process answers."""
        await exchange.reply_json({"status": "alive"})

    async def readyz(self, service: Service, exchange: Exchange) -> None:
        """200 only where tokens come. Raises ApiError 503 otherwise."""
        served, bridge = service.ready(), service.bridge
        if not served.engine.alive:
            raise ApiError(503, "engine_stopped", "the engine has stopped")
        if time.monotonic() - bridge.last_token_s > _FRESH_S:
            if self._probe is None or self._probe.done():
                self._probe = asyncio.create_task(bridge.probe(_PROBE_S, _one_token))
            if not await asyncio.shield(self._probe):
                raise ApiError(503, "no_token", f"no token within {_PROBE_S:g} s", headers={"Retry-After": "2"})
        await exchange.reply_json({"status": "ready"})

    async def metrics(self, service: Service, exchange: Exchange) -> None:
        """Prometheus' text."""
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        await exchange.reply(200, service.metrics.text(), kind)

    async def status(self, service: Service, exchange: Exchange) -> None:
        """What the page's panel shows."""
        served = service.ready()
        stats = served.engine.stats
        experts = [list(layer) for layer in stats.tokens_per_expert] or None
        used = 1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0
        await exchange.reply_json(
            {
                "model": served.name,
                "running": stats.running,
                "waiting": stats.waiting,
                "cache_usage": round(min(max(used, 0.0), 1.0), 4),
                "tokens_per_s": round(self.rate(), 2),
                "experts": experts,
            }
        )

    def mark(self) -> None:
        """Remember how many tokens there were by now; called a few times per second."""
        if self._service.loaded:
            self._marks.append((time.monotonic(), self._service.bridge.tokens_total))
            while len(self._marks) > 2 and self._marks[1][0] < time.monotonic() - _RATE_S:
                del self._marks[0]

    def rate(self) -> float:
        """Tokens per second over the last few seconds."""
        if not self._marks:
            return 0.0
        since_s, before = self._marks[0]
        return (self._service.bridge.tokens_total - before) / max(time.monotonic() - since_s, 0.25)

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What Prometheus is told of this moment."""
        if self._service.served is None:
            return {"trivium_ready": (_READY, 0.0)}
        stats = self._service.served.engine.stats
        used = 1 - stats.blocks_free / stats.blocks_total if stats.blocks_total else 0.0
        return {
            "trivium_ready": (_READY, float(self._service.able)),
            "trivium_num_requests_running": ("Choices that are being computed.", float(stats.running)),
            "trivium_num_requests_waiting": ("Choices that wait.", float(stats.waiting)),
            "trivium_num_requests_admitted": ("Choices admitted by the server.", float(self._service.bridge.active)),
            "trivium_kv_cache_usage_perc": ("Part of the cache that is held, 0 to 1.", used),
            "trivium_kv_cache_blocks_free": ("Blocks that nothing holds.", float(stats.blocks_free)),
            "trivium_num_preemptions": ("Preemptions so far.", float(stats.preemptions)),
            "trivium_tokens_per_second": ("Over the last seconds.", self.rate()),
        }

    def experts(self) -> object:
        """Tokens per expert and MoE layer."""
        if self._service.served is None:
            return None
        return [list(layer) for layer in self._service.served.engine.stats.tokens_per_expert]


def _one_token(name: str) -> Request:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    return Request(request_id=name, prompt_token_ids=[0], params=params)
