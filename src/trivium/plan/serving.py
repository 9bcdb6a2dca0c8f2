"""What serving a model takes: weights, cache, and how many requests of which length fit. Reads only headers.

DeepSpeed Inference section 3.1. The engine's own arithmetic: the same compiler on tensors without data, the same
function that sizes the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from trivium.base.errors import CapacityError, ConfigError
from trivium.base.units import format_bytes
from trivium.inference.blocks import most_held
from trivium.inference.cache import CacheDtype, block_bytes, check_dtype, kind_of, longest_held, window_of
from trivium.inference.compile import cache_spec, compile_program
from trivium.inference.engine import EngineConfig
from trivium.inference.packing import Quantize, format_of, precise, stored
from trivium.inference.sizing import BLOCK_SIZE, cache_blocks, program_bytes
from trivium.inference.weights import DType, Opened, keeps_packed, open_model, sequence_limit
from trivium.kernels.matrix import Format, Layout, Matrix, arrange
from trivium.kernels.program import CacheSpec
from trivium.kernels.registry import layout
from trivium.models.tensors import tensors

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """Bytes and counts. ``weights`` is the type of most of them, or "packed": as the folder stores them. ``fits`` pairs
    a context with how many requests of it the cache holds at once.

    ``caches`` counts layers by the kind that they declare: paged, windowed, latent. Where all are windowed, ``window``
    is how far back they read, and a request holds no more blocks than that and one step take.
    """

    name: str
    weights: str
    weight_bytes: int
    memory_bytes: int
    cache_dtype: CacheDtype
    token_bytes: int
    cache_bytes: int
    cache_tokens: int
    max_positions: int
    caches: dict[str, int]
    window: int | None
    fits: tuple[tuple[int, int], ...]


def plan_serving(
    path: str | Path,
    *,
    memory_bytes: int,
    dtype: DType = "auto",
    quantize: Quantize = None,
    cache_dtype: str = "auto",
    max_positions: int | None = None,
    max_sequences: int = EngineConfig.max_sequences,
    step_tokens: int = EngineConfig.step_tokens,
    backend: str = "auto",
) -> ServingPlan:
    """Plan to serve the model in ``path`` within ``memory_bytes``, weights and cache together.

    Raises:
        CapacityError: it does not fit; the message tells what would.
        ConfigError, CheckpointError: as `inference.weights.load`.
    """
    if dtype != "auto" and dtype not in _DTYPES:
        raise ConfigError(f"dtype={dtype!r}: expected auto, {', '.join(_DTYPES)}")
    with open_model(path) as opened:
        plain = opened.source.dtype if dtype == "auto" else _DTYPES[dtype]
        positions = sequence_limit(opened.architecture, max_positions)
        keep = keeps_packed(opened, dtype)
        counted = {
            form: _weight_bytes(opened, plain, form, positions, layout(backend), keep=keep and form is None)
            for form in dict.fromkeys((quantize, "int8", "int4"))
        }
        specs = _specs(opened)
    sizes = {form: size for form, (size, _) in counted.items()}
    exact = plain == torch.float32 and quantize is None
    entries = check_dtype(("float32" if exact else "bfloat16") if cache_dtype == "auto" else cache_dtype)
    each = block_bytes(specs, entries, BLOCK_SIZE)
    if memory_bytes - sizes[quantize] < each:
        raise CapacityError(_does_not_fit(memory_bytes, sizes, quantize, each))
    blocks = cache_blocks(
        specs, dtype=entries, weight_bytes=sizes[quantize], memory_bytes=memory_bytes, max_sequences=max_sequences,
        max_positions=positions, step_tokens=step_tokens,
    )  # fmt: skip
    window = window_of(specs)
    longest = longest_held(positions, num_blocks=blocks, block_size=BLOCK_SIZE, window=window, step_tokens=step_tokens)
    lengths = [2**power for power in range(7, 40) if 2**power < longest] + [longest]
    held = {
        length: most_held(length, block_size=BLOCK_SIZE, window=window, step_tokens=step_tokens) for length in lengths
    }
    kinds = [kind_of(spec) for spec in specs]
    return ServingPlan(
        name=Path(path).resolve().name,
        weights=quantize or ("packed" if counted[None][1] else str(plain).removeprefix("torch.")),
        weight_bytes=sizes[quantize],
        memory_bytes=memory_bytes,
        cache_dtype=entries,
        token_bytes=each // BLOCK_SIZE,
        cache_bytes=blocks * each,
        cache_tokens=blocks * BLOCK_SIZE,
        max_positions=longest,
        caches={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        window=window,
        fits=tuple((length, min(max_sequences, blocks // held[length])) for length in lengths),
    )


def _does_not_fit(memory_bytes: int, sizes: dict[Quantize, int], quantize: Quantize, each: int) -> str:
    smaller = [
        f"quantize={form} needs {format_bytes(size + each)}"
        for form, size in sizes.items()
        if form is not None and size < sizes[quantize]
    ]
    return (
        f"{format_bytes(memory_bytes)} do not hold the weights, {format_bytes(sizes[quantize])}, and one block of the "
        f"cache, {format_bytes(each)}; "
        + "; ".join([*smaller, f"or give {format_bytes(sizes[quantize] + each)} or more"])
    )


def _specs(opened: Opened) -> tuple[CacheSpec, ...]:
    return tuple(cache_spec(layer.attention) for layer in opened.architecture.layers)


def _weight_bytes(
    opened: Opened, dtype: torch.dtype, quantize: Quantize, positions: int, form: Layout, *, keep: bool
) -> tuple[int, bool]:
    """Bytes of the program that loading would compile: the same compiler, on tensors without data.

    ``keep``: what is stored packed stays so, whatever its format. Also returns whether any of it does.
    """
    read: list[str] = []
    stays = False
    shapes = tensors(opened.architecture)
    tables = ("embed.weight", "embed_in.weight", "positions.weight")

    def get(name: str) -> torch.Tensor:
        read.append(name)
        kept = dtype if name in tables else opened.source.dtype
        return torch.empty(shapes[name], dtype=kept, device="meta")

    def pack(name: str, weight: torch.Tensor) -> Matrix:
        nonlocal stays
        format, group = format_of(name, dtype, quantize)
        with torch.device("cpu"):  # what is read on the way has numbers
            found = None if precise(name) else stored(opened, read, weight, None if keep else format, outline=True)
        stays = stays or found is not None
        read.clear()
        return arrange(_empty(weight, format, group) if found is None else found, form)

    with torch.device("meta"):
        program = compile_program(opened.architecture, get, pack=pack, max_positions=positions)
    return program_bytes(program), stays


def _empty(weight: torch.Tensor, format: Format, group: int) -> Matrix:
    """As `kernels.matrix.pack` makes it, without numbers; scales per group of 16 bits, as all but extreme are."""
    rows, columns = weight.shape
    if format in _DTYPES:
        data = torch.empty(rows, columns, dtype=_DTYPES[format], device="meta")
        return Matrix(format=format, layout="plain", rows=rows, columns=columns, data=data)
    shape, kept = ((rows, columns), torch.int8) if format == "int8" else ((rows, -(-columns // 2)), torch.uint8)
    scales = torch.empty(rows, -(-columns // group), dtype=torch.float16, device="meta")
    data = torch.empty(shape, dtype=kept, device="meta")
    return Matrix(format=format, layout="plain", rows=rows, columns=columns, data=data, group=group, scales=scales)
