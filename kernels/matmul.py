"""y = x @ weight.T + bias for a weight in any format: the operation, its implementations, and which variant runs at which M."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import choose
from .packing import PackedWeight, nibble_rows

# ATen's packed CPU kernels win while the weights' bytes dominate; above, dequantizing blocks into a small bf16 buffer does.
CPU_PACKED_ROWS = {"int8": 8, "int4": 8}
CPU_BLOCK_ELEMENTS = 1 << 20  # weights dequantized at a time: 2 MB of bf16, which stays in the cache


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x [..., K] times weight [N, K] plus bias [N] -> [..., N] in x's dtype.

    impl "torch": any floating x; "aten" and "triton": bfloat16 x. ValueError for shapes, dtypes or devices that do not fit.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: x has {x.shape[-1]} features, the weight [{n}, {k}] takes {k}")
    if x.device != weight.device:
        raise ValueError(f"linear: x is on {x.device}, the weight on {weight.device}")
    run = choose("linear", LINEAR, impl, x.device)
    if run is not _torch and x.dtype != torch.bfloat16:
        raise ValueError(f"linear: impl {impl!r} computes in bfloat16, x is {x.dtype}; use impl='torch'")
    y: Tensor = run(x.reshape(-1, k), weight, bias)
    return y.view(*x.shape[:-1], n)


def _torch(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def _aten(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    run = _ATEN.get(weight.layout)
    if run is None:
        raise ValueError(f"linear: impl 'aten' has no operator for the layout {weight.layout!r}")
    y = run(x, weight)
    return y if bias is None else y.add_(bias)


def _mkldnn(x: Tensor, weight: PackedWeight) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")


def _int8pack(x: Tensor, weight: PackedWeight) -> Tensor:
    if x.shape[0] <= CPU_PACKED_ROWS["int8"]:
        return torch._weight_int8pack_mm(x, weight.data, weight.scale)
    n, k = weight.shape
    rows = max(64, CPU_BLOCK_ELEMENTS // k)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    for block in range(0, n, rows):  # the scale is applied to the product, so a block costs one conversion
        codes = weight.data[block:block + rows].to(x.dtype)
        torch.mul(F.linear(x, codes), weight.scale[block:block + rows], out=y[:, block:block + rows])
    return y


def _int4pack(x: Tensor, weight: PackedWeight) -> Tensor:
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.data, weight.group_size, weight.scale)
    return y[:, :weight.shape[0]]


_ATEN = {"plain": lambda x, w: F.linear(x, w.data), "mkldnn": _mkldnn, "int8pack": _int8pack, "int4pack": _int4pack}


def _triton(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    from .matmul_triton import linear_triton

    return linear_triton(x, weight, bias)


LINEAR = {"torch": _torch, "aten": _aten, "triton": _triton}
