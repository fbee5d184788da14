"""A16W4 matmul from planes: y[M, N] = x[M, K] @ w[N, K].T for small M, and the dequantizer for large M.

Why planes: at 4 bits per weight a GPU of 4.3 TB/s has under four instructions for each weight. A tile of int16 words
[BN, G/4] has the width of a bf16 operand, so it reaches the tensor core's left operand by the ordinary 16-byte path,
and a shift and one logic-and-or turn two words into two bf16 numbers 128 + code (`triton_common.nibbles_bf16`): nothing
is converted, subtracted or scaled per weight. What was left out is made good once per group, with xsum[m] = sum of x
over the group:

    y[n, m] += scale[n] * ( (128 + code) . x  -  (128 + zero[n]) * xsum[m] )

xsum comes from a dot with ones, which leaves it in the accumulator's own layout and costs a tensor-core instruction in
an idle pipe.

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

from .packing import PLANE_ROWS, PackedWeight
from .triton_common import INTERP, await_previous, dot, early_launch, nibbles_bf16, prefetch, prefetch_steps, to_bf16
from .tuning import SkinnyConfig


@triton.jit(do_not_specialize=["M", "groups_per_split"])
def a16w4_kernel(
    x, words, scales, out, M, N, N_PADDED, K, groups_per_split, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    G: tl.constexpr, STAGES: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    W: tl.constexpr = G // 4
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = K // G
    m, n, i = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, W)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    row = (n // ROWS).to(tl.int64) * groups * ROWS + n % ROWS + first * ROWS  # in units of W words
    words_at = words + row[:, None] * W + i[None, :]
    scale_at = scales + first * N_PADDED + n
    if AHEAD:  # a tile's rows lie side by side, so its lines of 64 words do too
        line = words + (tl.min(row, 0) * W + tl.arange(0, BN * W // 64) * 64)
        for step in tl.static_range(AHEAD):
            prefetch(line + step * ROWS * W)
    await_previous(EARLY)
    x_at = x + m[None, :].to(tl.int64) * K + i[:, None] + first * G
    live = (m < M)[None, :]
    ones = to_bf16(tl.full((BN, W), 1.0, tl.float32), INTERP)
    acc = tl.zeros((BN, BM), tl.float32)
    zeros = tl.zeros((BN, BM), tl.float32)
    for _ in tl.range(first, last, num_stages=STAGES):
        w = tl.load(words_at)
        word = tl.load(scale_at)
        scale = (word & -256).to(tl.float32, bitcast=True)
        zero = (((word & 127) << 16) | 0x43000000).to(tl.float32, bitcast=True)  # 128 + zero
        x0 = tl.load(x_at, mask=live, other=0.0)
        x1 = tl.load(x_at + W, mask=live, other=0.0)
        x2 = tl.load(x_at + 2 * W, mask=live, other=0.0)
        x3 = tl.load(x_at + 3 * W, mask=live, other=0.0)
        d = dot(nibbles_bf16(w, 0, INTERP), x0, zeros, INTERP)
        d = dot(nibbles_bf16(w, 4, INTERP), x1, d, INTERP)
        d = dot(nibbles_bf16(w, 8, INTERP), x2, d, INTERP)
        d = dot(nibbles_bf16(w, 12, INTERP), x3, d, INTERP)
        xsum = dot(ones, x0, zeros, INTERP)
        xsum = dot(ones, x1, xsum, INTERP)
        xsum = dot(ones, x2, xsum, INTERP)
        xsum = dot(ones, x3, xsum, INTERP)
        acc += scale[:, None] * (d - zero[:, None] * xsum)
        words_at += ROWS * W
        scale_at += N_PADDED
        x_at += G
    out_at = out + (split * M + m[None, :]).to(tl.int64) * N + n[:, None]
    inside = live & (n < N)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(out_at, to_bf16(acc, INTERP), mask=inside)
    else:
        tl.store(out_at, acc, mask=inside)


@triton.jit
def dequantize_kernel(
    words, scales, out, K, N_PADDED, first_row, rows, ROWS: tl.constexpr, G: tl.constexpr, INTERP: tl.constexpr
):
    """One tile of ROWS output features by one group: planes -> bf16 [rows, K]."""
    W: tl.constexpr = G // 4
    tile, group = tl.program_id(0), tl.program_id(1)
    r, i = tl.arange(0, ROWS), tl.arange(0, W)
    n = first_row + tile * ROWS + r
    w = tl.load(
        words + ((n // ROWS).to(tl.int64)[:, None] * (K // G) + group) * ROWS * W + (n % ROWS)[:, None] * W + i[None, :]
    )
    word = tl.load(scales + group * N_PADDED + n)
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


def a16w4_partials(x: Tensor, weight: PackedWeight, config: SkinnyConfig) -> Tensor:
    """x [M, K] bf16 times a planes weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where config has
    one split)."""
    assert weight.scale is not None and weight.group_size is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    per_split = triton.cdiv(k // g, config.splits)
    splits = triton.cdiv(k // g, per_split)  # none is empty, so every partial is written
    out = torch.empty(splits, m, n, dtype=torch.float32 if splits > 1 else torch.bfloat16, device=x.device)
    n_padded = weight.scale.shape[1]
    grid = (triton.cdiv(n_padded, config.block_n), triton.cdiv(m, config.block_m), splits)
    a16w4_kernel[grid](
        x, weight.data, weight.scale, out, m, n, n_padded, k, per_split, PLANE_ROWS, config.block_m, config.block_n, g,
        config.stages, prefetch_steps(grid[0] * grid[1] * splits, config.block_n * g // 2, per_split), early_launch(),
        INTERP, num_warps=config.warps, num_stages=config.stages, launch_pdl=early_launch(),
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
