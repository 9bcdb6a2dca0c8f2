"""A program turned into the native library's structs, checked on the way: the library trusts what it is given."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable

import torch

from trivium.base.errors import ConfigError
from trivium.kernels import program as ops
from trivium.kernels.matrix import PANEL, Matrix
from trivium.kernels.native_abi import CCacheSpec, CExpert, CMatrix, COperation, CProgram, CSpan

KINDS = (
    ops.Embed,
    ops.Norm,
    ops.Linear,
    ops.Gated,
    ops.HeadLinear,
    ops.Rope,
    ops.Attend,
    ops.Combine,
    ops.Experts,
    ops.Rows,
)
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "sigmoid", "tanh")
COMBINES = ("activate", "add", "multiply", "scale", "clip", "softcap")
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4")
SCORES = ("softmax", "sigmoid", "chosen")
_TABLES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Bound:
    """The structs of one program, and all that they point at."""

    def __init__(self, program: ops.Program, threads: int) -> None:
        self.program = program
        self._kept: list[object] = []
        self._matrices: dict[int, object] = {}
        self._widths = (C.c_int32 * len(program.widths))(*program.widths)
        self._fill: dict[type[ops.Operation], Callable[[COperation, ops.Operation], None]] = {
            ops.Embed: self._embed,  # type: ignore[dict-item]
            ops.Norm: self._norm,  # type: ignore[dict-item]
            ops.Linear: self._linear,  # type: ignore[dict-item]
            ops.Gated: self._gated,  # type: ignore[dict-item]
            ops.HeadLinear: self._head_linear,  # type: ignore[dict-item]
            ops.Rope: self._rope,  # type: ignore[dict-item]
            ops.Attend: self._attend,  # type: ignore[dict-item]
            ops.Combine: self._combine,  # type: ignore[dict-item]
            ops.Experts: self._experts,  # type: ignore[dict-item]
            ops.Rows: self._rows,  # type: ignore[dict-item]
        }
        operations = (COperation * len(program.operations))()
        for number, operation in enumerate(program.operations):
            try:
                self._one(operations[number], operation)
            except ConfigError as error:
                raise ConfigError(f"operation {number} ({type(operation).__name__}): {error}") from None
        layers = sorted(op.layer for op in program.operations if isinstance(op, ops.Experts))
        if layers != list(range(program.num_moe_layers)):
            raise ConfigError(f"the program has {program.num_moe_layers} MoE layers, its operations are of {layers}")
        self._operations = operations
        self._caches = (CCacheSpec * max(1, len(program.caches)))(
            *(CCacheSpec(s.kv_heads, s.head_dim, s.value_dim, 0) for s in program.caches)
        )
        self.struct = CProgram(
            C.addressof(self._widths),
            C.addressof(operations),
            C.addressof(self._caches),
            len(program.widths),
            len(program.operations),
            len(program.caches),
            program.num_moe_layers,
            self._span(program.logits),
            self._span(program.hidden),
            threads,
            0,
        )

    def _one(self, to: COperation, operation: ops.Operation) -> None:
        fill = self._fill.get(type(operation))
        if fill is None:
            raise ConfigError("not an operation that the native kernels have")
        to.kind = KINDS.index(type(operation))
        to.scale = 1.0
        fill(to, operation)

    # ---------------------------------------------------------------------------------------------- parts
    def _span(self, span: ops.Span | None, width: int | None = None) -> CSpan:
        if span is None:
            return CSpan(0, 0, 0)
        if not (0 <= span.register < len(self.program.widths)):
            raise ConfigError(f"register {span.register}: the program has {len(self.program.widths)}")
        whole = self.program.widths[span.register]
        if span.start < 0 or span.width < 1 or span.start + span.width > whole:
            raise ConfigError(f"{span}: register {span.register} has {whole} columns")
        if width is not None and span.width != width:
            raise ConfigError(f"{span}: expected {width} columns")
        return CSpan(span.register, span.start, span.width)

    def _vector(self, tensor: torch.Tensor | None, *lengths: int) -> int | None:
        """The address of an fp32 copy, or of the tensor itself; its length must be one of ``lengths``."""
        if tensor is None:
            return None
        if tensor.numel() not in lengths:
            raise ConfigError(f"a vector of {tensor.numel()} numbers: expected {' or '.join(map(str, lengths))}")
        # One vector of lanes past the end may be read.
        kept = torch.nn.functional.pad(tensor.detach().cpu().float().flatten(), (0, 16))
        self._kept.append(kept)
        return kept.data_ptr()

    def _table(self, tensor: torch.Tensor, width: int) -> tuple[int, int]:
        if tensor.dtype not in _TABLES or tensor.dim() != 2 or tensor.shape[1] != width or not tensor.is_contiguous():
            raise ConfigError(
                f"a table {list(tensor.shape)} in {tensor.dtype}: expected contiguous floats [.., {width}]"
            )
        self._kept.append(tensor)
        return tensor.data_ptr(), _TABLES[tensor.dtype]

    def _fields(self, matrix: Matrix, rows: int | None, columns: int | None) -> CMatrix:
        if matrix.layout != "panels" or matrix.data.device.type != "cpu" or not matrix.data.is_contiguous():
            raise ConfigError("the native kernels read panels on the CPU: pack(…, layout=registry.layout('native'))")
        if (rows not in (None, matrix.rows)) or (columns not in (None, matrix.columns)):
            raise ConfigError(f"a matrix [{matrix.rows}, {matrix.columns}]: expected [{rows}, {columns}]")
        padded = matrix.data[0].numel() // PANEL * (2 if matrix.format == "int4" else 1)
        groups = -(-matrix.columns // matrix.group) if matrix.group else 1
        wanted = (-(-matrix.rows // PANEL), groups, PANEL)
        for part in (matrix.scales, matrix.zeros):
            if part is not None and (tuple(part.shape) != wanted or not part.is_contiguous()):
                raise ConfigError(f"scales or zeros {list(part.shape)}: expected {list(wanted)}")
        self._kept.append(matrix)
        return CMatrix(
            FORMATS.index(matrix.format),
            matrix.group,
            matrix.rows,
            matrix.columns,
            padded,
            matrix.data.data_ptr(),
            None if matrix.scales is None else matrix.scales.data_ptr(),
            None if matrix.zeros is None else matrix.zeros.data_ptr(),
            int(matrix.scales is not None and matrix.scales.dtype == torch.float16),
            matrix.dot_group,
        )

    def _matrix(self, matrix: Matrix | None, rows: int | None = None, columns: int | None = None) -> int | None:
        if matrix is None:
            return None
        struct = self._fields(matrix, rows, columns)
        self._kept.append(struct)
        return C.addressof(struct)

    # ---------------------------------------------------------------------------------------------- operations
    def _embed(self, to: COperation, op: ops.Embed) -> None:
        to.out = self._span(op.out)
        to.table, to.table_format = self._table(op.table, op.out.width)
        to.table_rows = op.table.shape[0]
        to.scale = op.scale
        if op.positions is not None:
            to.positions, to.positions_format = self._table(op.positions, op.out.width)
            to.position_rows = op.positions.shape[0]
            to.position_offset = op.position_offset

    def _norm(self, to: COperation, op: ops.Norm) -> None:
        to.x, to.out = self._span(op.x), self._span(op.out, op.x.width)
        if op.group < 1 or op.x.width % op.group:
            raise ConfigError(f"groups of {op.group} columns in {op.x.width}")
        to.group, to.layer_norm, to.eps, to.offset = op.group, int(op.kind == "layer"), op.eps, op.offset
        to.weight = self._vector(op.weight, op.group, op.x.width)
        to.bias = self._vector(op.bias, op.group, op.x.width)
        lengths = {len(v.flatten()) for v in (op.weight, op.bias) if v is not None}
        if len(lengths) > 1:
            raise ConfigError(f"weight and bias of different lengths {sorted(lengths)}")
        to.weight_period = lengths.pop() if lengths else 0

    def _linear(self, to: COperation, op: ops.Linear) -> None:
        to.x, to.out = self._span(op.x), self._span(op.out)
        to.matrix = self._matrix(op.weight, op.out.width, op.x.width)
        to.bias = self._vector(op.bias, op.out.width)
        to.activation, to.scale = ACTIVATIONS.index(op.activation), op.scale
        to.has_add = int(op.add is not None)
        to.y = self._span(op.add, op.out.width)

    def _gated(self, to: COperation, op: ops.Gated) -> None:
        to.x, to.out = self._span(op.x), self._span(op.out)
        to.matrix = self._matrix(op.gate, op.out.width, op.x.width)
        to.matrix2 = self._matrix(op.up, op.out.width, op.x.width)
        if (op.gate.format, op.gate.group) != (op.up.format, op.up.group):
            raise ConfigError("gate and up must have one format and group")
        to.bias, to.bias2 = self._vector(op.gate_bias, op.out.width), self._vector(op.up_bias, op.out.width)
        to.activation = ACTIVATIONS.index(op.activation)

    def _head_linear(self, to: COperation, op: ops.HeadLinear) -> None:
        to.x, to.out = self._span(op.x), self._span(op.out)
        first, heads = op.weights[0], len(op.weights)
        if (heads - 1) * op.x_stride + first.columns > op.x.width or (
            heads - 1
        ) * op.out_stride + first.rows > op.out.width:
            raise ConfigError(f"{heads} heads of [{first.rows}, {first.columns}] do not fit {op.x} and {op.out}")
        array = (CMatrix * heads)(*(self._fields(m, first.rows, first.columns) for m in op.weights))
        if len({(m.format, m.group) for m in op.weights}) > 1:
            raise ConfigError("the heads' weights must have one format and group")
        self._kept.append(array)
        to.matrix, to.count = C.addressof(array), heads
        to.x_stride, to.out_stride = op.x_stride, op.out_stride

    def _rope(self, to: COperation, op: ops.Rope) -> None:
        to.x = to.out = self._span(op.x, op.heads * op.head_dim)
        width = op.table.shape[1]
        if op.table.dtype != torch.float32 or width % 2 or op.first < 0 or op.first + width > op.head_dim:
            raise ConfigError(
                f"a table {list(op.table.shape)} {op.table.dtype} from column {op.first} of {op.head_dim}"
            )
        to.table, _ = self._table(op.table, width)
        to.position_rows, to.half, to.first = op.table.shape[0], width // 2, op.first
        to.heads, to.head_dim, to.interleaved = op.heads, op.head_dim, int(op.interleaved)

    def _attend(self, to: COperation, op: ops.Attend) -> None:
        if op.kv_heads < 1 or op.heads % op.kv_heads:
            raise ConfigError(f"{op.heads} heads on {op.kv_heads} key heads")
        spec = self.program.caches[op.cache] if 0 <= op.cache < len(self.program.caches) else None
        values = 0 if op.v is None else op.value_dim
        if spec is None or (spec.kv_heads, spec.head_dim, spec.value_dim) != (op.kv_heads, op.head_dim, values):
            raise ConfigError(f"cache {op.cache} is {spec}: it does not fit")
        if op.v is None and op.value_dim > op.head_dim:
            raise ConfigError(f"values of {op.value_dim} columns out of keys of {op.head_dim}")
        to.x, to.out = self._span(op.q, op.heads * op.head_dim), self._span(op.out, op.heads * op.value_dim)
        to.y, to.z = self._span(op.k, op.kv_heads * op.head_dim), self._span(op.v, op.kv_heads * values or None)
        to.heads, to.kv_heads, to.head_dim, to.value_dim = op.heads, op.kv_heads, op.head_dim, op.value_dim
        to.cache, to.latent, to.scale = op.cache, int(op.v is None), op.scale
        to.has_window, to.window = int(op.window is not None), op.window or 0
        to.softcap = op.softcap or 0.0
        to.slopes, to.sinks = self._vector(op.slopes, op.heads), self._vector(op.sinks, op.heads)

        if op.biases is not None:
            if op.biases.dim() != 2 or op.biases.shape[0] != op.heads:
                raise ConfigError(f"biases {list(op.biases.shape)}: expected [{op.heads}, positions]")
            # A tile of keys may reach past the last position.
            padded = torch.nn.functional.pad(op.biases.float().cpu(), (0, 64)).contiguous()
            self._kept.append(padded)
            to.biases, to.first, to.position_rows = padded.data_ptr(), padded.shape[1], op.biases.shape[1]

    def _combine(self, to: COperation, op: ops.Combine) -> None:
        to.x, to.out = self._span(op.a), self._span(op.out)
        if op.kind in COMBINES:
            to.combine = COMBINES.index(op.kind)
        elif op.kind in ACTIVATIONS:
            to.activation = ACTIVATIONS.index(op.kind)
        else:
            raise ConfigError(f"kind {op.kind!r}")
        two = op.kind in ("add", "multiply")
        if two != (op.b is not None) or op.a.width != op.out.width:
            raise ConfigError(f"kind {op.kind!r} with a {op.a}, b {op.b}, out {op.out}")
        to.y = self._span(op.b, None if op.b is not None and op.b.width == 1 else op.out.width)
        to.scale = op.scale

    def _experts(self, to: COperation, op: ops.Experts) -> None:
        gate, count = op.gate, len(op.experts)
        to.x, to.out, to.y = self._span(op.x), self._span(op.out, op.x.width), self._span(op.logits, count)
        to.z = self._span(op.add, op.out.width)
        if not 0 <= op.layer < self.program.num_moe_layers:
            raise ConfigError(f"layer {op.layer}: the program has {self.program.num_moe_layers}")
        if not 1 <= gate.top_k <= count or count % gate.groups or not 1 <= gate.top_groups <= gate.groups:
            raise ConfigError(f"{gate} over {count} experts")
        if gate.top_k > count // gate.groups * gate.top_groups:
            raise ConfigError(f"{gate}: fewer experts are eligible than chosen")
        width = op.experts[0].up.rows
        kinds = {tuple(None if m is None else (m.format, m.group) for m in (e.up, e.gate, e.down)) for e in op.experts}
        if len(kinds) > 1 or any(
            e.gate and (e.gate.format, e.gate.group) != (e.up.format, e.up.group) for e in op.experts
        ):
            raise ConfigError("the experts' weights must have one format and group, gate and up alike")
        array = (CExpert * count)(*(self._expert(e, op.x.width, width) for e in op.experts))
        self._kept.append(array)
        to.experts, to.count, to.layer = C.addressof(array), count, op.layer
        to.activation = ACTIVATIONS.index(op.activation)
        to.top_k, to.scores, to.renormalise = gate.top_k, SCORES.index(gate.scores), int(gate.renormalise)
        to.renormalise_eps, to.gate_scale = gate.renormalise_eps, gate.scale
        to.groups, to.top_groups, to.by_max = gate.groups, gate.top_groups, int(gate.group_by == "max")
        to.correction = self._vector(gate.correction, count)
        to.has_clamp, to.clamp = int(op.clamp is not None), op.clamp or 0.0

    def _expert(self, expert: ops.Expert, dim: int, width: int) -> CExpert:
        return CExpert(
            self._matrix(expert.up, width, dim),
            self._matrix(expert.gate, width, dim),
            self._matrix(expert.down, dim, width),
            self._vector(expert.up_bias, width),
            self._vector(expert.gate_bias, width),
            self._vector(expert.down_bias, dim),
        )

    def _rows(self, to: COperation, op: ops.Rows) -> None:
        to.x, to.out = self._span(op.x), self._span(op.out, op.x.width)
