"""Layouts for CPUs: ATen's and oneDNN's packings."""

from __future__ import annotations

from functools import lru_cache

import torch

from .packed import PackedWeight, pad_rows
from .unpacking import CPU_ROWS
from .weights import QuantizedWeight


@lru_cache(maxsize=1)
def has_mkldnn_linear() -> bool:
    """Whether this build of torch has oneDNN's prepacked bf16 linear."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=1)
def has_packed_int8() -> bool:
    """Whether oneDNN multiplies by prepacked int8 here, exactly and fast: where the vector unit adds products of bytes
    in 32 bits (VNNI). Without, an x86 CPU adds pairs of them in 16 bits, which overflow."""
    built = hasattr(torch.ops.onednn, "qlinear_prepack") and hasattr(torch.ops.onednn, "qlinear_pointwise")
    return built and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def pack_nibbles(weight: QuantizedWeight) -> PackedWeight:
    """int8 codes as two int4 planes side by side, [N, 2K]: code = 16 * high + low, high in -8..7, low in 0..15.

    ATen's int4 operator streams its tiles in the order it reads them, its int8 operator takes four short rows at once:
    from memory, at K = 896 and one row of x, the first needs half the time at N = 151,936 and three quarters of it at
    N = 9,728, for the same bytes (2-core Zen 4). Both planes are exact in
    bf16 and summed in float32, so the product is that of the int8 codes.
    """
    assert weight.scale is not None
    n, k = weight.shape
    g = nibble_group(k)
    codes = pad_rows(weight.codes.to(torch.int32), CPU_ROWS)
    data = torch._convert_weight_to_int4pack_for_cpu(torch.cat(((codes >> 4) + 8, codes & 15), 1), 2)
    high, low = torch.tensor([16.0, 0.0]), torch.tensor([1.0, 8.0])  # ATen: w = (code - 8) * scale + offset
    planes = torch.stack((high, low)).repeat_interleave(k // g, 0)
    scale = planes[:, None].expand(-1, len(codes), -1).bfloat16().contiguous()
    return PackedWeight("int8", "nibbles", (n, k), data, weight.scale.bfloat16(), g, scale)


def nibble_group(k: int) -> int:
    """The largest group ATen takes that divides K, 0 where none does."""
    return next((g for g in (256, 128, 64, 32) if k % g == 0), 0)


def pack_int4_cpu(weight: QuantizedWeight) -> PackedWeight:
    assert weight.scale is not None and weight.zero is not None and weight.group_size is not None
    codes = pad_rows(weight.codes, CPU_ROWS).to(torch.int32)
    data = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale = pad_rows(weight.scale, CPU_ROWS)
    offset = (8 - pad_rows(weight.zero, CPU_ROWS).float()) * scale  # ATen: w = (code - 8) * scale + offset
    return PackedWeight(
        weight.format,
        "int4pack",
        weight.shape,
        data,
        torch.stack((scale.t(), offset.t()), -1).bfloat16().contiguous(),
        weight.group_size,
    )


def pack_mkldnn(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(
        "bf16", "mkldnn", weight.shape, torch.ops.mkldnn._reorder_linear_weight(weight.codes.contiguous())
    )


def pack_onednn8(weight: QuantizedWeight) -> PackedWeight:
    """int8 codes in oneDNN's blocking, which holds the sums of rows beside them: it multiplies unsigned x and takes the
    zero point of 128 off by those. The scale stays float32, as the operator reads it."""
    assert weight.scale is not None
    data = torch.ops.onednn.qlinear_prepack(weight.codes.contiguous(), None)
    return PackedWeight(weight.format, "onednn8", weight.shape, data, weight.scale.float())
