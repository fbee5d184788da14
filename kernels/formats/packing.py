"""Device layouts of a weight: what `linear` reads.

plain     [N, K] as it is (bf16, w8a8 and fp8 on CUDA, fp8 on CPU), scale [N]: float32 for fp8, else bf16
planes    int4 and w4a8 on CUDA, see `pack_planes`
pairs     int8 on CUDA, see `pack_pairs`
mkldnn    bf16 on CPU, oneDNN's own blocking
int8pack  int8 and other w8a8 on CPU, [N, K] int8 and bf16 scale [N], for torch._weight_int8pack_mm
nibbles   int8 on CPU where that operator is slow, see `pack_nibbles`
int4pack  int4 and w4a8 on CPU, [N/64, K, 32] uint8 and bf16 (scale, zero) [K/G, N, 2], for torch's
          _weight_int4pack_mm_for_cpu
onednn8   w8a8 on CPU from `ONEDNN8_FROM` elements on, where oneDNN has it, see `pack_onednn8`
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .cpu_layouts import (
    has_mkldnn_linear,
    has_packed_int8,
    nibble_group,
    pack_int4_cpu,
    pack_mkldnn,
    pack_nibbles,
    pack_onednn8,
)
from .packed import PackedWeight, pad_rows
from .unpacking import GRID, PAIR_GROUP, PLANE_ROWS
from .weights import QuantizedWeight, channel_scales, check_groups, quantize_weight, weight_format

NIBBLES_ABOVE = 8 << 20  # int8 elements: a weight with short rows that comes from memory, not from a cache
ONEDNN8_FROM = 2 << 20  # int8 elements of w8a8: below, oneDNN's product takes longer to prepare than to compute


# planes: 4 bits on CUDA


def pack_planes(weight: QuantizedWeight) -> PackedWeight:
    """4-bit codes as int16 words whose tile has the shape and width of a bf16 operand of the tensor core.

        word[n, g, i] = code[k0+i] | code[k0+G/4+i] << 4 | code[k0+2G/4+i] << 8 | code[k0+3G/4+i] << 12
        with k0 = g*G and i < G/4

    Tiles of 64 output features are contiguous: [N/64, K/G, 64, G/4] int16, N padded with zero scales. The scale [K/G,
    N] int32 holds the float32 scale in its upper 24 bits (16 significant bits: exact for any bf16 or fp16 scale) and
    the zero point in the lower 8.
    """
    assert weight.scale is not None and weight.zero is not None and weight.group_size is not None
    n, k = weight.shape
    g = weight.group_size
    codes = pad_rows(weight.codes, PLANE_ROWS)
    c = codes.view(-1, k // g, 4, g // 4).to(torch.int16)
    words = c[:, :, 0] | c[:, :, 1] << 4 | c[:, :, 2] << 8 | c[:, :, 3] << 12
    words = words.view(-1, PLANE_ROWS, k // g, g // 4).transpose(1, 2).contiguous()
    bits = (weight.scale.float().view(torch.int32) + 0x80) & ~0xFF
    scale = pad_rows(bits | weight.zero.to(torch.int32), PLANE_ROWS).t().contiguous()
    return PackedWeight(weight.format, "planes", (n, k), words, scale, g)


# pairs: int8 on CUDA


def pack_pairs(weight: QuantizedWeight) -> PackedWeight:
    """int8 codes as int16 words [N, K/2] whose tile has the shape and width of a bf16 operand of the tensor core.

        word[n, g, i] = (code[k0+i] & 255) | code[k0+64+i] << 8       with k0 = 128 g and i < 64

    K is padded with zeros to whole groups of 128. A row is as long and as contiguous as in plain codes, and its groups
    are the lines of 128 bytes that kernels read. The scale [N] is bf16.
    """
    assert weight.scale is not None
    codes, columns = weight.codes, -weight.shape[1] % PAIR_GROUP
    codes = torch.nn.functional.pad(codes, (0, columns)) if columns else codes
    pairs = codes.view(len(codes), -1, 2, PAIR_GROUP // 2).transpose(2, 3).contiguous()
    words = pairs.view(torch.int16).view(len(codes), -1)  # the first byte is the low one
    return PackedWeight(weight.format, "pairs", weight.shape, words, weight.scale.bfloat16())


# choosing


def _plain(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(
        weight.format, "plain", weight.shape, weight.codes.contiguous(),
        None if weight.scale is None else weight.scale.to(weight_format(weight.format).scale_dtype),
    )


_PACK = {
    "plain": _plain,
    "planes": pack_planes,
    "pairs": pack_pairs,
    "mkldnn": pack_mkldnn,
    "int8pack": lambda w: _relabel(_plain(w)),
    "nibbles": pack_nibbles,
    "int4pack": pack_int4_cpu,
    "onednn8": pack_onednn8,
}
def _relabel(packed: PackedWeight) -> PackedWeight:
    return PackedWeight(packed.format, "int8pack", packed.shape, packed.data, packed.scale)


def device_layout(format: str, device: torch.device, shape: tuple[int, int]) -> str:
    """The layout that the fast path of a device reads for a weight of that shape."""
    n, k = shape
    if device.type == "cpu":
        if format == "int8" and n * k > NIBBLES_ABOVE and k < 2048 and nibble_group(k):
            return "nibbles"
        if format == "w8a8" and n * k >= ONEDNN8_FROM and has_packed_int8():
            return "onednn8"
        layouts = {"int8": "int8pack", "int4": "int4pack", "w8a8": "int8pack", "fp8": "plain", "w4a8": "int4pack"}
        return layouts.get(format) or ("mkldnn" if has_mkldnn_linear() else "plain")
    return "planes" if weight_format(format).grouped else "pairs" if format == "int8" else "plain"


def pack_weight(
    weight: Tensor | QuantizedWeight, format: str, *, group_size: int = 128, device: torch.device | str,
    layout: str | None = None,
) -> PackedWeight:
    """Quantize (a floating [N, K] tensor) and lay out a weight for `linear` on `device`.

    layout: one of the names above instead of the device's own (tests pack planes on the CPU for the interpreter).
    ValueError: as `quantize_weight`; a QuantizedWeight of another format; fp8 for a GPU that has no fp8.
    """
    device = torch.device(device)
    weight_format(format)
    if format == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or later, this one has {found[0]}.{found[1]}; w8a8 takes the "
            "same bytes"
        )
    if isinstance(weight, Tensor):
        weight = quantize_weight(weight.to(device), format, group_size)
    elif weight.format != format:
        raise ValueError(f"the weight is quantized as {weight.format!r}, not {format!r}")
    if weight.group_size is not None:
        check_groups(weight.shape[1], weight.group_size)
    moved = [None if t is None else t.to(device) for t in (weight.codes, weight.scale, weight.zero)]
    assert moved[0] is not None
    packed = _PACK[layout or device_layout(format, device, weight.shape)](
        QuantizedWeight(format, moved[0], moved[1], moved[2], weight.group_size)
    )
    if format == "w4a8":
        packed = replace(packed, channel=channel_scales(*GRID[packed.layout](packed)))
    return packed if weight.order is None else replace(packed, order=weight.order.to(device))


def random_weight(n: int, k: int, std: float, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """A Gaussian [n, k] bfloat16 weight drawn on `device`, for synthetic models; `generator` must live there too."""
    return torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator)
