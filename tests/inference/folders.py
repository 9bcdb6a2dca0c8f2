"""A tiny model in a folder with a byte-level tokenizer and a chat template, as `trivium train` would leave it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

import trivium
from trivium.models import Decoder, DecoderConfig

TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTROL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")


def tokenizer_json() -> str:
    """One token per byte, and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(list(CONTROL))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return str(backend.to_str())


def decoder(seed: int = 0, **changes: object) -> Decoder:
    shape = {"vocabulary": 260, "dim": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn_dim": 48, "max_positions": 160}
    model = Decoder(DecoderConfig(**{**shape, **changes}))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 1.0 if "embed" in name else 1.5 * weight.shape[-1] ** -0.5, generator=draw)
    return model.eval()


def folder(where: Path, *, chat: bool = True, text: bool = True, endless: bool = False, **changes: object) -> Path:
    """A checkpoint; without ``text`` it has no tokenizer, without ``chat`` no template.

    ``endless``: (with ``tied=False``) it writes no control token, and so never ends an answer.
    """
    model = decoder(**changes)
    if endless:
        assert model.head is not None
        with torch.no_grad():
            model.head.weight.mul_(8)[-len(CONTROL) :].zero_()  # e⁻³⁰ beside the likeliest bytes
    where.mkdir(parents=True, exist_ok=True)
    trivium.checkpoint.save(where / "step-00000001", model=model, extra={"model": dataclasses.asdict(model.config)})
    if text:
        (where / "tokenizer.json").write_text(tokenizer_json())
        config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
        (where / "tokenizer_config.json").write_text(
            json.dumps({**config, **({"chat_template": TEMPLATE} if chat else {})})
        )
    return where / "step-00000001"
