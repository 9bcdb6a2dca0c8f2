"""Tiny transformers models with weights that make every part matter, and running a program without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trivium.inference import weights
from trivium.kernels import registry
from trivium.kernels.program import Batch, Cache, Output

BLOCK = 16


def randomise(model: torch.nn.Module, seed: int = 0, spread: float = 1.0) -> None:
    """Weights large enough that attention is uneven, caps bend and activations curve; norms and biases not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or "inv_freq" in name or name.endswith("embed_positions"):
                continue
            if name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1, generator=generator)
            elif tensor.dim() >= 2 and "norm" not in name:
                fan_in = tensor.shape[-1]
                std = spread * 1.5 * fan_in**-0.5
                tensor.normal_(0, 1.0 if "emb" in name or "wte" in name else std, generator=generator)
            elif "weight" in name and ("norm" in name or "ln" in name):
                tensor.normal_(0.0 if bool((tensor == 0).all()) else 1.0, 0.2, generator=generator)
            elif "scale" in name or tensor.dim() == 0:
                continue
            else:
                tensor.normal_(0, 0.3, generator=generator)


def save(model: Any, folder: Path, **options: Any) -> Path:
    """As a user would: save_pretrained."""
    model.save_pretrained(folder, **options)
    return folder


class Runner:
    """A program on an executor, one request at a time, blocks handed out in order."""

    def __init__(self, loaded: weights.LoadedModel, positions: int = 640, backend: str = "torch") -> None:
        self.loaded = loaded
        self.executor = registry.executor(loaded.program, backend=backend)
        blocks = -(-positions // BLOCK)
        self.table = torch.arange(blocks, dtype=torch.int32).flip(0)[None].contiguous()
        self.caches = empty_caches(loaded, blocks)

    def step(self, tokens: list[int], start: int, rows: list[int], routing: Any = None) -> Output:
        count = len(tokens)
        return self.executor.run(
            Batch(
                token_ids=torch.tensor(tokens, dtype=torch.int32),
                positions=torch.arange(start, start + count, dtype=torch.int32),
                sequences=torch.zeros(count, dtype=torch.int32),
                block_tables=self.table,
                output_rows=torch.tensor(rows, dtype=torch.int32),
                routing=routing,
            ),
            self.caches,
        )

    def logits(self, tokens: list[int], chunk: int | None = None) -> torch.Tensor:
        """[T, V] of every position, in chunks of ``chunk`` tokens."""
        chunk = len(tokens) if chunk is None else chunk
        parts = []
        for start in range(0, len(tokens), chunk):
            piece = tokens[start : start + chunk]
            parts.append(self.step(piece, start, list(range(len(piece)))).logits)
        return torch.cat(parts)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """``count`` tokens after ``prompt``, each the most likely one."""
        return self.greedy_batch([prompt], count)[0]

    def greedy_batch(self, prompts: list[list[int]], count: int) -> list[list[int]]:
        """The same for several prompts in one batch."""
        return self.greedy_logits(prompts, count).argmax(2).T.tolist()

    def greedy_logits(self, prompts: list[list[int]], count: int) -> torch.Tensor:
        """[count, R, V] of R prompts in one batch: prefills side by side, then the likeliest token of each per step."""
        blocks = [-(-(len(prompt) + count) // BLOCK) for prompt in prompts]
        tables = torch.full((len(prompts), max(blocks)), -1, dtype=torch.int32)
        first = 0
        for row, number in enumerate(blocks):
            tables[row, :number] = torch.arange(first, first + number, dtype=torch.int32)
            first += number
        caches = empty_caches(self.loaded, first)
        pieces, starts = prompts, [0] * len(prompts)
        found = []
        for _ in range(count):
            sizes = torch.tensor([len(piece) for piece in pieces])
            out = self.executor.run(
                Batch(
                    token_ids=torch.tensor([token for piece in pieces for token in piece], dtype=torch.int32),
                    positions=torch.cat(
                        [torch.arange(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)]
                    ).int(),
                    sequences=torch.repeat_interleave(torch.arange(len(pieces)), sizes).int(),
                    block_tables=tables,
                    output_rows=(sizes.cumsum(0) - 1).int(),
                ),
                caches,
            )
            found.append(out.logits)
            starts = [start + len(piece) for start, piece in zip(starts, pieces, strict=True)]
            pieces = out.logits.argmax(1)[:, None].tolist()
        return torch.stack(found)


def empty_caches(loaded: weights.LoadedModel, blocks: int) -> list[Cache]:
    """fp32 caches of ``blocks`` blocks, full of NaN: nothing may be read before it is written."""
    return [
        Cache(
            keys=torch.full((blocks, spec.kv_heads, BLOCK, spec.head_dim), float("nan")),
            values=torch.full((blocks, spec.kv_heads, BLOCK, spec.value_dim), float("nan")) if spec.value_dim else None,
        )
        for spec in loaded.program.caches
    ]


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference in units of the largest magnitude."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


def reference(name: str, config: dict[str, Any], seed: int = 0) -> Any:
    """A transformers model with telling weights. Eager attention, which knows of caps and sinks; falcon's own adds its
    biases twice there."""
    import transformers

    attention = "sdpa" if config.get("alibi") else "eager"
    made = getattr(transformers, name + "Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation=attention).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """[T, V]."""
    found: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return found
