"""A8W8 matmul: y[M, N] bf16 = (x8 @ w8.T) * x_scale (per token) * w_scale (per output channel), int8 or e4m3.

Both operands stay K-major, which is what Hopper's 8-bit warp-group product reads from shared memory. The accumulator is
scaled and rounded to bf16 in the epilogue, so the int32 result that `torch._int_mm` writes and a second pass reads does
not exist. Where M alone gives too few programs, K is split: scaled float32 partials, summed as everywhere else.

int8 accumulates exactly in int32. For e4m3 `torch._scaled_mm` does the same and is used where it takes the shape;
Hopper's tensor core keeps about 14 bits of an fp8 sum, so here partial sums of BK products move to float32 registers.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats.packed import PackedWeight
from ..rows.activations import Activations
from ..triton_common import INTERP, admission, admit_next, await_previous, banded, new_partials, to_bf16
from ..tuning import WideConfig, a8w8_config


@triton.jit(do_not_specialize=["M"])
def a8w8_kernel(
    x, w, x_scale, w_scale, out, out_row, M, N, K, k_per_split, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    BAND: tl.constexpr, EVEN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    rows, columns, split = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.program_id(1)
    tile_m, tile_n = banded(tl.program_id(0), rows, columns, BAND)
    m, n, i = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    BEFORE: tl.constexpr = BM <= 64  # few rows leave registers for what the end needs, and no time to fetch it there
    if BEFORE:
        w_factor = tl.load(w_scale + n % N).to(tl.float32)  # parameters: no need to wait for them
    await_previous(EARLY)
    if BEFORE:
        x_factor = tl.load(x_scale + m % M)
    first = split * k_per_split
    last = tl.minimum(first + k_per_split, K)
    x_at = x + (m % M)[:, None].to(tl.int64) * K + (first + i)[None, :]  # rows past the end repeat others, not stored
    w_at = w + (n % N)[:, None].to(tl.int64) * K + (first + i)[None, :]
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if INTEGER else tl.float32)
    for k in tl.range(first, last, BK, num_stages=STAGES):
        if EVEN:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            live = (k + i < last)[None, :]
            a, b = tl.load(x_at, mask=live, other=0.0), tl.load(w_at, mask=live, other=0.0)
        if INTEGER:
            acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        elif INTERP:
            acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
        else:
            acc = tl.dot(a, tl.trans(b), acc, max_num_imprecise_acc=BK)
        x_at += BK
        w_at += BK
    admit_next(EARLY)
    if not BEFORE:
        w_factor = tl.load(w_scale + n % N).to(tl.float32)
        x_factor = tl.load(x_scale + m % M)
    y = acc.to(tl.float32) * x_factor[:, None] * w_factor[None, :]
    at = out + (split * M + m[:, None]).to(tl.int64) * out_row + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(y, INTERP), mask=inside)
    else:
        tl.store(at, y, mask=inside)


def a8w8_partials(
    x: Activations, weight: PackedWeight, config: WideConfig | None = None, out: Tensor | None = None
) -> Tensor:
    """x [M, K] times a plain weight [N, K] in the same codes -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where
    config has one split).

    out: bf16 [1, M, N] to write instead, columns of a larger matrix for example; K is not split then.
    ValueError where codes and shapes do not fit.
    """
    (m, k), n = x.shape, weight.shape[0]
    if x.codes.dtype != weight.data.dtype or weight.shape[1] != k:
        raise ValueError(
            f"a8w8: x and the weight must hold the same codes over equal in features, not {x.codes.dtype} "
            f"{tuple(x.shape)} and {weight.data.dtype} {weight.shape}"
        )
    config = config or a8w8_config(m, n, k, x.codes.dtype == torch.int8)
    bk = config.block_k
    per_split = steps = triton.cdiv(k, bk)
    if out is None:
        out, per_split = new_partials(steps, config.splits, m, n, x.device)
    early = admission(config.late)
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n), out.shape[0])
    a8w8_kernel[grid](
        x.codes, weight.data, x.scale, weight.scale, out, out.stride(1), m, n, k, per_split * bk, config.block_m,
        config.block_n, bk, 8, k % bk == 0, config.stages, early, INTERP, num_warps=config.warps,
        num_stages=config.stages, launch_pdl=early > 0,
    )
    return out
