"""The caps of the server: what one client may take of it. Every cap is a flag of ``trivium serve``."""

from __future__ import annotations

from dataclasses import dataclass, fields

from trivium.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Caps with their defaults; sizes in bytes, times in seconds. All are positive."""

    body_bytes: int = 2 << 20
    header_bytes: int = 16 << 10
    header_count: int = 64
    json_depth: int = 32
    json_items: int = 20_000
    messages: int = 256
    prompts: int = 64
    choices: int = 8
    stops: int = 8
    stop_chars: int = 64
    logit_bias: int = 1024
    top_logprobs: int = 20
    tools: int = 128
    grammar_bytes: int = 64 << 10
    grammar_s: float = 0.2
    header_s: float = 10.0
    body_s: float = 30.0
    idle_s: float = 15.0
    stall_s: float = 30.0
    drain_s: float = 30.0
    step_s: float = 60.0
    connections: int = 512
    queue: int = 64
    per_key: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            low = 0 if field.name in ("drain_s", "queue") else 1e-3 if field.name.endswith("_s") else 1
            if not low <= value <= 1 << 40:
                raise ConfigError(f"limits.{field.name}={value}: expected {low:g} or more")
