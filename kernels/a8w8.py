"""A8W8: int8 activations (per token) times int8 weights (per output channel), and the 8-bit quantization of
activations.

Both operands stay K-major, which is what Hopper's integer warp-group product reads from shared memory. The int32
accumulator is scaled and rounded to bf16 in the epilogue, so the int32 result that `torch._int_mm` writes and a second
pass reads does not exist. Per-token dynamic scales: Dettmers et al., "LLM.int8()" (2022).
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERP, await_previous, early_launch, next_power_of_2, to_bf16
from .tuning import WideConfig, a8w8_config


@triton.jit(do_not_specialize=["M"])
def a8w8_kernel(
    x, w, x_scale, w_scale, out, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
    EVEN: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    await_previous(EARLY)
    # Programs go down bands of BAND row tiles, so that a wave of them shares its x and w tiles in L2.
    rows, columns, program = tl.cdiv(M, BM), tl.cdiv(N, BN), tl.program_id(0)
    band = program // (BAND * columns)
    height = tl.minimum(rows - band * BAND, BAND)
    tile_m = band * BAND + program % (BAND * columns) % height
    tile_n = program % (BAND * columns) // height
    m, n, i = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN), tl.arange(0, BK)
    x_at = x + (m % M)[:, None].to(tl.int64) * K + i[None, :]  # rows past the end repeat others and are not stored
    w_at = w + (n % N)[:, None].to(tl.int64) * K + i[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for k in tl.range(0, K, BK, num_stages=STAGES):
        if EVEN:
            a, b = tl.load(x_at), tl.load(w_at)
        else:
            a, b = tl.load(x_at, mask=(k + i < K)[None, :], other=0), tl.load(w_at, mask=(k + i < K)[None, :], other=0)
        acc = tl.dot(a, tl.trans(b), acc, out_dtype=tl.int32)
        x_at += BK
        w_at += BK
    y = acc.to(tl.float32) * tl.load(x_scale + m % M)[:, None] * tl.load(w_scale + n % N).to(tl.float32)[None, :]
    tl.store(
        out + m[:, None].to(tl.int64) * N + n[None, :], to_bf16(y, INTERP), mask=(m < M)[:, None] & (n < N)[None, :]
    )


@triton.jit
def quantize_rows_kernel(x, codes, scales, D, BLOCK: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr):
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + i, mask=i < D, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), 0)
    scale = tl.where(largest > 0, largest / 127.0, 1.0)
    tl.store(scales + row, scale)
    code = tl.floor(value / scale + 0.5)
    tl.store(codes + row * D + i, tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8), mask=i < D)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, K] bf16 -> int8 codes [M, K] and float32 scales [M], symmetric per row."""
    m, k = x.shape
    codes, scales = (
        torch.empty(m, k, dtype=torch.int8, device=x.device),
        torch.empty(m, dtype=torch.float32, device=x.device),
    )
    block, early = next_power_of_2(k), early_launch()
    quantize_rows_kernel[(m,)](
        x.contiguous(), codes, scales, k, block, early, INTERP, num_warps=max(1, min(8, block // 512)), launch_pdl=early
    )
    return codes, scales


def a8w8_matmul(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, config: WideConfig | None = None) -> Tensor:
    """int8 x [M, K] times int8 w [N, K] -> bf16 [M, N] = (x @ w.T) * x_scale[:, None] * w_scale.

    x_scale [M] float32; w_scale [N] float32 or bf16. ValueError for other dtypes, or K not a multiple of 16 (the loads'
    width)."""
    (m, k), n = x.shape, w.shape[0]
    if x.dtype != torch.int8 or w.dtype != torch.int8 or w.shape[1] != k:
        raise ValueError(
            f"a8w8_matmul: x and w must be int8 with equal in features, "
            f"not {x.dtype} {tuple(x.shape)} and {w.dtype} {tuple(w.shape)}"
        )
    if k % 16:
        raise ValueError(f"a8w8_matmul: in features must be a multiple of 16, not {k}")
    config = config or a8w8_config(m, n, k)
    out = torch.empty(m, n, dtype=torch.bfloat16, device=x.device)
    early = early_launch()
    grid = (triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),)
    a8w8_kernel[grid](
        x, w, x_scale, w_scale, out, m, n, k, config.block_m, config.block_n, config.block_k, 8,
        k % config.block_k == 0, config.stages, early, INTERP, num_warps=config.warps, num_stages=config.stages,
        launch_pdl=early,
    )
    return out
