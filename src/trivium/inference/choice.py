"""One choice of a request while it is answered: its draws, its text, and where it ends.

DeepSpeed Inference section 3.1. V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as Ordered
from dataclasses import dataclass, field

import torch

from trivium.inference.request import Collected, Constraint, Delta, FinishReason, Request, TokenLogprobs
from trivium.inference.sampler import Draw, Drawer, Drawn
from trivium.inference.scheduler import Sequence
from trivium.inference.speculate import Guesser
from trivium.inference.stream import Decoder, Detokenizer, StopFinder


@dataclass(eq=False, kw_only=True)
class Choice:
    """What the engine keeps per choice; ``end_ids`` are the tokens that end it, ``fault`` is why it has to fail."""

    request: Request
    sequence: Sequence
    drawer: Drawer
    end_ids: frozenset[int]
    constraint: Constraint | None = None
    detokenizer: Detokenizer | None = None
    stops: StopFinder
    head: str = ""
    guesser: Guesser | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    fault: str | None = None
    rows: list[torch.Tensor] = field(default_factory=list)
    routing: list[tuple[tuple[torch.Tensor, torch.Tensor], ...]] = field(default_factory=list)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.sequence.tokens) - self.sequence.num_prompt

    def draw(self, ahead: int = 0) -> Draw:
        """What is wanted of the row that follows the newest token and ``ahead`` drafts."""
        index = self.num_generated + ahead
        banned = tuple(self.end_ids) if index < self.request.params.min_tokens else ()
        return Draw(self.drawer, index, banned, self._allowed())

    def inherit(self, leader: Choice) -> None:
        """What the leader found while it computed their common prompt."""
        self.prompt_logprobs, self.fault = leader.prompt_logprobs, leader.fault

    def take(self, drawn: Ordered[Drawn], index: int) -> tuple[Delta, list[int]]:
        """The delta for the tokens drawn from the ``index``-th on, and those that count: none follows an end."""
        text, tokens = "", []
        logprobs: list[TokenLogprobs] | None = None if self.request.params.logprobs is None else []
        reason: FinishReason | None = None
        stop: str | int | None = None
        for draw in drawn:
            tokens.append(draw.token_id)
            if logprobs is not None and draw.logprobs is not None:
                logprobs.append(draw.logprobs)
            self.drawer.said(draw.token_id)
            try:
                piece, reason, stop = self._say(draw.token_id, index)
            except Exception as error:  # whatever a constraint raises is its own request's affair
                self.fault = f"the constraint failed: {error!r}"
                break
            text += piece
            index += 1
            if reason is not None:
                break
        return self.delta(text, tokens, logprobs=logprobs, reason=reason, stop=stop), tokens

    def delta(
        self,
        text: str,
        tokens: list[int],
        *,
        logprobs: list[TokenLogprobs] | None = None,
        reason: FinishReason | None = None,
        error: str | None = None,
        stop: str | int | None = None,
    ) -> Delta:
        """A delta of this choice; the first one brings the echo and the prompt's log-probabilities along."""
        head, self.head = self.head, ""
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        whole = reason in ("stop", "length")
        return Delta(
            request_id=self.request.request_id,
            choice=self.sequence.choice,
            text=head + text,
            token_ids=tokens,
            logprobs=logprobs,
            finish_reason=reason,
            error=error,
            prompt_tokens=self.sequence.num_prompt,
            cached_tokens=self.sequence.num_cached,
            prompt_logprobs=prompt_logprobs,
            collected=self._collected() if whole and self.request.collect is not None else None,
            stop=stop,
        )

    def _allowed(self) -> torch.Tensor | None:
        try:
            return None if self.constraint is None else self.constraint.allowed()
        except Exception as error:
            self.fault = f"the constraint failed: {error!r}"
            return None

    def _say(self, token: int, index: int) -> tuple[str, FinishReason | None, str | int | None]:
        """Text that ``token`` lets out, and whether the answer ends with it."""
        params = self.request.params
        if token in self.end_ids and index >= params.min_tokens:
            shown = self._push([token], index) if params.include_stop else ("", None)
            return shown[0] + self._flush()[0], "stop", token
        if self.constraint is not None:
            self.constraint.accept(token)
        text, stop = self._push([token], index)
        if stop is not None:
            return text, "stop", stop
        complete = self.constraint is not None and self.constraint.finished()
        full = self.sequence.num_prompt + index + 1 >= self.sequence.max_tokens
        if not (complete or full):
            return text, None, None
        rest, stop = self._flush()
        return text + rest, "stop" if complete or stop is not None else "length", stop

    def _push(self, tokens: list[int], index: int) -> tuple[str, str | None]:
        if self.detokenizer is None:
            return "", None
        text = self.detokenizer.push(tokens)
        if index < self.request.params.min_tokens:
            return self.stops.pass_over(text), None
        return self.stops.push(text)

    def _flush(self) -> tuple[str, str | None]:
        if self.detokenizer is None:
            return "", None
        text, stop = self.stops.push(self.detokenizer.flush())
        return (text, stop) if stop is not None else (text + self.stops.flush(), None)

    def _collected(self) -> Collected:
        if self.request.collect == "routing":
            layers = zip(*self.routing, strict=True)
            return Collected(
                routing=tuple(
                    (torch.cat([experts for experts, _ in layer]), torch.cat([weights for _, weights in layer]))
                    for layer in layers
                )
            )
        rows = torch.cat(self.rows) if self.rows else None
        return Collected(logits=rows) if self.request.collect == "logits" else Collected(hidden=rows)


def new_choice(
    request: Request,
    sequence: Sequence,
    *,
    seed: int,
    eos_ids: frozenset[int],
    decoder: Decoder | None,
    guesser: Guesser | None,
) -> Choice:
    """A choice at its beginning."""
    params = request.params
    prompt = request.prompt_token_ids
    plain = request.constraint is None and not params.penalised and not params.logit_bias
    return Choice(
        request=request,
        sequence=sequence,
        drawer=Drawer(params, seed=seed, choice=sequence.choice, prompt=prompt),
        end_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids),
        constraint=None if request.constraint is None else request.constraint.fork(),
        detokenizer=None if decoder is None else Detokenizer(decoder, prompt),
        stops=StopFinder(params.stop, include=params.include_stop),
        head=decoder.decode(list(prompt)) if params.echo and decoder is not None else "",
        guesser=guesser if plain and params.min_tokens == 0 and request.collect is None else None,
        prompt_logprobs=None if params.prompt_logprobs is None else [None],
    )
