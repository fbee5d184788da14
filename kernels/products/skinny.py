"""bf16 and A16W8 (int8, e4m3) matmul for M up to a few hundred: y[M, N] = x[M, K] @ w[N, K].T, a stream over the weight
rows; and the dequantizer for more.

At M <= 16 the time is the weight's bytes over the bandwidth, so all that counts is bytes in flight: many small
programs, deep pipelines, and splits of K where N alone gives too few programs. Above, instructions count too, and int8
codes come in pairs (`packing.pack_pairs`): a tile of int16 words [BN, 64] has the width of a bf16 operand, so it
reaches the tensor core's left operand by the ordinary 16-byte path, and seven instructions turn four codes into bf16
(`triton_common.int8_bf16`). Plain int8 codes (w8a8) become bf16 by Triton's own conversion and change their layout on
the way, so that a loop has twice as many instructions; e4m3 by way of fp16, which holds them all: two codes take one
instruction (cvt.rn.f16x2.e4m3x2), where straight to bf16 the compiler goes through the slow conversion pipe. All are
exact; the scale of the output channel is applied to the accumulator.

    w [BN, BK]  left operand, K contiguous      x [BK, BM]  right operand, columns past M are zeros
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.unpacking import PAIR_GROUP
from ..triton_common import (
    INTERP,
    admission,
    admit_next,
    await_previous,
    dot,
    feature_rows,
    fetch_l2,
    int8_bf16,
    new_partials,
    store_product,
    to_bf16,
)
from ..tuning import SkinnyConfig, WideConfig


@triton.jit
def widened(codes, INTERP: tl.constexpr):
    """Plain codes as bf16, exactly."""
    if INTERP:
        return codes.to(tl.float32)
    if codes.dtype == tl.float8e4nv:
        codes = codes.to(tl.float16)
    return codes.to(tl.bfloat16)


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x, w, scale, out, M, N, K, k_per_split, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    GATED: tl.constexpr, DOTS: tl.constexpr, AHEAD: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    INTERP: tl.constexpr,
):
    PAIRS: tl.constexpr = w.dtype.element_ty == tl.int16
    WIDTH: tl.constexpr = BK // DOTS  # columns of one product
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, n, i = tile_m * BM + tl.arange(0, BM), feature_rows(tile_n, N, BN, GATED), tl.arange(0, WIDTH)
    if scale is not None:  # parameters: no need to wait for them
        factor = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)
    first = split * k_per_split
    last = tl.minimum(first + k_per_split, K)
    length = tl.cdiv(K, 2 * WIDTH) * WIDTH if PAIRS else K  # of a row of w
    w_at = w + n[:, None].to(tl.int64) * length + i[None, :]
    if AHEAD:
        LINE: tl.constexpr = 1024 // w.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = (AHEAD * (BK // 2 if PAIRS else BK) + LINE - 1) // LINE
        coming = (first // 2 if PAIRS else first) + tl.arange(0, LINES) * LINE
        row = w + tl.minimum(n, N - 1)[:, None].to(tl.int64) * length
        fetch_l2(row + tl.minimum(coming, length - 1)[None, :], INTERP)
    await_previous(EARLY)
    x_at = x + m[None, :].to(tl.int64) * K + i[:, None]
    live_m, live_n = (m < M)[None, :], (n < N)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    tl.assume(first < last)  # or ptxas serializes warp-group products (C7515)
    for k in tl.range(first, last, BK, num_stages=STAGES):
        for part in tl.static_range(DOTS):
            at = k + part * WIDTH
            if PAIRS:
                if part % 2 == 0:
                    words = tl.load(w_at + at // 2, mask=live_n & (EVEN or at // 2 < length), other=0)
                a = int8_bf16(words, part % 2 == 1, INTERP)
            elif EVEN:
                a = widened(tl.load(w_at + at, mask=live_n, other=0.0), INTERP)
            else:
                a = widened(tl.load(w_at + at, mask=live_n & (at + i < last)[None, :], other=0.0), INTERP)
            if EVEN:
                b = tl.load(x_at + at, mask=live_m, other=0.0)
            else:
                b = tl.load(x_at + at, mask=live_m & (at + i < last)[:, None], other=0.0)
            acc = dot(a, b, acc, INTERP)
    admit_next(EARLY)
    if scale is not None:
        acc *= factor[:, None]
    store_product(out, acc, tile_n, split, m, M, N, BN, BM, GATED, INTERP)


def products_per_step(codes: torch.dtype, config: SkinnyConfig | WideConfig) -> int:
    """Products in one step of K, the constant DOTS: of pairs, one for each half of a group. Of a loop with a single
    warp-group product (four warps or more, at least 16 rows) Triton lets it run while the next step's codes are
    converted, which overwrites registers it still reads (https://github.com/triton-lang/triton/issues/9433); behind two
    it waits for both."""
    if codes == torch.int16:
        assert config.block_k % PAIR_GROUP == 0
        return 2 * config.block_k // PAIR_GROUP
    return 2 if codes.itemsize == 1 and config.block_m > 8 and config.warps >= 4 else 1


def skinny_partials(
    x: Tensor, weight: PackedWeight, config: SkinnyConfig | WideConfig, gated: bool = False
) -> Tensor:
    """x [M, K] bf16 times a plain bf16, int8 or fp8 weight, or int8 pairs -> float32 partials [SPLITS, M, N] (bf16
    [1, M, N] where config has one split). gated: as in `a16w4_partials`."""
    (m, k), n = x.shape, weight.shape[0]
    bk = config.block_k
    out, per_split = new_partials(triton.cdiv(k, bk), config.splits, m, n // 2 if gated else n, x.device)
    early = admission(config.late)
    dots = products_per_step(weight.data.dtype, config)
    ahead = config.ahead if isinstance(config, SkinnyConfig) else 0
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), out.shape[0])
    skinny_kernel[grid](
        x, weight.data, weight.scale, out, m, n, k, per_split * bk, config.block_m, config.block_n, bk, k % bk == 0,
        gated, dots, ahead, config.stages, early, INTERP, num_warps=config.warps, num_stages=config.stages,
        launch_pdl=early > 0,
    )
    return out


@triton.jit
def widen_kernel(codes, scale, out, K, ROWS: tl.constexpr, BK: tl.constexpr, INTERP: tl.constexpr):
    """One tile of 8-bit codes times the scale of each row -> bf16."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * BK + tl.arange(0, BK)
    at = n[:, None].to(tl.int64) * K + i[None, :]
    code = tl.load(codes + at, mask=(i < K)[None, :], other=0.0).to(tl.float32)
    tl.store(out + at, to_bf16(code * tl.load(scale + n).to(tl.float32)[:, None], INTERP), mask=(i < K)[None, :])


@triton.jit
def widen_pairs_kernel(
    words, scale, out, K, LENGTH, W: tl.constexpr, ROWS: tl.constexpr, BW: tl.constexpr, INTERP: tl.constexpr
):
    """One tile of words [ROWS, BW] of int8 codes in pairs times the scale of each row -> bf16. LENGTH: words of a row,
    W: of a group."""
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = tl.program_id(1) * BW + tl.arange(0, BW)
    word = tl.load(words + n[:, None].to(tl.int64) * LENGTH + i[None, :], mask=(i < LENGTH)[None, :], other=0)
    factor = tl.load(scale + n).to(tl.float32)[:, None]
    for high in tl.static_range(2):
        column = i // W * 2 * W + i % W + W * high
        code = int8_bf16(word, high == 1, INTERP).to(tl.float32)
        at = out + n[:, None].to(tl.int64) * K + column[None, :]
        tl.store(at, to_bf16(code * factor, INTERP), mask=(column < K)[None, :])


def widen_rows(weight: PackedWeight, first: int, out: Tensor) -> None:
    """Write rows first : first + len(out) of a plain 8-bit weight, or of pairs, as bf16 into out [rows, K]. ATen's
    product of int8 and bf16 takes four times as long."""
    assert weight.scale is not None
    rows, k = out.shape
    codes, scale = weight.data[first : first + rows], weight.scale[first : first + rows]
    height = next(height for height in (16, 4, 1) if rows % height == 0)
    if weight.layout == "pairs":
        length = codes.shape[1]
        grid = (rows // height, triton.cdiv(length, 256))
        widen_pairs_kernel[grid](codes, scale, out, k, length, PAIR_GROUP // 2, height, 256, INTERP, num_warps=4)
        return
    widen_kernel[(rows // height, triton.cdiv(k, 512))](codes, scale, out, k, height, 512, INTERP, num_warps=4)
