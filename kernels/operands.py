"""What a product reads, made by the operation before it in the form its weight wants.

RMSNorm and SiLU-mul have a row in registers when they write it. So they round it to 8 bits where the weight's format
asks for that (`activations.activation_codes`), and sum its groups where the weight is 4-bit planes and rows are few;
else they write 16 bits.
"""

from __future__ import annotations

from torch import Tensor

from .activations import (
    Operand,
    activation_codes,
    quantized_add_rms_norm,
    quantized_rms_norm,
    quantized_silu_mul,
)
from .dispatch import resolve
from .elementwise import add_rms_norm, rms_norm, silu_mul
from .packing import PackedWeight

SUMMED_ROWS = 16  # above, the time goes elsewhere than into subtracting zero points


def normed(x: Tensor, weight: Tensor, eps: float, reader: PackedWeight, *, impl: str = "auto") -> Operand:
    """`rms_norm` of x [T, D] for a product with `reader`."""
    if (codes := activation_codes(reader.format, x.shape[0])) is not None:
        return quantized_rms_norm(x, weight, eps, codes, impl=impl)
    if group := _summed_group(reader, x, impl):
        from .elementwise_triton import summed_rms_norm

        return summed_rms_norm(x, weight, eps, group)
    return rms_norm(x, weight, eps, impl=impl)


def add_normed(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: PackedWeight, *, impl: str = "auto"
) -> tuple[Operand, Tensor]:
    """`add_rms_norm` of x and residual [T, D] for a product with `reader`, and the sum."""
    if (codes := activation_codes(reader.format, residual.shape[0])) is not None:
        return quantized_add_rms_norm(x, residual, weight, eps, codes, impl=impl)
    if group := _summed_group(reader, residual, impl):
        from .elementwise_triton import summed_add_rms_norm

        return summed_add_rms_norm(x, residual, weight, eps, group)
    return add_rms_norm(x, residual, weight, eps, impl=impl)


def gated(gate_up: Tensor, reader: PackedWeight, *, impl: str = "auto") -> Operand:
    """`silu_mul` of gate_up [T, 2I], or of `linear`'s partials of it, for a product with `reader`."""
    if (codes := activation_codes(reader.format, gate_up.shape[-2])) is not None:
        return quantized_silu_mul(gate_up, codes, impl=impl)
    if group := _summed_group(reader, gate_up[0] if gate_up.dim() == 3 else gate_up, impl):
        from .elementwise_triton import summed_silu_mul

        return summed_silu_mul(gate_up, group)
    return silu_mul(gate_up, impl=impl)


def _summed_group(reader: PackedWeight, rows: Tensor, impl: str) -> int:
    """The group size of `reader` where sums of groups serve it, else 0."""
    serves = reader.layout == "planes" and reader.order is None and rows.shape[0] <= SUMMED_ROWS
    return reader.group_size or 0 if serves and resolve(impl, rows.device) == "triton" else 0
