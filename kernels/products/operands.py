"""What a product reads, made by the operation before it in the form its weight wants.

RMSNorm and SiLU-mul have a row in registers when they write it, so they round it to 8 bits where the weight's format
asks for that (`activations.codes_for`). They could also give 4-bit products the sums of its groups
(`elementwise_triton.summed_rms_norm`): the product then takes 5 % less time, which the norm, one program per row, needs
more of, so that a decode step of 7B int4 stayed the same on an H200 and nobody asks for them here.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import PackedWeight
from ..rows.activations import Operand, codes_for
from ..rows.elementwise import add_rms_norm, embed_rms_norm, rms_norm
from ..rows.rounding import quantized_add_rms_norm, quantized_rms_norm, quantized_silu_mul
from .gated import gated_linear
from .matmul import linear


def normed(x: Tensor, weight: Tensor, eps: float, reader: PackedWeight, *, impl: str = "auto") -> Operand:
    """`rms_norm` of x [T, D] for a product with `reader`."""
    if (codes := codes_for(reader, x.shape[0])) is not None:
        return quantized_rms_norm(x, weight, eps, codes, impl=impl)
    return rms_norm(x, weight, eps, impl=impl)


def embed_normed(
    tokens: Tensor, table: Tensor, weight: Tensor, eps: float, reader: PackedWeight, *, impl: str = "auto"
) -> tuple[Operand, Tensor]:
    """`normed` of the rows `tokens` int64 [T] of table [vocab, D], and those rows."""
    if codes_for(reader, len(tokens)) is not None:
        rows = F.embedding(tokens, table)
        return normed(rows, weight, eps, reader, impl=impl), rows
    return embed_rms_norm(tokens, table, weight, eps, impl=impl)


def add_normed(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, reader: PackedWeight, *, impl: str = "auto"
) -> tuple[Operand, Tensor]:
    """`add_rms_norm` of x and residual [T, D] for a product with `reader`, and the sum."""
    if (codes := codes_for(reader, residual.shape[0])) is not None:
        return quantized_add_rms_norm(x, residual, weight, eps, codes, impl=impl)
    return add_rms_norm(x, residual, weight, eps, impl=impl)


def gated(
    x: Operand, gate_up: PackedWeight, bias: Tensor | None, reader: PackedWeight, *, impl: str = "auto"
) -> Operand:
    """`gated_linear` of x [T, K] and a fused weight [2I, K] for a product with `reader`."""
    if (codes := codes_for(reader, x.shape[0])) is not None:
        return quantized_silu_mul(linear(x, gate_up, bias, partial=True, impl=impl), codes, impl=impl)
    return gated_linear(x, gate_up, bias, impl=impl)
