"""bf16 and A16W8 (int8, e4m3) matmul for small M: y[M, N] = x[M, K] @ w[N, K].T, a stream over the weight rows.

At M <= 16 the time is the weight's bytes over the bandwidth, so all that counts is bytes in flight: many small
programs, deep pipelines, and splits of K where N alone gives too few programs. int8 codes become bf16 by Triton's own
fast conversion, e4m3 by way of fp16, which holds them all: two codes take one instruction (cvt.rn.f16x2.e4m3x2), where
straight to bf16 the compiler goes through the slow conversion pipe. Both are exact; the scale of the output channel is
applied to the accumulator.

    x [BM, BK]  left operand, rows past M are zeros      w [BN, BK]  right operand, K contiguous
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import PackedWeight
from .triton_common import INTERP, await_previous, dot, early_launch, to_bf16
from .tuning import SkinnyConfig, WideConfig


@triton.jit(do_not_specialize=["M"])
def skinny_kernel(
    x, w, scale, out, M, N, K, k_per_split, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    await_previous(EARLY)
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m, n, i = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    first = split * k_per_split
    last = tl.minimum(first + k_per_split, K)
    x_at = x + m[None, :].to(tl.int64) * K + i[:, None]
    w_at = w + n[:, None].to(tl.int64) * K + i[None, :]
    live_m, live_n = (m < M)[None, :], (n < N)[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for k in tl.range(first, last, BK, num_stages=STAGES):
        if EVEN:
            a = tl.load(w_at + k, mask=live_n, other=0.0)
            b = tl.load(x_at + k, mask=live_m, other=0.0)
        else:
            a = tl.load(w_at + k, mask=live_n & (k + i < last)[None, :], other=0.0)
            b = tl.load(x_at + k, mask=live_m & (k + i < last)[:, None], other=0.0)
        if INTERP:
            a = a.to(tl.float32)
        elif w.dtype.element_ty == tl.float8e4nv:
            a = a.to(tl.float16).to(tl.bfloat16)
        else:
            a = a.to(tl.bfloat16)
        acc = dot(a, b, acc, INTERP)
    if scale is not None:
        acc *= tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + (split * M + m[None, :]).to(tl.int64) * N + n[:, None]
    inside = live_m & (n < N)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(acc, INTERP), mask=inside)
    else:
        tl.store(at, acc, mask=inside)


def skinny_partials(x: Tensor, weight: PackedWeight, config: SkinnyConfig | WideConfig) -> Tensor:
    """x [M, K] bf16 times a plain bf16, int8 or fp8 weight -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where
    config has one split)."""
    (m, k), n = x.shape, weight.shape[0]
    bk = config.block_k
    per_split = triton.cdiv(triton.cdiv(k, bk), config.splits) * bk
    splits = triton.cdiv(k, per_split)
    out = torch.empty(splits, m, n, dtype=torch.float32 if splits > 1 else torch.bfloat16, device=x.device)
    grid = (triton.cdiv(n, config.block_n), triton.cdiv(m, config.block_m), splits)
    skinny_kernel[grid](
        x, weight.data, weight.scale, out, m, n, k, per_split, config.block_m, config.block_n, bk, k % bk == 0,
        config.stages, early_launch(), INTERP, num_warps=config.warps, num_stages=config.stages,
        launch_pdl=early_launch(),
    )
    return out
