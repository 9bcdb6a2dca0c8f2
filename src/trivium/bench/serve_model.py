"""A small model with random weights, written as a folder that can be served: what the benchmark brings with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trivium import checkpoint
from trivium.models import Decoder, DecoderConfig
from trivium.models.families import LLAMA
from trivium.train.data.tokenizer import Tokenizer

CONFIG = DecoderConfig(vocabulary=512, dim=256, layers=8, heads=8, kv_heads=4, ffn_dim=768, max_positions=512)
_TEXT = "the river carries a stone and the light of the paper garden, seven winters of music; copper, signal, harbor. "
TEXTS = (_TEXT, _TEXT.upper(), '{"name": "Anna", "age": 7}\n')


def write(path: Path, config: DecoderConfig = CONFIG, texts: Sequence[str] = TEXTS, words: int | None = None) -> int:
    """Write the model and a tokenizer of bytes and frequent pairs of ``texts``, with at most ``words`` words (default:
    as many as the model has rows); how many parameters the model has."""
    tokenizer = Tokenizer.train(texts, vocabulary=config.vocabulary if words is None else words)
    model = Decoder(config)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5, generator=draw)
    theirs = LLAMA.to_hugging_face(config, dtype="float32") | {"eos_token_id": tokenizer.end_id}
    checkpoint.save_hugging_face(model, path, config=theirs, names=LLAMA.to_theirs)
    tokenizer.save(path)
    return sum(weight.numel() for weight in model.parameters())
