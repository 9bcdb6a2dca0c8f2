"""Runs a program with the native library: one call per step and one for its tokens, without the interpreter's lock.

DeepSpeed Inference section 3.1. Batch-invariant: see [Note: one order] in native/product.h and [Note: key tiles] in
native/attention.h; [Note: draws] in native/row_draw.h.
"""

from __future__ import annotations

import ctypes as C
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from trivium.base.errors import CapacityError, ConfigError, SetupError
from trivium.kernels.batch import check, check_cache
from trivium.kernels.draws import Draws, Sampler, Tokens, check_numbers, check_types, columns
from trivium.kernels.native_abi import STRUCTS, CBatch, CCache, CDraws
from trivium.kernels.native_program import Bound
from trivium.kernels.program import Batch, Cache, Output, Program, StepRouting

_CACHES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 3}
_NO_THREADS = "the native kernels could not start their threads; allow more, or ask for fewer"


def open_library(path: Path) -> C.CDLL:
    """The library with its functions typed.

    Raises:
        SetupError: it cannot be loaded, or was built from other sources than these.
    """
    try:
        library = C.CDLL(str(path))
        library.trivium_bind.restype = C.c_void_p
        library.trivium_bind.argtypes = [C.c_void_p]
        library.trivium_run.argtypes = [C.c_void_p, C.c_void_p]
        library.trivium_draw.argtypes = [C.c_void_p, C.c_void_p]
        library.trivium_free.argtypes = [C.c_void_p]
        library.trivium_free.restype = None
    except (OSError, AttributeError) as error:
        raise SetupError(f"{path}: {error}; build it again: python -m trivium.kernels.build") from error
    sizes = (C.c_int64 * len(STRUCTS))()
    library.trivium_sizes(sizes)
    if list(sizes) != [C.sizeof(struct) for struct in STRUCTS]:
        raise SetupError(f"{path} was built from other sources; build it again: python -m trivium.kernels.build")
    return library


class NativeExecutor:
    """The program's step in the native library; see `trivium.kernels.executor.Executor`."""

    def __init__(self, program: Program, library: C.CDLL, variant: str, threads: int) -> None:
        self._handle: int | None = None
        if threads < 1:
            raise ConfigError(f"threads: {threads}, expected at least 1")
        self._program = program
        self._variant = variant
        self._library = library
        self._bound = Bound(program, threads)
        self._top_k = program.top_k
        self._known: tuple[Cache, ...] = ()
        self._caches: C.Array[CCache] = (CCache * 1)()
        self._handle = library.trivium_bind(C.byref(self._bound.struct))
        if not self._handle:
            raise CapacityError("the native kernels could not allocate memory for the program")

    @property
    def name(self) -> str:
        """The backend and its variant."""
        return f"native {self._variant}"

    @property
    def batch_invariant(self) -> bool:
        """Always: every output accumulates in one order."""
        return True

    @property
    def sampler(self) -> Sampler:
        """Itself: the threads that run a step also draw its tokens."""
        return self

    def run(self, batch: Batch, caches: Sequence[Cache]) -> Output:
        """One step; see `Executor.run`."""
        if len(caches) != len(self._known) or any(a is not b for a, b in zip(caches, self._known, strict=True)):
            self._bind_caches(batch, caches)
        _check_vectors(batch)
        tokens, rows = len(batch.token_ids), len(batch.output_rows)
        logits = torch.empty(rows, self._program.logits.width)
        hidden = torch.empty(rows, self._program.hidden.width)
        if batch.routing is not None:
            check(self._program, batch, caches)
        routing = self._empty_routing(tokens)
        # Held until the call returns: copies of tensors that were not contiguous.
        replay = [chosen.contiguous() for chosen in batch.routing or ()]
        tables = self._routing_tables(routing, [chosen.data_ptr() for chosen in replay])
        names = ("token_ids", "positions", "sequences", "block_tables", "output_rows")
        tensors = [getattr(batch, name).contiguous() for name in names]
        struct = CBatch(
            *(tensor.data_ptr() for tensor in tensors),
            tokens,
            *batch.block_tables.shape,
            rows,
            C.addressof(self._caches),
            tables.buffer_info()[0],
            logits.data_ptr(),
            hidden.data_ptr(),
        )
        code = self._library.trivium_run(self._handle, C.byref(struct))
        if code == 1:
            check(self._program, batch, caches)
            raise ConfigError("the batch does not fit the program")
        if code == 2:
            raise CapacityError(f"a step of {tokens} tokens: out of memory for its activations; run fewer at once")
        if code:
            raise SetupError(_NO_THREADS)
        return Output(logits=logits, hidden=hidden, routing=routing)

    def refresh(self) -> None:
        """Nothing to do: the library reads the program's own tensors."""

    def draw(self, logits: torch.Tensor, draws: Draws) -> Tokens:
        """A step's tokens; see `Sampler.draw`."""
        check_types(logits, draws)
        given = columns(draws)
        count, (num_rows, width) = len(draws.rows), logits.shape
        most = max(0, *draws.tops) if count else 0
        token, top = array("i", bytes(4 * count)), array("i", bytes(4 * count * most))
        best, left, whole = array("f", bytes(4 * count)), array("f", bytes(4 * count)), array("d", bytes(8 * count))
        allowed = (C.c_void_p * (count + 1))()
        for place, mask in enumerate(draws.allowed or ()):
            allowed[place] = None if mask is None else mask.data_ptr()
        ends = array("q", bytes(8 * (count + 1)))
        for place, edit in enumerate(draws.edits or ()):
            ends[place + 1] = ends[place] + (0 if edit is None else len(edit[0]))
        edits = [edit for edit in draws.edits or () if edit is not None]
        ids = torch.cat([edit[0] for edit in edits]) if edits else None
        values = torch.cat([edit[1] for edit in edits]) if edits else None
        struct = CDraws(
            logits.data_ptr(),
            *(column.buffer_info()[0] for column in given),
            C.addressof(allowed),
            None if ids is None else ids.data_ptr(),
            None if values is None else values.data_ptr(),
            ends.buffer_info()[0],
            count,
            num_rows,
            width,
            most,
            *(column.buffer_info()[0] for column in (token, best, left, whole, top)),
        )
        code = self._library.trivium_draw(self._handle, C.byref(struct))
        if code == 1:
            check_numbers(logits, draws)
        if code == 2:
            raise CapacityError(f"drawing {count} tokens of a vocabulary of {width}: out of memory")
        if code:
            raise SetupError(_NO_THREADS)
        tops = [top[most * place : most * place + max(0, wanted)].tolist() for place, wanted in enumerate(draws.tops)]
        return Tokens(token=token.tolist(), best=best.tolist(), left=left.tolist(), whole=whole.tolist(), top=tops)

    def _empty_routing(self, tokens: int) -> StepRouting | None:
        if not self._top_k:
            return None
        count = tokens * sum(self._top_k)
        experts, weights = torch.empty(count, dtype=torch.int32), torch.empty(count)
        return StepRouting(experts=experts, weights=weights, top_k=self._top_k, rows=tokens, tokens=tokens)

    def _routing_tables(self, routing: StepRouting | None, replay: list[int]) -> array[int]:
        """A `CRouting` per MoE layer: three addresses each."""
        found = array("q")
        if routing is not None:
            experts, weights = routing.experts.data_ptr(), routing.weights.data_ptr()
            for layer, top_k in enumerate(self._top_k):
                found.extend((replay[layer] if replay else 0, experts, weights))
                experts, weights = experts + 4 * routing.rows * top_k, weights + 4 * routing.rows * top_k
        return found

    def _bind_caches(self, batch: Batch, caches: Sequence[Cache]) -> None:
        if len(caches) != len(self._program.caches):
            raise ConfigError(f"caches: the program has {len(self._program.caches)}, got {len(caches)}")
        array = (CCache * max(1, len(caches)))()
        for number, (cache, spec) in enumerate(zip(caches, self._program.caches, strict=True)):
            check_cache(f"cache {number}", cache, spec)
            array[number] = CCache(
                cache.keys.data_ptr(),
                None if cache.values is None else cache.values.data_ptr(),
                None if cache.key_scales is None else cache.key_scales.data_ptr(),
                None if cache.value_scales is None else cache.value_scales.data_ptr(),
                cache.keys.shape[0],
                cache.keys.shape[2],
                _CACHES[cache.keys.dtype],
            )
        self._known, self._caches = tuple(caches), array

    def __del__(self) -> None:
        if self._handle:
            self._library.trivium_free(self._handle)
            self._handle = None


def _check_vectors(batch: Batch) -> None:
    """Types and lengths; the library checks the numbers."""
    tokens = len(batch.token_ids)
    for tensor, dims in (
        (batch.token_ids, 1),
        (batch.positions, 1),
        (batch.sequences, 1),
        (batch.output_rows, 1),
        (batch.block_tables, 2),
    ):
        if tensor.dtype != torch.int32 or tensor.ndim != dims or not tensor.is_cpu:
            raise ConfigError(f"a batch's tensors are int32 on the CPU, got {tensor.dtype} {list(tensor.shape)}")
    if len(batch.positions) != tokens or len(batch.sequences) != tokens:
        raise ConfigError(f"{tokens} tokens, {len(batch.positions)} positions, {len(batch.sequences)} sequences")
