"""silu(x @ gate.T) * (x @ up.T) for a fused weight: inside the product's kernel where launches count, else after it.

At few rows SiLU-mul is a launch for a few kilobytes. A program of the product that holds the gate and the up rows of
the same features finishes them itself, if it sees all of K: so only where K is not split. Whether that pays depends on
how evenly the next product then begins (see `triton_common.admit_next`), so tuned entries decide: on an H200 it gains
up to 13 % of a layer of a 7B, and where the two would not get on it would lose as much.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import Implementations, choose
from ..formats.packed import PackedWeight
from ..rows.activations import Activations, Operand
from ..rows.elementwise import silu_mul
from .matmul import linear


def gated_linear(x: Operand, weight: PackedWeight, bias: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """x [..., K] times weight [2I, K] (gate rows, then up rows) plus bias [2I], through SiLU-mul -> [..., I].

    impl and errors as in `linear`. In one kernel neither half is rounded to bf16 before they meet.
    """
    out: Tensor = choose("gated_linear", GATED_LINEAR, impl, x.device)(x, weight, bias, impl)
    return out


def _apart(x: Operand, weight: PackedWeight, bias: Tensor | None, impl: str) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]) if isinstance(x, Tensor) else x.rows() if isinstance(x, Activations) else x
    y = silu_mul(linear(rows, weight, bias, partial=True, impl=impl), impl=impl)  # three dimensions would be partials
    return y.view(*x.shape[:-1], y.shape[-1])


def _together(x: Operand, weight: PackedWeight, bias: Tensor | None, impl: str) -> Tensor:
    from .matmul_triton import gated_fused

    found = None
    if isinstance(x, Tensor) and bias is None and weight.order is None and x.shape[-1] == weight.shape[1]:
        found = gated_fused(x.reshape(-1, x.shape[-1]), weight)
    return _apart(x, weight, bias, impl) if found is None else found.view(*x.shape[:-1], found.shape[1])


GATED_LINEAR: Implementations = {"torch": _apart, "aten": _apart, "triton": _together}
