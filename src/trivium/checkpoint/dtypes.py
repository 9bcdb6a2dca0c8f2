"""The element types that safetensors can hold, by their names there, and tensors as raw bytes."""

from __future__ import annotations

from types import MappingProxyType

import torch

from trivium.base.errors import CheckpointError

_BY_NAME = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
    }
)
_BY_DTYPE = MappingProxyType({dtype: name for name, dtype in _BY_NAME.items()})


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of ``dtype``. Raises CheckpointError when it has none."""
    if dtype not in _BY_DTYPE:
        raise CheckpointError(f"{dtype} cannot be stored in safetensors; it holds {', '.join(_BY_NAME)}")
    return _BY_DTYPE[dtype]


def dtype_of(name: object, where: object) -> torch.dtype:
    """The torch dtype called ``name`` in safetensors. Raises CheckpointError, naming ``where``, on another name."""
    if not isinstance(name, str) or name not in _BY_NAME:
        raise CheckpointError(f"{where}: unknown dtype {str(name)[:40]!r}; known are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The elements of a host tensor in row-major order, without a copy when it is contiguous."""
    flat = tensor.detach().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data


def from_bytes(data: bytearray, dtype: torch.dtype) -> torch.Tensor:
    """A 1-D tensor over ``data``; they share memory."""
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
