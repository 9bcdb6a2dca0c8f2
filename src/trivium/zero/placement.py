"""The table: where each state of a unit lives at each stage, and the arithmetic of cutting a unit into shards.

ZeRO sections 5.1 to 5.3 (P_os, P_os+g, P_os+g+p). Pure integers: the planner calls the very same functions.

[Note: alignment]
Each parameter starts on a multiple of ALIGNMENT elements, and so does each shard. 64 bytes keep GEMM results
independent of
where a weight lies; sixteen elements are the chunk of the order-free norm, which therefore never spans two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from trivium.base.errors import ConfigError

Cut = Literal["element", "parameter"]
CHUNK = 16
_WORDS = MappingProxyType(
    {
        "reduce": ("auto", "ordered", "native"),
        "reduce_dtype": ("float32", "parameter"),
        "gradient_dtype": ("parameter", "float32"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of the table: which states are sharded (True) and which are replicated."""

    parameter: bool
    gradient: bool
    optimizer: bool


STAGES: tuple[Row, ...] = (
    Row(parameter=False, gradient=False, optimizer=False),
    Row(parameter=False, gradient=False, optimizer=True),
    Row(parameter=False, gradient=True, optimizer=True),
    Row(parameter=True, gradient=True, optimizer=True),
)


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How a model is sharded; also the ``[zero]`` table of a training configuration.

    ``shard_size``: ranks per sharding group (hybrid sharding); states are replicated across groups. None: all ranks.
    ``keep_gathered``: stage 3 keeps parameters between forward and backward (2Ψ gathered once, more memory).
    ``bucket_bytes``: communication buffers take at most twice this, whatever the model.
    ``reduce``: ``ordered`` adds ranks in rank order, bit-equal across stages; ``native`` is the backend's own.
    ``reduce_dtype``: ``float32`` adds 16-bit gradients in fp32; ``parameter`` adds in their own dtype.
    ``gradient_dtype``: what reduced gradients are kept in: the parameters' dtype, or ``float32``.
    ``average``: divide the sum over ranks by their number. No key of ``[zero]``: the trainer divides by tokens.
    ``loss_scale``: ``dynamic`` (fp16 parameters), a fixed number, or ``auto``: dynamic for fp16, 1 otherwise.
    """

    stage: int = 3
    shard_size: int | None = None
    keep_gathered: bool = False
    bucket_bytes: int = 8 * 2**20
    prefetch: int = 1
    reduce: Literal["auto", "ordered", "native"] = "auto"
    reduce_dtype: Literal["float32", "parameter"] = "float32"
    gradient_dtype: Literal["parameter", "float32"] = "parameter"
    average: bool = True
    loss_scale: float | Literal["auto", "dynamic"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.stage, bool) or self.stage not in range(len(STAGES)):
            raise ConfigError(f"zero.stage={self.stage}: expected 0 to 3")
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"zero.{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        for name in ("bucket_bytes", "prefetch", *(("shard_size",) if self.shard_size is not None else ())):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int):
                raise ConfigError(f"zero.{name}={getattr(self, name)!r}: expected a whole number")
        if self.reduce_dtype == "parameter" and self.gradient_dtype == "float32":
            raise ConfigError(
                "zero.reduce_dtype='parameter' adds in 16 bits, zero.gradient_dtype='float32' keeps sums in fp32: "
                "leave one of them out"
            )
        if isinstance(self.loss_scale, str) and self.loss_scale not in ("auto", "dynamic"):
            raise ConfigError(f"zero.loss_scale={self.loss_scale!r}: expected a positive number, 'auto' or 'dynamic'")
        if self.bucket_bytes < 1024:
            raise ConfigError(f"zero.bucket_bytes={self.bucket_bytes}: expected 1024 or more")
        if self.prefetch < 0:
            raise ConfigError(f"zero.prefetch={self.prefetch}: expected 0 or more units gathered ahead")
        if self.shard_size is not None and self.shard_size < 1:
            raise ConfigError(f"zero.shard_size={self.shard_size}: expected 1 or more ranks")
        if isinstance(self.loss_scale, float | int) and not self.loss_scale > 0:
            raise ConfigError(f"zero.loss_scale={self.loss_scale}: expected a positive number, 'auto' or 'dynamic'")

    @property
    def row(self) -> Row:
        """This stage's row of the table."""
        return STAGES[self.stage]


@dataclass(frozen=True)
class Overlap:
    """The part of a parameter that lies in one shard: elements [start, start+length) at ``at`` in the shard."""

    start: int
    length: int
    at: int


@dataclass(frozen=True)
class Layout:
    """One flat buffer of parameters and its cut into equal shards.

    ``offsets[i]`` is where parameter i starts in the flat; ``shard_numel · num_shards`` is the flat's length.
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    num_shards: int
    shard_numel: int
    replicas: int = 1

    @property
    def part_numel(self) -> int:
        """Elements that one rank reduces: a shard divided among the ``replicas`` ranks that hold the same one."""
        return self.shard_numel // self.replicas

    @property
    def numel(self) -> int:
        """Elements of the whole flat, padding included."""
        return self.shard_numel * self.num_shards

    @property
    def padding(self) -> int:
        """Elements of the whole flat that belong to no parameter."""
        return self.numel - sum(self.numels)

    def overlap(self, index: int, shard: int) -> Overlap | None:
        """What of parameter ``index`` lies in ``shard``; None if nothing does."""
        low, high = shard * self.shard_numel, (shard + 1) * self.shard_numel
        begin = max(self.offsets[index], low)
        end = min(self.offsets[index] + self.numels[index], high)
        return Overlap(begin - self.offsets[index], end - begin, begin - low) if begin < end else None


def alignment(element_bytes: int) -> int:
    """Elements to which parameters and shards of this element size are aligned; see [Note: alignment]."""
    return max(CHUNK, 64 // element_bytes)


def lay_out(
    numels: Sequence[int], num_shards: int, element_bytes: int, cut: Cut = "element", replicas: int = 1
) -> Layout:
    """Place parameters of ``numels`` elements in one flat of ``num_shards`` equal shards, each held by ``replicas``
    ranks."""
    align = alignment(element_bytes)
    if cut == "parameter":
        return _by_parameter(numels, num_shards, align, replicas)
    offsets, end = [], 0
    for numel in numels:
        offsets.append(end)
        end += _round_up(numel, align)
    return Layout(
        tuple(numels), tuple(offsets), num_shards, _round_up(end, align * num_shards * replicas) // num_shards, replicas
    )


def piece_numel(ranks: int, bucket_bytes: int, element_bytes: int) -> int:
    """Elements of one rank's part that are reduced at once, so that this piece of every rank's part fits half a bucket.

    Two pieces are in flight, each with a send and a receive buffer: twice the bucket in all.
    """
    align = alignment(element_bytes)
    return max(bucket_bytes // 2 // (ranks * element_bytes) // align * align, align)


def slot_numel(ranks: int, part_numel: int, step: int) -> int:
    """Elements of one communication buffer for a flat of which each rank reduces ``part_numel``, ``step`` at a time."""
    return ranks * min(step, max(part_numel, 1))


def slot_bytes(ranks: int, part_numel: int, element_bytes: int, bucket_bytes: int) -> int:
    """Bytes of one communication buffer for such a flat; all flats of a model share buffers of the largest need."""
    return slot_numel(ranks, part_numel, piece_numel(ranks, bucket_bytes, element_bytes)) * element_bytes


def slot_copies(ranks: int) -> int:
    """Buffers held for two pieces in flight: to send and to receive; with one rank they are the same."""
    return 2 if ranks == 1 else 4


def pieces(part_numel: int, step: int) -> list[tuple[int, int]]:
    """Ranges (start, length) of at most ``step`` elements that make up a part."""
    return [(start, min(step, part_numel - start)) for start in range(0, part_numel, step)]


def divides_exactly(ranks: int) -> bool:
    """Whether a sum divided by ``ranks`` and multiplied again has its bits back. If not, averages keep it beside.

    Subnormal numbers are left out of account: they matter in fp16 alone.
    """
    return ranks & (ranks - 1) == 0


def _by_parameter(numels: Sequence[int], num_shards: int, align: int, replicas: int) -> Layout:
    loads = [0] * num_shards
    place: dict[int, tuple[int, int]] = {}
    for index in sorted(range(len(numels)), key=lambda i: (-numels[i], i)):
        owner = min(range(num_shards), key=lambda shard: (loads[shard], shard))
        place[index] = (owner, loads[owner])
        loads[owner] += _round_up(numels[index], align)
    shard_numel = _round_up(max(loads, default=0), align * replicas)
    offsets = tuple(place[i][0] * shard_numel + place[i][1] for i in range(len(numels)))
    return Layout(tuple(numels), offsets, num_shards, shard_numel, replicas)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
