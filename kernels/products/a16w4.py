"""A16W4 matmul from planes: y[M, N] = x[M, K] @ w[N, K].T for M up to a few hundred, and the dequantizer for more.

Why planes: at 4 bits per weight a GPU of 4.3 TB/s has under four instructions for each weight. A tile of int16 words
[BN, G/4] has the width of a bf16 operand, so it reaches the tensor core's left operand by the ordinary 16-byte path,
and a shift and one logic-and-or turn two words into two bf16 numbers 128 + code (`triton_common.nibbles_bf16`): nothing
is converted or scaled per weight. The scale is applied to the accumulator, once per group. The zero point leaves in one
of two ways:

    sums given      y[n, m] += scale[n] * ( (128 + code) . x  -  (128 + zero[n]) * sums[g, m] )
    no sums         y[n, m] += scale[n] * ( ((128 + code) - (128 + zero[n])) . x )

The first costs nothing per weight but needs sums[g, m], the sum of x over each group, from whoever made x; the second
costs half an instruction. Both are exact before the scale. (Sums by a dot with ones, in the kernel itself, doubled the
tensor core's work: 57 us instead of 37 at M = 64, N = 28672, K = 4096 on an H200.)

    w tile      words [BN, G/4]  --shift, lop3-->  4 planes [BN, G/4] bf16        (left operand)
    x tile      [G/4, BM] for each plane, K contiguous                            (right operand)
    partial     [SPLITS, M, N] float32, reduced by `reduce_splits` (or by the consumer): deterministic, no atomics
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.unpacking import PLANE_ROWS
from ..triton_common import (
    INTERP,
    admission,
    admit_next,
    await_previous,
    dot,
    early_launch,
    feature_rows,
    fetch_l2,
    minus_bf16,
    new_partials,
    nibbles_bf16,
    store_product,
    to_bf16,
)
from ..tuning import SkinnyConfig


@triton.jit
def plane(words, zero, SHIFT: tl.constexpr, SUBTRACT: tl.constexpr, INTERP: tl.constexpr):
    """bf16 128 + code of one plane, or the code less its zero point; zero [rows, 1] is bf16 128 + zero."""
    code = nibbles_bf16(words, SHIFT, INTERP)
    return minus_bf16(code, tl.broadcast_to(zero, code.shape), INTERP) if SUBTRACT else code


@triton.jit
def rows_at(words, n, group, groups, ROWS: tl.constexpr, W: tl.constexpr):
    """Pointers to the first of the W words of a group of weight rows n."""
    return words + ((n // ROWS).to(tl.int64) * groups * ROWS + n % ROWS + group * ROWS) * W


@triton.jit
def planes_at(words, scales, n, group, groups, N_PADDED, ROWS: tl.constexpr, W: tl.constexpr):
    """Pointers to a group of weight rows n: words [rows, W] and scale words [rows]. From group to group it is ROWS * W
    words and N_PADDED scale words."""
    first = rows_at(words, n, group, groups, ROWS, W)
    return first[:, None] + tl.arange(0, W)[None, :], scales + group * N_PADDED + n


@triton.jit(do_not_specialize=["M", "groups_per_split"])
def a16w4_kernel(
    x, words, scales, sums, out, M, N, N_PADDED, K, groups_per_split, ROWS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, GATED: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    W: tl.constexpr = G // 4
    SUBTRACT: tl.constexpr = sums is None
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = K // G
    m, n, i = tile_m * BM + tl.arange(0, BM), feature_rows(tile_n, N, BN, GATED), tl.arange(0, W)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    here = n % N_PADDED  # where BN does not divide it, rows past the end repeat others, not stored
    words_at, scale_at = planes_at(words, scales, here, first, groups, N_PADDED, ROWS, W)
    for group in tl.static_range(AHEAD):
        coming = tl.minimum(first + group, groups - 1)
        fetch_l2(rows_at(words, here, coming, groups, ROWS, W), INTERP)
        fetch_l2(scales + coming * N_PADDED + here, INTERP)
    await_previous(EARLY)
    x_at = x + m[None, :].to(tl.int64) * K + i[:, None] + first * G
    live = (m < M)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    zeros = tl.zeros((BN, BM), tl.float32)
    for group in tl.range(first, last, num_stages=STAGES):
        w = tl.load(words_at)
        word = tl.load(scale_at)
        zero_bits = (word & 127) | 0x4300  # bf16 128 + zero
        zero = zero_bits.to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]
        x0 = tl.load(x_at, mask=live, other=0.0)
        x1 = tl.load(x_at + W, mask=live, other=0.0)
        x2 = tl.load(x_at + 2 * W, mask=live, other=0.0)
        x3 = tl.load(x_at + 3 * W, mask=live, other=0.0)
        d = dot(plane(w, zero, 0, SUBTRACT, INTERP), x0, zeros, INTERP)
        d = dot(plane(w, zero, 4, SUBTRACT, INTERP), x1, d, INTERP)
        d = dot(plane(w, zero, 8, SUBTRACT, INTERP), x2, d, INTERP)
        d = dot(plane(w, zero, 12, SUBTRACT, INTERP), x3, d, INTERP)
        if not SUBTRACT:
            total = tl.load(sums + group * M + m, mask=m < M, other=0.0)
            d -= (zero_bits << 16).to(tl.float32, bitcast=True)[:, None] * total[None, :]
        acc += (word & -256).to(tl.float32, bitcast=True)[:, None] * d
        words_at += ROWS * W
        scale_at += N_PADDED
        x_at += G
    admit_next(EARLY)
    store_product(out, acc, tile_n, split, m, M, N, BN, BM, GATED, INTERP)


@triton.jit
def dequantize_kernel(
    words, scales, out, K, N_PADDED, first_row, rows, ROWS: tl.constexpr, G: tl.constexpr, INTERP: tl.constexpr
):
    """One tile of ROWS output features by one group: planes -> bf16 [rows, K]."""
    W: tl.constexpr = G // 4
    tile, group = tl.program_id(0), tl.program_id(1)
    r, i = tl.arange(0, ROWS), tl.arange(0, W)
    n = first_row + tile * ROWS + r
    words_at, scale_at = planes_at(words, scales, n, group, K // G, N_PADDED, ROWS, W)
    w, word = tl.load(words_at), tl.load(scale_at)
    scale = (word & -256).to(tl.float32, bitcast=True)[:, None]
    zero = (word & 255).to(tl.float32)[:, None]
    at = out + (tile * ROWS + r)[:, None].to(tl.int64) * K + group * G + i[None, :]
    inside = (tile * ROWS + r < rows)[:, None]
    for plane in tl.static_range(4):
        code = ((w >> (4 * plane)) & 15).to(tl.float32)
        tl.store(at + plane * W, to_bf16((code - zero) * scale, INTERP), mask=inside)


@triton.jit
def reduce_splits_kernel(
    partial, bias, out, size, N, SPLITS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr
):
    await_previous(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(partial + split * size + at, mask=at < size, other=0.0)
    if bias is not None:
        total += tl.load(bias + at % N, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + at, to_bf16(total, INTERP), mask=at < size)


def reduce_splits(partial: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum float32 partials [SPLITS, M, N] (and a bias [N]) into bf16 [M, N]."""
    splits, m, n = partial.shape
    out = torch.empty(m, n, dtype=torch.bfloat16, device=partial.device)
    block = 256 if m * n <= 1 << 17 else 1024
    reduce_splits_kernel[(triton.cdiv(m * n, block),)](
        partial, bias, out, m * n, n, splits, block, early_launch(), INTERP, num_warps=block // 128,
        launch_pdl=early_launch(),
    )
    return out


def a16w4_partials(
    x: Tensor, weight: PackedWeight, config: SkinnyConfig, sums: Tensor | None = None, gated: bool = False
) -> Tensor:
    """x [M, K] bf16 times a planes weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where config has
    one split). sums: float32 [K/G, M], of x over each group. gated: bf16 silu(gate) * up [1, M, N/2] of a fused weight
    by a config of one split, N/2 a multiple of half its block_n."""
    assert weight.scale is not None and weight.group_size is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    out, per_split = new_partials(k // g, config.splits, m, n // 2 if gated else n, x.device)
    n_padded, early = weight.scale.shape[1], admission(config.late)
    grid = (triton.cdiv(n if gated else n_padded, config.block_n), triton.cdiv(m, config.block_m), out.shape[0])
    a16w4_kernel[grid](
        x, weight.data, weight.scale, sums, out, m, n, n_padded, k, per_split, PLANE_ROWS, config.block_m,
        config.block_n, g, gated, config.ahead, config.stages, early, INTERP, num_warps=config.warps,
        num_stages=config.stages, launch_pdl=early > 0,
    )
    return out


def dequantize_rows(weight: PackedWeight, first: int, out: Tensor) -> None:
    """Write rows first : first + len(out) of a planes weight as bf16 into out [rows, K]; `first` is a multiple of
    64."""
    assert weight.scale is not None and weight.group_size is not None
    rows, k = out.shape
    grid = (triton.cdiv(rows, PLANE_ROWS), k // weight.group_size)
    dequantize_kernel[grid](
        weight.data, weight.scale, out, k, weight.scale.shape[1], first, rows, PLANE_ROWS, weight.group_size, INTERP,
        num_warps=4,
    )
