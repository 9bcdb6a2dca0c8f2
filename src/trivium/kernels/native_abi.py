"""The structs that the native library reads, mirrored from native/abi.h, and a program turned into them.

Every tensor whose address goes in is kept alive by `Bound`.
"""

from __future__ import annotations

import ctypes as C

I32, I64, F32, P = C.c_int32, C.c_int64, C.c_float, C.c_void_p


class CSpan(C.Structure):
    """`program.Span`."""

    _fields_ = [("reg", I32), ("start", I32), ("width", I32)]


class CMatrix(C.Structure):
    """`matrix.Matrix` in panels."""

    _fields_ = [
        ("format", I32),
        ("group", I32),
        ("rows", I64),
        ("columns", I64),
        ("padded", I64),
        ("data", P),
        ("scales", P),
        ("zeros", P),
        ("half_scales", I32),
        ("dot_group", I32),
    ]


class CExpert(C.Structure):
    """`program.Expert`."""

    _fields_ = [(name, P) for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")]


_INTS = (
    *("heads", "kv_heads", "head_dim", "value_dim", "window", "cache", "has_window", "latent"),
    *("group", "layer_norm", "interleaved", "first", "half", "x_stride", "out_stride", "layer"),
    *("top_k", "scores", "renormalise", "groups", "top_groups", "by_max", "has_clamp", "has_add"),
    *("table_format", "positions_format", "table_rows", "position_rows", "position_offset", "weight_period"),
)
_FLOATS = ("scale", "eps", "offset", "softcap", "renormalise_eps", "gate_scale", "clamp", "padding")
_POINTERS = (
    *("table", "positions", "weight", "bias", "bias2", "slopes", "sinks", "correction", "biases"),
    *("matrix", "matrix2", "experts"),
)


class COperation(C.Structure):
    """Any operation: the fields that its kind has no use for stay zero."""

    _fields_ = [
        *((name, I32) for name in ("kind", "activation", "combine", "count")),
        *((name, CSpan) for name in ("x", "y", "z", "out")),
        *((name, I32) for name in _INTS),
        *((name, F32) for name in _FLOATS),
        *((name, P) for name in _POINTERS),
    ]


class CCacheSpec(C.Structure):
    """`program.CacheSpec`."""

    _fields_ = [("kv_heads", I32), ("head_dim", I32), ("value_dim", I32), ("padding", I32)]


class CCache(C.Structure):
    """`program.Cache`."""

    _fields_ = [
        ("keys", P),
        ("values", P),
        ("key_scales", P),
        ("value_scales", P),
        ("blocks", I64),
        ("block_size", I32),
        ("format", I32),
    ]


class CProgram(C.Structure):
    """`program.Program` and the number of threads."""

    _fields_ = [
        ("widths", P),
        ("operations", P),
        ("caches", P),
        ("num_registers", I32),
        ("num_operations", I32),
        ("num_caches", I32),
        ("num_moe_layers", I32),
        ("logits", CSpan),
        ("hidden", CSpan),
        ("threads", I32),
        ("padding", I32),
    ]


class CRouting(C.Structure):
    """One MoE layer's routing of a step."""

    _fields_ = [("replayed", P), ("experts", P), ("weights", P)]


class CBatch(C.Structure):
    """`program.Batch`, the caches, and where the outputs go."""

    _fields_ = [
        *((name, P) for name in ("token_ids", "positions", "sequences", "block_tables", "output_rows")),
        *((name, I64) for name in ("tokens", "num_sequences", "blocks_per_sequence", "rows")),
        *((name, P) for name in ("caches", "routing", "logits", "hidden")),
    ]


class CDraws(C.Structure):
    """`draws.Draws`, the logits, and where the tokens go."""

    _fields_ = [
        *((name, P) for name in ("logits", "rows", "temperatures", "min_ps", "top_ps", "uniforms", "top_ks", "tops")),
        *((name, P) for name in ("allowed", "edit_ids", "edit_values", "edit_ends")),
        *((name, I64) for name in ("count", "num_rows", "width", "most")),
        *((name, P) for name in ("tokens", "bests", "lefts", "wholes", "top_ids")),
    ]


STRUCTS = (CSpan, CMatrix, CExpert, COperation, CCacheSpec, CCache, CProgram, CRouting, CBatch, CDraws)
