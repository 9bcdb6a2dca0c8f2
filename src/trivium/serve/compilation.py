"""What llguidance makes of a grammar over a vocabulary; without torch, for a process that only compiles."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import llguidance

Kind = Literal["json_schema", "regex", "lark"]


class _Tokens:
    """A vocabulary as llguidance asks for it; grammars match bytes, so text need not be read as the model would."""

    def __init__(self, pieces: Sequence[bytes], control_ids: Sequence[int], end_ids: Sequence[int]) -> None:
        self.eos_token_id = end_ids[0]
        self.bos_token_id: int | None = None
        self.special_token_ids = list(control_ids)
        self.tokens = list(pieces)
        self._single = {piece: number for number, piece in enumerate(self.tokens) if len(piece) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        raw = text.encode() if isinstance(text, str) else text
        found: list[int] = []
        for byte in raw:
            token = self._single.get(bytes([byte]))
            if token is None:  # what follows a byte without a token cannot be said either
                break
            found.append(token)
        return found


def vocabulary(pieces: Sequence[bytes], control_ids: Sequence[int], end_ids: Sequence[int]) -> llguidance.LLTokenizer:
    """The vocabulary of ``pieces``, every token's bytes by id. Raises ValueError, RuntimeError or TypeError."""
    tokens = llguidance.TokenizerWrapper(_Tokens(pieces, control_ids, end_ids))
    return llguidance.LLTokenizer(tokens, eos_token=list(end_ids))


def compiled(tokens: llguidance.LLTokenizer, kind: Kind, source: str) -> llguidance.LLMatcher:
    """The matcher of a grammar, its first mask computed. Raises ValueError with what is wrong, in one line."""
    limits = llguidance.LLParserLimits(verbose_errors=False)
    try:
        matcher = llguidance.LLMatcher(tokens, _lark(kind, source), log_level=0, limits=limits)
    except ValueError as error:
        raise ValueError(told(str(error))) from None
    if not matcher.is_error():
        matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(told(matcher.get_error()))
    return matcher


def told(error: str) -> str:
    """llguidance's message for people: in one line, without the state that follows it."""
    if "NoExtensionBias" in error or "; forced bytes: " in error:
        return "no token of the model can follow"
    return " ".join(error.partition("<state>")[0].split())[:300] or "llguidance does not say why"


def with_layout(schema: dict[str, Any]) -> dict[str, Any]:
    """``schema`` with our layout of JSON, whatever it asked for.

    Free white space would let a model write blanks for ever; this much lets it indent.
    """
    return {**schema, "x-guidance": {"whitespace_pattern": r"[ \n]{0,16}"}}


def _lark(kind: Kind, source: str) -> str:
    if kind == "json_schema":
        return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(with_layout(json.loads(source))))
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(source)
    return llguidance.LLMatcher.grammar_from_lark(source)
