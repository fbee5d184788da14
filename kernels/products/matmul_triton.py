"""The CUDA variants of `linear`, and the one function that picks by M."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.unpacking import PLANE_ROWS
from ..formats.weights import WEIGHT_FORMATS, weight_format
from ..rows.activations import Activations, Operand, SummedRows, activation_codes
from ..triton_common import INTERP, warp_group_products
from ..tuning import (
    HopperConfig,
    SkinnyConfig,
    WideConfig,
    a8w8_config,
    gated_config,
    hopper_config,
    pairs_config,
    pairs_hopper_config,
    plain_config,
    planes_config,
    wide_config,
)
from .a8w4 import a8w4_partials, requantize_rows
from .a8w8 import a8w8_partials
from .a16w4 import a16w4_partials, dequantize_rows, reduce_splits
from .skinny import skinny_partials, widen_rows
from .wide import wide_partials

Config = SkinnyConfig | WideConfig | HopperConfig

# Up to these rows a kernel of ours streams the weight; above, it is dequantized once (in slices) and multiplied by
# cuBLAS. bf16 goes to cuBLAS directly; where a format has 8-bit activations, they have 8 bits there.
FUSED_ROWS = {"bf16": 64, "int8": 256, "int4": 256}
FUSED_ROWS |= {name: form.sixteen_bit_rows for name, form in WEIGHT_FORMATS.items() if form.activations}
HOPPER_ROWS = 2048  # int4 by `a16w4_hopper`, int8 by `a16w8_hopper`
# w4a8: up to here the weight becomes int8 in registers (`a8w4`), above once (in slices), for the product of w8a8.
REQUANTIZED_ROWS = 512
# 4-bit weights: up to here scales are applied per group to the accumulator (`a16w4`), above to the weight (`wide`, or
# `a16w4_hopper`, which is worth it from fewer rows). int8: up to here by `skinny` on Hopper too.
SKINNY_ROWS, HOPPER_SKINNY_ROWS = 64, 32
DEQUANTIZED_ELEMENTS = 1 << 24  # 32 MB of bf16 workspace at a time, which stays in the L2 cache
REQUANTIZED_ELEMENTS = 1 << 25  # the same of int8


def linear_triton(x: Operand, weight: PackedWeight, bias: Tensor | None, partial: bool = False) -> Tensor:
    """x [M, K] bf16 or in 8 bits, weight in its CUDA layout -> bf16 [M, N], or float32 partials [S, M, N] where
    `partial` allows it and K is split."""
    if weight.layout not in _readable(weight.format):
        raise ValueError(f"linear: impl 'triton' cannot read the layout {weight.layout!r} of {weight.format}")
    if isinstance(x, Activations):
        return linear_8_bit(x, weight, bias, partial=partial)
    if x.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=x.dtype, device=x.device)
    if isinstance(x, SummedRows):
        return _summed(linear_partials(x, weight), bias, partial)
    x = x.contiguous()
    if x.shape[0] > fused_rows(weight):
        return F.linear(x, weight.data, bias) if weight.format == "bf16" else _dequantize_once(x, weight, bias)
    return _summed(linear_partials(x, weight), bias, partial)


def _readable(format: str) -> tuple[str, ...]:
    """The layouts that kernels read."""
    return ("planes",) if weight_format(format).grouped else ("pairs", "plain") if format == "int8" else ("plain",)


def by_hopper(weight: PackedWeight) -> bool:
    """Whether `a16w4_hopper`, or of pairs `a16w8_hopper`, takes the weight on this GPU."""
    fits = weight.layout == "planes" and weight.group_size == 128
    return (fits or (weight.layout == "pairs" and weight.shape[1] % 8 == 0)) and warp_group_products()


def fused_rows(weight: PackedWeight) -> int:
    """The most rows of 16-bit x for which the weight is read as it is stored."""
    return HOPPER_ROWS if weight.format in ("int4", "int8") and by_hopper(weight) else FUSED_ROWS[weight.format]


def linear_8_bit(
    x: Activations, weight: PackedWeight, bias: Tensor | None = None, config: WideConfig | None = None,
    partial: bool = False,
) -> Tensor:
    """x [M, K] times a plain weight in the same codes, or int8 x times a 4-bit weight -> bf16 [M, N]: e4m3 of many rows
    by cuBLAS where it takes the shape, the rest by our kernels."""
    if x.shape[0] == 0:
        return torch.empty(0, weight.shape[0], dtype=torch.bfloat16, device=x.device)
    if weight.layout == "planes":
        if x.shape[0] > REQUANTIZED_ROWS:
            return requantized_once(x, weight, bias)
        return _summed(a8w4_partials(x, weight, config), bias, partial)
    by_cublas = weight.format == "fp8" and x.shape[0] > SKINNY_ROWS and weight.shape[0] % 16 == 0
    if config is None and by_cublas and not INTERP:
        assert weight.scale is not None
        return torch._scaled_mm(
            x.codes, weight.data.t(), x.scale[:, None], weight.scale[None], bias=bias, out_dtype=torch.bfloat16
        )
    return _summed(a8w8_partials(x, weight, config), bias, partial)


def requantized_once(x: Activations, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """x [M, K] int8 times a 4-bit weight whose int8 form is made first, some rows of it at a time -> bf16 [M, N]."""
    assert weight.channel is not None
    (m, k), n = x.shape, weight.shape[0]
    rows = _slice_rows(n, k, REQUANTIZED_ELEMENTS)
    codes = torch.empty(rows, k, dtype=torch.int8, device=x.device)
    y = torch.empty(1, m, n, dtype=torch.bfloat16, device=x.device)
    config = a8w8_config(m, n, k)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        requantize_rows(weight, first, codes[:count])
        channel = weight.channel[first : first + count]
        part = PackedWeight("w8a8", "plain", (count, k), codes[:count], channel)
        a8w8_partials(x, part, config, y[:, :, first : first + count])
    return _summed(y, bias)


def linear_partials(x: Tensor | SummedRows, weight: PackedWeight, config: Config | None = None) -> Tensor:
    """The split-K partials [SPLITS, M, N] of x @ weight.T, for a consumer that sums them (float32; bf16 where there is
    one split)."""
    (m, k), n = x.shape, weight.shape[0]
    x, sums = (x.x, x.sums) if isinstance(x, SummedRows) else (x, None)
    if weight.layout == "planes":
        config = config or four_bit_config(m, weight)
        if isinstance(config, WideConfig):
            return wide_partials(x, weight, config)
    elif weight.layout == "pairs":
        config = config or pairs_tiles(m, weight)
    else:
        config = config or plain_config(m, n, k, weight.data.element_size())
    return streamed(x, weight, config, sums)


def streamed(
    x: Tensor, weight: PackedWeight, config: Config, sums: Tensor | None = None, gated: bool = False
) -> Tensor:
    """As `a16w4_partials`, by the kernel that the weight's layout and the tiles are for."""
    if isinstance(config, HopperConfig):
        from .a16w4_hopper import a16w4_hopper_partials
        from .a16w8_hopper import a16w8_hopper_partials
        from .bf16_hopper import bf16_hopper_partials

        by_layout = {"planes": a16w4_hopper_partials, "pairs": a16w8_hopper_partials, "plain": bf16_hopper_partials}
        return by_layout[weight.layout](x, weight, config, gated)
    if weight.layout == "planes":
        assert isinstance(config, SkinnyConfig)
        return a16w4_partials(x, weight, config, sums, gated)
    return skinny_partials(x, weight, config, gated)


def four_bit_config(m: int, weight: PackedWeight) -> Config:
    """Tiles for x of m rows, and by their type the kernel."""
    n, k = weight.shape
    assert weight.group_size is not None
    if m <= (HOPPER_SKINNY_ROWS if by_hopper(weight) else SKINNY_ROWS):
        return planes_config(m, n, k, weight.group_size)
    return hopper_config(m, n, k) if by_hopper(weight) else wide_config(m, n, k, weight.group_size)


def pairs_tiles(m: int, weight: PackedWeight) -> Config:
    """Tiles for x of m rows and int8 codes in pairs, and by their type the kernel."""
    by_rows = pairs_hopper_config if m > HOPPER_SKINNY_ROWS and by_hopper(weight) else pairs_config
    return by_rows(m, *weight.shape)


def linear_fused(
    x: Tensor | SummedRows, weight: PackedWeight, bias: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """x [M, K] times the weight as it is stored, the splits of K summed -> bf16 [M, N]."""
    return _summed(linear_partials(x, weight, config), bias)


def gated_fused(x: Tensor, weight: PackedWeight) -> Tensor | None:
    """bf16 silu(gate) * up [M, I] of x [M, K] bf16 and a fused weight [2I, K], by one kernel; None where M is large or
    the format rounds x, or its tiles are better split over K or do not fit."""
    (m, k), n = x.shape, weight.shape[0]
    if not 0 < m <= SKINNY_ROWS or x.dtype != torch.bfloat16 or activation_codes(weight.format, m) is not None:
        return None
    if weight.layout not in _readable(weight.format) or weight.device != x.device:  # `linear` says what is wrong
        return None
    if weight.layout == "planes":
        assert weight.group_size is not None
        kind, plain = "planes", planes_config(m, n, k, weight.group_size)
    elif weight.layout == "pairs":
        kind, plain = "pairs", pairs_config(m, n, k)
    else:
        kind = "bf16" if weight.format == "bf16" else "int8"
        plain = plain_config(m, n, k, weight.data.element_size())
    config = gated_config(kind, m, n, k, plain)
    if isinstance(config, HopperConfig) and weight.group_size not in (None, 128):
        config = plain
    if config.splits > 1 or n % config.block_n:
        return None
    return streamed(x.contiguous(), weight, config, gated=True)[0]


def _summed(partials: Tensor, bias: Tensor | None, partial: bool = False) -> Tensor:
    if partials.shape[0] > 1:
        return partials if partial and bias is None else reduce_splits(partials, bias)
    return partials[0] if bias is None else partials[0].add_(bias)


def _slice_rows(n: int, k: int, elements: int) -> int:
    """Rows of a weight [n, k] that a workspace of so many elements takes, whole tiles of planes."""
    return min(n, max(PLANE_ROWS, elements // k // PLANE_ROWS * PLANE_ROWS))


def _dequantize_once(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    (m, k), n = x.shape, weight.shape[0]
    rows = _slice_rows(n, k, DEQUANTIZED_ELEMENTS)
    dense = torch.empty(rows, k, dtype=torch.bfloat16, device=x.device)
    y = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    for first in range(0, n, rows):
        count = min(rows, n - first)
        if weight.layout == "planes":
            dequantize_rows(weight, first, dense[:count])
        else:
            widen_rows(weight, first, dense[:count])
        torch.mm(x, dense[:count].t(), out=y[:, first : first + count])
    return y if bias is None else y.add_(bias)
