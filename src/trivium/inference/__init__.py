"""Answer requests: a scheduler in integers, paged caches, a sampler, and the engine that runs them as one loop.

DeepSpeed Inference section 3.1.
"""

from __future__ import annotations

from trivium.inference.engine import Engine, EngineConfig
from trivium.inference.llm import LLM
from trivium.inference.outputs import Answer, Output
from trivium.inference.request import (
    Constraint,
    ContextLengthError,
    Delta,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)
from trivium.inference.stats import EngineStats
from trivium.inference.thread import EngineThread

__all__ = [
    "LLM",
    "Answer",
    "Constraint",
    "ContextLengthError",
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "EngineThread",
    "Output",
    "Request",
    "RequestError",
    "SamplingParams",
    "TokenLogprobs",
]
