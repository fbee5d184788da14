"""RMSNorm (+ residual), SiLU-mul and RoPE in Triton: one pass over memory each, statistics in float32."""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import INTERP, next_power_of_2, to_bf16


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, total, stride_outer, stride_inner, INNER, D, eps, BLOCK: tl.constexpr, ADD: tl.constexpr,
    INTERP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < D
    value = tl.load(x + (row // INNER) * stride_outer + (row % INNER) * stride_inner + i, mask=inside, other=0.0).to(
        tl.float32
    )
    if ADD:
        value += tl.load(residual + row * D + i, mask=inside, other=0.0).to(tl.float32)
        rounded = to_bf16(value, INTERP)
        tl.store(total + row * D + i, rounded, mask=inside)
        value = rounded.to(tl.float32)
    rms = tl.rsqrt(tl.sum(value * value, 0) / D + eps)
    y = value * rms * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * D + i, to_bf16(y, INTERP), mask=inside)


@triton.jit
def silu_mul_kernel(gate_up, out, I, BLOCK: tl.constexpr, INTERP: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = tl.load(gate_up + row * 2 * I + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * I + I + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * I + i, to_bf16(gate / (1 + tl.exp(-gate)) * up, INTERP), mask=inside)


@triton.jit
def rope_kernel(
    x, turn, out, stride_row, stride_head, HEADS, D: tl.constexpr, BH: tl.constexpr, INTERP: tl.constexpr
):
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    h, i = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, HALF)
    cos = tl.load(turn + row * 2 * D + i)[None, :]
    sin = tl.load(turn + row * 2 * D + D + HALF + i)[None, :]
    inside = (h < HEADS)[:, None]
    at = x + row * stride_row + h[:, None] * stride_head + i[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = out + (row * HEADS + h[:, None]) * D + i[None, :]
    tl.store(to, to_bf16(first * cos - second * sin, INTERP), mask=inside)
    tl.store(to + HALF, to_bf16(second * cos + first * sin, INTERP), mask=inside)


def _check(op: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype != torch.bfloat16 or x.stride(-1) != 1:
            raise ValueError(
                f"{op}: impl 'triton' takes bfloat16 with a contiguous last dimension, "
                f"not {x.dtype} of strides {x.stride()}"
            )


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] bf16; views of up to two leading dimensions are read in place."""
    _check("rms_norm", x, weight)
    d = x.shape[-1]
    if x.dim() > 3:
        x = x.reshape(-1, d)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner = x.shape[1] if x.dim() == 3 else 1
    outer_stride, inner_stride = (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0) if x.dim() == 2 else d, 0)
    block = next_power_of_2(d)
    rms_norm_kernel[(max(1, x.numel() // d),)](
        x, x, weight, out, out, outer_stride, inner_stride, inner, d, eps, block, False, INTERP, num_warps=_warps(block)
    )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, residual [..., D] bf16."""
    _check("add_rms_norm", x, residual, weight)
    x, residual = x.contiguous(), residual.contiguous()
    d = x.shape[-1]
    out, total = torch.empty_like(x), torch.empty_like(x)
    block = next_power_of_2(d)
    rms_norm_kernel[(x.numel() // d,)](
        x, residual, weight, out, total, d, 0, 1, d, eps, block, True, INTERP, num_warps=_warps(block)
    )
    return out, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [..., 2I] bf16."""
    _check("silu_mul", gate_up)
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = torch.empty(*gate_up.shape[:-1], width, dtype=gate_up.dtype, device=gate_up.device)
    grid = (gate_up.numel() // (2 * width), triton.cdiv(width, 1024))
    silu_mul_kernel[grid](gate_up, out, width, 1024, INTERP, num_warps=4)
    return out


def rope(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k [T, Hkv, D] bf16 views whose last dimension is contiguous."""
    _check("rope", q, k)
    turned = []
    for x in (q, k):
        t, heads, d = x.shape
        out = torch.empty(t, heads, d, dtype=x.dtype, device=x.device)
        bh = min(8, next_power_of_2(heads))
        rope_kernel[(t, triton.cdiv(heads, bh))](
            x, turn, out, x.stride(0), x.stride(1), heads, d, bh, INTERP, num_warps=1
        )
        turned.append(out)
    return turned[0], turned[1]
