"""The models that the inference bench runs: shapes alone, with random weights written as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trivium.base.errors import SetupError

_LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 32000, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": _LLAMA
    | {
        "hidden_size": 1024,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "intermediate_size": 2816,
        "max_position_embeddings": 2048,
    },
    "1.1b": _LLAMA
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
    },
    "8b": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 2048,
    },
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "moe": {
        "model_type": "olmoe",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "intermediate_size": 512,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "tiny": _LLAMA
    | {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 160,
        "max_position_embeddings": 1024,
    },
}


def write_folder(shape: str, folder: Path) -> int:
    """config.json and one bf16 safetensors file, the weights random; returns their number.

    Raises:
        SetupError: transformers, which makes them, is not installed.
    """
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise SetupError("trivium bench inference needs transformers: pip install 'trivium[bench]'") from error
    torch.manual_seed(0)
    entries = dict(SHAPES[shape])
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.to(torch.bfloat16).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
