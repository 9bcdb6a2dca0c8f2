"""Log-probabilities as OpenAI lays them out: by content for chats, in parallel lists for completions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from trivium.inference import TokenLogprobs

TokenBytes = Callable[[int], bytes]
_LOWEST = -9999.0


def chat_logprobs(entries: Sequence[TokenLogprobs], token_bytes: TokenBytes, top: int) -> dict[str, Any]:
    """``{"content": [{"token", "logprob", "bytes", "top_logprobs"}], "refusal": None}``."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(token_id)
        return {"token": _text(raw), "logprob": _finite(logprob), "bytes": list(raw)}

    content = [
        one(entry.token_id, entry.logprob) | {"top_logprobs": [one(*pair) for pair in entry.top[:top]]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprobs | None], token_ids: Sequence[int], token_bytes: TokenBytes, top: int, offset: int
) -> dict[str, Any]:
    """The four lists; ``offset`` is where the first token's text begins. A first prompt token has no probability."""
    tokens, offsets = [], []
    for token_id in token_ids:
        text = _text(token_bytes(token_id))
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": [None if entry is None else _finite(entry.logprob) for entry in entries],
        "top_logprobs": [None if entry is None else _top(entry, token_bytes, top) for entry in entries],
        "text_offset": offsets,
    }


def _top(entry: TokenLogprobs, token_bytes: TokenBytes, top: int) -> dict[str, float]:
    pairs = [*entry.top[:top], (entry.token_id, entry.logprob)]
    found: dict[str, float] = {}
    for token_id, logprob in pairs:
        found.setdefault(_text(token_bytes(token_id)), _finite(logprob))
    return found


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", errors="replace")


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _LOWEST
