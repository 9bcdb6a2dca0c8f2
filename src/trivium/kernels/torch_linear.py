"""Matrix products, norms, rotations and element-wise operations in torch: the reference of the native kernels.

See [Note: quantised products] in trivium.kernels.matrix for what int8 and int4 multiply.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from trivium.base.errors import ConfigError
from trivium.kernels.matrix import Matrix, integers, scales_per_group
from trivium.kernels.program import Norm, Rope


def activate(name: str, x: torch.Tensor) -> torch.Tensor:
    """Any of `program.Activation`, element-wise.

    Raises:
        ConfigError: an unknown name.
    """
    match name:
        case "none":
            return x
        case "silu":
            return F.silu(x)
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "sigmoid":
            return torch.sigmoid(x)
        case "tanh":
            return torch.tanh(x)
    raise ConfigError(f"activation {name!r}: not one that programs know")


def multiply(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """x [T, columns] · matrixᵀ, fp32 [T, rows]; ``matrix`` plain."""
    if matrix.layout != "plain":
        raise ConfigError("the torch kernels read plain matrices: pack(…, layout=registry.layout('torch'))")
    if matrix.format in ("int8", "int4"):
        return _multiply_quantised(x, matrix)
    if x.device.type != "cpu" and matrix.format != "float32":
        return (x.to(matrix.data.dtype) @ matrix.data.T).float()
    return x @ matrix.data.float().T


def quantise(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] → whole numbers in ±127 as fp32 [T, groups, group] (the last padded with zeros), scales [T, groups].

    A group with a value that is not finite gets the scale NaN, so that its products say so.
    """
    groups = -(-x.shape[1] // group)
    grouped = _padded(x, groups * group).view(x.shape[0], groups, group)
    largest = grouped.abs().amax(dim=2)
    finite = torch.isfinite(largest)
    safe = torch.where(finite & (largest > 0), largest, 1.0)
    inverse = torch.where(largest > 0, 127.0 / safe, 0.0)
    whole = (grouped * inverse[:, :, None]).round().clamp(-127, 127)
    whole = torch.where(finite[:, :, None], whole, 0.0)
    scales = torch.where(finite, largest * (1.0 / 127.0), float("nan"))
    return whole, scales


def _multiply_quantised(x: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    group = matrix.dot_group
    whole, x_scales = quantise(x, group)
    weights = integers(matrix).to(torch.float32)
    groups = whole.shape[1]
    weights = _padded(weights, groups * group).view(matrix.rows, groups, group)
    scales = scales_per_group(matrix).expand(matrix.rows, groups)
    out = x.new_zeros(x.shape[0], matrix.rows)
    for g in range(groups):
        # Sums of at most 128 products under 2^14 are exact in fp32.
        dots = whole[:, g] @ weights[:, g].T
        out += dots * (x_scales[:, g, None] * scales[None, :, g]) if matrix.group else dots * x_scales[:, g, None]
    return out if matrix.group else out * scales[:, 0]


def _padded(x: torch.Tensor, columns: int) -> torch.Tensor:
    """x [rows, any] with zeros up to ``columns``; itself where none are missing."""
    return x if x.shape[1] == columns else F.pad(x, (0, columns - x.shape[1]))


def norm(x: torch.Tensor, operation: Norm) -> torch.Tensor:
    """x [T, width] normed in groups of ``operation.group`` columns."""
    wide = x.view(x.shape[0], -1, operation.group)
    over, weight, bias = (operation.group,), operation.weight, operation.bias
    if weight is not None and operation.offset:
        weight = operation.offset + weight
    within = weight if weight is not None and weight.numel() == operation.group else None  # one launch on a GPU
    if operation.kind == "layer":
        wide = F.layer_norm(wide, over, within, eps=operation.eps)
    else:
        wide = F.rms_norm(wide, over, within, operation.eps)
    if weight is None and operation.offset:
        wide = wide * operation.offset
    elif weight is not None and within is None:
        wide = wide * weight.view(-1, operation.group)
    if bias is not None:
        wide = wide + bias.view(-1, operation.group)
    return wide.reshape(x.shape)


def rotate(x: torch.Tensor, positions: torch.Tensor, operation: Rope) -> None:
    """Turn, in place, each head's rotary columns of x [T, heads · head_dim]; ``positions`` [T] on x's device."""
    heads = x.view(x.shape[0], operation.heads, operation.head_dim)
    table = operation.table[positions]
    half = table.shape[1] // 2
    cos, sin = table[:, None, :half], table[:, None, half:]
    turned = heads[:, :, operation.first : operation.first + 2 * half]
    if operation.interleaved:
        a, b = turned[:, :, 0::2], turned[:, :, 1::2]
        turned[:] = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=3).flatten(2)
    else:
        a, b = turned[:, :, :half], turned[:, :, half:]
        turned[:] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=2)
