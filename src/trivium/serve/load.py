"""Make a `trivium.inference.LLM` ready to be served: its engine on a thread, its vocabulary for grammars."""

from __future__ import annotations

from typing import Any

from trivium.inference.llm import LLM
from trivium.serve.grammar import Grammars
from trivium.serve.limits import Limits
from trivium.serve.served import Served


def serve_model(llm: LLM, name: str, limits: Limits) -> Served:
    """``llm`` as the server takes it; from now on its engine has a thread of its own."""
    tokenizer = llm.tokenizer
    end_ids = sorted(llm.model.generation.eos_token_ids)
    words: list[bytes] = []
    grammars = None
    if tokenizer is not None:
        words = [tokenizer.token_bytes(number) for number in range(tokenizer.vocabulary)]
        if end_ids:
            grammars = Grammars(
                words, control=tokenizer.control, end_ids=end_ids, width=llm.vocabulary, limit_s=limits.grammar_s
            )
    template: Any = None if tokenizer is None else tokenizer.template
    names = {} if tokenizer is None else {number: text.encode() for text, number in tokenizer.control.items()}
    return Served(
        name=name,
        engine=llm.serve(),
        tokenizer=tokenizer,
        max_positions=llm.max_positions,
        vocabulary=llm.vocabulary,
        slots=llm.engine.config.max_sequences,
        longest_token=max(map(len, words), default=1),
        template=None if template is None else template.text,
        special={} if tokenizer is None else tokenizer.control,
        token_bytes=lambda number: names.get(number) or (words[number] if number < len(words) else b""),
        grammars=grammars,
    )
