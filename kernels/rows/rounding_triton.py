"""8-bit activations in Triton: rows are rounded where they are already in registers, by the norm or SiLU-mul that made
them. One program per row, since a row's largest element decides about its first.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..triton_common import INTERP, await_previous, early_launch, next_power_of_2
from .activations import LARGEST_CODE, SMALLEST_RANGE, Activations
from .elementwise_triton import load_sum, normed_row, split_sum


@triton.jit
def round_to_even(x, INTERP: tl.constexpr):
    """float32 |x| < 2 ** 22 to the nearest whole number, halves to even."""
    if INTERP:
        return (x + 12582912.0) - 12582912.0  # 1.5 * 2 ** 23, where float32 has no fractions
    return libdevice.rint(x)


@triton.jit
def to_e4m3(x, INTERP: tl.constexpr):
    """float32 |x| <= 448 to e4m3, to nearest even in the interpreter too (which rounds some values wrongly)."""
    if INTERP:
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        small = (x + 24576.0) - 24576.0  # below 2 ** -6 codes are multiples of 2 ** -9
        x = tl.where(tl.abs(x) < 0.015625, small, normal)
    return x.to(tl.float8e4nv)


@triton.jit
def store_codes(value, codes, scales, row, D, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr,
                INTERP: tl.constexpr):
    """One row of float32 values, zeros past D, as codes and scale. The largest magnitude is found among bit patterns,
    which order as the numbers do and put NaN above all of them."""
    magnitude = tl.max(tl.abs(value).to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)
    largest = tl.where(magnitude < SMALLEST, SMALLEST, magnitude)
    span = tl.full((), LARGEST, tl.float32)
    tl.store(scales + row, tl.div_rn(largest, span))
    scaled = value * tl.div_rn(span, largest)
    i = tl.arange(0, BLOCK)
    at = codes + row * D + i
    if codes.dtype.element_ty == tl.int8:
        tl.store(at, round_to_even(scaled, INTERP).to(tl.int8), mask=i < D)
    else:
        tl.store(at, to_e4m3(scaled, INTERP), mask=i < D)


@triton.jit
def quantize_rows_kernel(
    x, codes, scales, D, BLOCK: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, EARLY: tl.constexpr,
    INTERP: tl.constexpr,
):
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * D + i, mask=i < D, other=0.0).to(tl.float32)
    store_codes(value, codes, scales, row, D, BLOCK, LARGEST, SMALLEST, INTERP)


@triton.jit
def quantized_rms_norm_kernel(
    x, residual, weight, codes, scales, total, D, size, eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
    ADD: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = normed_row(x, row * D, residual, weight, total, row, size, D, eps, SPLITS, BLOCK, ADD, EARLY, INTERP)
    store_codes(y, codes, scales, row, D, BLOCK, LARGEST, SMALLEST, INTERP)


@triton.jit
def quantized_silu_mul_kernel(
    gate_up, codes, scales, I, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < I
    gate = load_sum(gate_up, row * 2 * I + i, inside, size, SPLITS, BLOCK)
    up = load_sum(gate_up, row * 2 * I + I + i, inside, size, SPLITS, BLOCK)
    store_codes(gate / (1 + tl.exp(-gate)) * up, codes, scales, row, I, BLOCK, LARGEST, SMALLEST, INTERP)


def _checked(op: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{op}: impl 'triton' takes bfloat16, not {x.dtype}")


def _empty(shape: tuple[int, ...], codes: torch.dtype, device: torch.device) -> Activations:
    return Activations(
        torch.empty(shape, dtype=codes, device=device),
        torch.empty(shape[:-1], dtype=torch.float32, device=device),
        torch.bfloat16,
    )


def _options(width: int, codes: torch.dtype) -> dict[str, object]:
    """What every kernel here is launched with: 32 elements of a row to a thread, where a row is long."""
    block, early = next_power_of_2(width), early_launch()
    return {
        "BLOCK": block, "LARGEST": LARGEST_CODE[codes], "SMALLEST": SMALLEST_RANGE, "EARLY": early, "INTERP": INTERP,
        "num_warps": max(1, min(16, block // 512)), "launch_pdl": early,
    }  # fmt: skip


def quantize_rows(x: Tensor, codes: torch.dtype) -> Activations:
    """x [..., K] bf16."""
    _checked("quantize_rows", x)
    found, width = _empty(tuple(x.shape), codes, x.device), x.shape[-1]
    quantize_rows_kernel[(found.scale.numel(),)](
        x.contiguous(), found.codes, found.scale, width, **_options(width, codes)
    )
    return found


def quantized_rms_norm(x: Tensor, weight: Tensor, eps: float, codes: torch.dtype) -> Activations:
    """x [..., D] bf16."""
    _checked("quantized_rms_norm", x, weight)
    found, width, x = _empty(tuple(x.shape), codes, x.device), x.shape[-1], x.contiguous()
    quantized_rms_norm_kernel[(found.scale.numel(),)](
        x, x, weight, found.codes, found.scale, x, width, 0, eps, SPLITS=1, ADD=False, **_options(width, codes)
    )
    return found


def quantized_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype
) -> tuple[Activations, Tensor]:
    """x [T, D] bf16 or partials [S, T, D] float32, residual [T, D] bf16."""
    _checked("quantized_add_rms_norm", residual, weight)
    found, width, residual = _empty(tuple(residual.shape), codes, x.device), x.shape[-1], residual.contiguous()
    x, splits, size = split_sum("quantized_add_rms_norm", x, residual.dim())
    total = torch.empty_like(residual)
    quantized_rms_norm_kernel[(found.scale.numel(),)](
        x, residual, weight, found.codes, found.scale, total, width, size, eps, SPLITS=splits, ADD=True,
        **_options(width, codes),
    )
    return found, total


def quantized_silu_mul(gate_up: Tensor, codes: torch.dtype) -> Activations:
    """gate_up [T, 2I] bf16 or partials [S, T, 2I] float32."""
    width = gate_up.shape[-1] // 2
    gate_up, splits, size = split_sum("quantized_silu_mul", gate_up, 2)
    found = _empty((gate_up.shape[-2], width), codes, gate_up.device)
    quantized_silu_mul_kernel[(found.scale.numel(),)](
        gate_up, found.codes, found.scale, width, size, SPLITS=splits, **_options(width, codes)
    )
    return found
