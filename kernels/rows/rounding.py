"""Rows rounded to 8 bits (see `activations`), alone or by the operation before the product where there is one (RMSNorm,
SiLU-mul), which has the row in registers anyway. `linear` rounds what comes to it in 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose
from . import elementwise
from .activations import LARGEST_CODE, SMALLEST_RANGE, Activations


def quantize_rows(x: Tensor, codes: torch.dtype, *, impl: str = "auto") -> Activations:
    """x [..., K] rounded to `codes` (int8 or float8_e4m3fn), symmetric per row.

    A row that holds NaN or infinity has a scale that is not finite, so that its products show it.
    """
    _check("quantize_rows", codes)
    return _run("quantize_rows", impl, x, codes)


def quantized_rms_norm(
    x: Tensor, weight: Tensor, eps: float, codes: torch.dtype, *, impl: str = "auto"
) -> Activations:
    """`rms_norm` of x [..., D] as codes, quantized from the float32 result: it is not rounded to x's dtype before."""
    _check("quantized_rms_norm", codes)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"quantized_rms_norm: weight has shape {tuple(weight.shape)}, x ends in {x.shape[-1]}")
    return _run("quantized_rms_norm", impl, x, weight, eps, codes)


def quantized_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype, *, impl: str = "auto"
) -> tuple[Activations, Tensor]:
    """`add_rms_norm` of x, residual [T, D] with its normed half as codes; the sum x + residual is in residual's dtype.

    x may also be `linear`'s partials [S, T, D].
    """
    _check("quantized_add_rms_norm", codes)
    if x.shape[-residual.dim() :] != residual.shape or x.dim() > residual.dim() + 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"quantized_add_rms_norm: x {tuple(x.shape)}, residual {tuple(residual.shape)} and weight "
            f"{tuple(weight.shape)} do not fit"
        )
    return _run("quantized_add_rms_norm", impl, x, residual, weight, eps, codes)


def quantized_silu_mul(gate_up: Tensor, codes: torch.dtype, *, impl: str = "auto") -> Activations:
    """`silu_mul` of gate_up [T, 2I], or of `linear`'s partials [S, T, 2I], as codes [T, I] of the float32 result."""
    _check("quantized_silu_mul", codes)
    if gate_up.shape[-1] % 2:
        raise ValueError(f"quantized_silu_mul: the last dimension holds gate and up, {gate_up.shape[-1]} is odd")
    return _run("quantized_silu_mul", impl, gate_up, codes)


def _check(op: str, codes: torch.dtype) -> None:
    if codes not in LARGEST_CODE:
        raise ValueError(f"{op}: codes must be one of {[str(known) for known in LARGEST_CODE]}, not {codes}")


def _run(op: str, impl: str, x: Tensor, *args: Any) -> Any:
    return choose(op, OPERATIONS[op], impl, x.device)(x, *args)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rounded(x: Tensor, codes: torch.dtype, dtype: torch.dtype) -> Activations:
    """wide x [..., K], that stands for activations of `dtype`."""
    largest = x.abs().amax(-1).clamp_min(SMALLEST_RANGE)
    span = torch.full_like(largest, LARGEST_CODE[codes])  # with a plain number CUDA would round the quotients twice
    scaled = x * (span / largest)[..., None]
    if codes == torch.int8:
        scaled = scaled.round_().nan_to_num_(0.0)  # NaN has no code: the scale carries it
    return Activations(scaled.to(codes), largest / span, dtype)


def _quantize_rows_torch(x: Tensor, codes: torch.dtype) -> Activations:
    return _rounded(_wide(x), codes, x.dtype)


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float, codes: torch.dtype) -> Activations:
    wide = elementwise.rms_norm(_wide(x), _wide(weight), eps, impl="torch")
    return _rounded(wide, codes, x.dtype)


def _add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype
) -> tuple[Activations, Tensor]:
    total = ((x.sum(0) if x.dim() > residual.dim() else x) + residual).to(residual.dtype)
    return _rms_norm_torch(total, weight, eps, codes), total


def _silu_mul_torch(gate_up: Tensor, codes: torch.dtype) -> Activations:
    dtype = torch.bfloat16 if gate_up.dim() == 3 else gate_up.dtype
    return _rounded(elementwise.silu_mul(_wide(gate_up), impl="torch"), codes, dtype)


def _rounded_aten(x: Tensor, codes: torch.dtype, dtype: torch.dtype) -> Activations:
    """As `_rounded`, by the fewest operators. Whatever code NaN becomes, the scale of its row is NaN."""
    largest = x.abs().amax(-1, keepdim=True).clamp_min_(SMALLEST_RANGE)
    span = torch.full_like(largest, LARGEST_CODE[codes])
    scaled = x * (span / largest)  # a plain number would be multiplied by a reciprocal: rounded twice
    if codes == torch.int8:
        scaled.round_()
    return Activations(scaled.to(codes), largest.div_(span).squeeze(-1), dtype)


def _quantize_rows_aten(x: Tensor, codes: torch.dtype) -> Activations:
    return _rounded_aten(_wide(x), codes, x.dtype)


def _rms_norm_aten(x: Tensor, weight: Tensor, eps: float, codes: torch.dtype) -> Activations:
    return _rounded_aten(elementwise.rms_norm(_wide(x), weight, eps, impl="aten"), codes, x.dtype)


def _add_rms_norm_aten(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, codes: torch.dtype
) -> tuple[Activations, Tensor]:
    total = ((x.sum(0) if x.dim() > residual.dim() else x) + residual).to(residual.dtype)
    return _rms_norm_aten(total, weight, eps, codes), total


def _silu_mul_aten(gate_up: Tensor, codes: torch.dtype) -> Activations:
    dtype = torch.bfloat16 if gate_up.dim() == 3 else gate_up.dtype
    gate, up = (gate_up.sum(0) if gate_up.dim() == 3 else gate_up).chunk(2, -1)
    return _rounded_aten(F.silu(_wide(gate)).mul_(up), codes, dtype)


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from . import rounding_triton

        return getattr(rounding_triton, name)(*args)

    return run


OPERATIONS: dict[str, dict[str, Callable[..., Any]]] = {
    name: {"torch": readable, "aten": quick, "triton": _triton(name)}
    for name, readable, quick in (
        ("quantize_rows", _quantize_rows_torch, _quantize_rows_aten),
        ("quantized_rms_norm", _rms_norm_torch, _rms_norm_aten),
        ("quantized_add_rms_norm", _add_rms_norm_torch, _add_rms_norm_aten),
        ("quantized_silu_mul", _silu_mul_torch, _silu_mul_aten),
    )
}
