"""Answer requests: a scheduler in integers, paged caches, a sampler, and the engine that runs them as one loop.

DeepSpeed Inference section 3.1.
"""

from __future__ import annotations

from trivium.inference.request import (
    Constraint,
    ContextLengthError,
    Delta,
    Request,
    RequestError,
    SamplingParams,
    TokenLogprobs,
)

__all__ = [
    "Constraint",
    "ContextLengthError",
    "Delta",
    "Request",
    "RequestError",
    "SamplingParams",
    "TokenLogprobs",
]
