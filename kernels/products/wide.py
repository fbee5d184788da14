"""A16W4 matmul for M > 64: the dequantized weight is the register operand of the warp-group product.

Here arithmetic counts, not bytes: each plane becomes bf16 (128 + code) - (128 + zero), exact, times the scale (one
rounding, as any dequantized bf16 weight), and goes straight into the tensor core as the left operand, while x tiles
stream through shared memory. The weight is never written back. Every program dequantizes its own rows, so BM is as
large as registers allow.
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq

from ..formats.packed import PackedWeight
from ..formats.unpacking import PLANE_ROWS
from ..triton_common import (
    INTERP,
    admission,
    admit_next,
    await_previous,
    dot,
    minus,
    new_partials,
    nibbles,
    store_product,
    times,
    to_bf16,
)
from ..tuning import WideConfig
from .a16w4 import planes_at


@triton.jit
def dequantized_plane(words, zero, scale, SHIFT: tl.constexpr, INTERP: tl.constexpr):
    """bf16 (code - zero) * scale of one 4-bit plane; zero [rows, 1] is bf16 128 + zero, scale [rows, 1] bf16."""
    if INTERP:
        code = ((words >> SHIFT) & 15).to(tl.float32)
        return to_bf16((code + 128.0 - zero.to(tl.float32)) * scale.to(tl.float32), INTERP)
    zero, scale = tl.broadcast_to(zero, words.shape), tl.broadcast_to(scale, words.shape)
    native: tl.constexpr = cuda_capability_geq(9, 0)
    asm: tl.constexpr = (
        "{ .reg .b32 t; " + nibbles(SHIFT) + minus("t", "t", "$2", native) + times("$0", "t", "$3", native) + " }"
    )
    return tl.inline_asm_elementwise(
        asm, "=r,r,r,r", [words, zero, scale], dtype=tl.bfloat16, is_pure=True, pack=2
    )


@triton.jit(do_not_specialize=["M"])
def wide_kernel(
    x, words, scales, out, M, N, N_PADDED, K, groups_per_split, ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    G: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    await_previous(EARLY)
    W: tl.constexpr = G // 4
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = K // G
    m, n, i = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, W)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    here = n % N_PADDED  # where BN does not divide it, rows past the end repeat others, not stored
    words_at, scale_at = planes_at(words, scales, here, first, groups, N_PADDED, ROWS, W)
    x_at = x + m[None, :].to(tl.int64) * K + i[:, None] + first * G
    live = (m < M)[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    tl.assume(first < last)  # else ptxas sees a way past the loop, and serializes its products (C7515)
    for _ in tl.range(first, last, num_stages=STAGES):
        w = tl.load(words_at)
        word = tl.load(scale_at)
        scale = to_bf16((word & -256).to(tl.float32, bitcast=True), INTERP)[:, None]
        zero = ((word & 127) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)[:, None]  # 128 + zero
        x0 = tl.load(x_at, mask=live, other=0.0)
        x1 = tl.load(x_at + W, mask=live, other=0.0)
        x2 = tl.load(x_at + 2 * W, mask=live, other=0.0)
        x3 = tl.load(x_at + 3 * W, mask=live, other=0.0)
        acc = dot(dequantized_plane(w, zero, scale, 0, INTERP), x0, acc, INTERP)
        acc = dot(dequantized_plane(w, zero, scale, 4, INTERP), x1, acc, INTERP)
        acc = dot(dequantized_plane(w, zero, scale, 8, INTERP), x2, acc, INTERP)
        acc = dot(dequantized_plane(w, zero, scale, 12, INTERP), x3, acc, INTERP)
        words_at += ROWS * W
        scale_at += N_PADDED
        x_at += G
    admit_next(EARLY)
    store_product(out, acc, tile_n, split, m, M, N, BN, BM, False, INTERP)


def wide_partials(x: Tensor, weight: PackedWeight, config: WideConfig) -> Tensor:
    """x [M, K] bf16 times a planes weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where config has
    one split)."""
    assert weight.scale is not None and weight.group_size is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    out, per_split = new_partials(k // g, config.splits, m, n, x.device)
    n_padded = weight.scale.shape[1]
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n_padded, config.block_n), out.shape[0])
    early = admission(config.late)
    wide_kernel[grid](
        x, weight.data, weight.scale, out, m, n, n_padded, k, per_split, PLANE_ROWS, config.block_m, config.block_n, g,
        config.stages, early, INTERP, num_warps=config.warps, num_stages=config.stages, launch_pdl=early > 0,
    )
    return out
