"""The model that is being served, as the server sees it: an engine on a thread of its own, and a way to read text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from trivium.inference import Delta, Request

if TYPE_CHECKING:
    from trivium.serve.grammar import Grammars


class Stats(Protocol):
    """What is read of the engine's counts (see `trivium.inference.stats.EngineStats`)."""

    @property
    def running(self) -> int:
        """Choices that are being computed."""

    @property
    def waiting(self) -> int:
        """Choices that wait for a place."""

    @property
    def blocks_total(self) -> int:
        """Blocks of the cache."""

    @property
    def blocks_free(self) -> int:
        """Blocks that nothing holds."""

    @property
    def preemptions(self) -> int:
        """Times that a choice gave its blocks away and began again."""

    @property
    def tokens_per_expert(self) -> tuple[tuple[int, ...], ...]:
        """Per MoE layer, tokens per expert."""


class Engine(Protocol):
    """`trivium.inference` on a thread of its own; every method may be called from any thread."""

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""

    @property
    def last_step_s(self) -> float:
        """When it last made progress, on the monotonic clock."""

    @property
    def stats(self) -> Stats:
        """Counts as of the last step."""

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> None:
        """Queue a request; ``on_delta`` is called on the engine's thread."""

    def cancel(self, request_id: str) -> None:
        """End a request soon."""

    def close(self, drain_s: float = 0) -> None:
        """Stop the thread."""


class Tokenizer(Protocol):
    """Text to token ids and back; plain text never becomes a control token."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of plain text; ``special``: with what the model expects at its beginning."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, control tokens left out."""

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        prompt: bool,
        continue_final_message: bool,
    ) -> list[int]:
        """A chat by the model's template; ``prompt``: up to where the assistant begins.

        ``continue_final_message``: up to the end of the last content instead.
        """


@dataclass(frozen=True, kw_only=True)
class Served:
    """One model, ready. ``slots`` choices run at once. ``template`` is the chat template's text, where there is one.

    ``special``: control tokens and their ids. ``token_bytes``: what a token stands for. ``longest_token``: in bytes.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer | None
    max_positions: int
    vocabulary: int
    slots: int
    longest_token: int = 256
    template: str | None = None
    special: Mapping[str, int] | None = None
    token_bytes: Callable[[int], bytes] | None = None
    grammars: Grammars | None = None
