"""Products with 8-bit activations, beside `_int_mm`, `_scaled_mm` and cuBLAS in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.weights import WEIGHT_FORMATS
from ..measuring import problems
from ..measuring.timing import microseconds
from ..products.matmul import linear
from ..products.matmul_triton import linear_8_bit, linear_fused, requantized_once
from ..rows.activations import Activations, activation_codes
from ..rows.rounding import quantize_rows
from ..tuning import a8w8_config
from .row import Row, checked, relative_error


def a8w8_rows() -> Iterator[Row]:
    """int8 8192^3 with the scaled bf16 epilogue; beside ours _int_mm without one, and fp8 by _scaled_mm with row-wise
    scales."""
    x, weight = problems.int8_matmul(8192, 8192, 8192)
    few = Activations(x.codes[:64], x.scale[:64], x.dtype)
    want = few.dequantize(torch.float64) @ weight.dequantize(torch.float64).t()
    error = checked(relative_error(linear_8_bit(x, weight)[:64], want), 3e-3, "A8W8")
    flops = 2 * 8192**3
    x8, w8 = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    ones = torch.ones(8192, 1, device="cuda")
    us = microseconds([lambda: linear_8_bit(x, weight)])
    others = {
        "_int_mm (int32 out)": microseconds([lambda: torch._int_mm(x.codes, weight.data.t())]),
        "fp8 _scaled_mm": microseconds(
            [lambda: torch._scaled_mm(x8, w8.t(), ones, ones.t(), out_dtype=torch.bfloat16)]
        ),
    }
    yield Row("A8W8", "8192^3", us, error, None, None, flops / us / 1e6, others)


def eight_bit_rows(format: str, rows: tuple[int, ...]) -> Iterator[Row]:
    """w8a8, fp8 or w4a8 as `linear` computes it from bf16, the rounding of activations included where it rounds them.
    Beside it the two ways apart, to see where the crossover lies, cuBLAS in bf16, and for w4a8 the product of w8a8."""
    codes = activation_codes(format, 1 << 20)
    assert codes is not None
    grouped = WEIGHT_FORMATS[format].grouped
    for name, (n, k) in problems.SHAPES.items():
        for m in rows:
            problem = problems.matmul(format, m, n, k)
            plain, rounded = problem.weights[0].to_plain(), activation_codes(format, m) is not None
            weight = (plain.requantized() if grouped and rounded else plain).dequantize()
            del plain
            eight = quantize_rows(problem.x, codes)

            def run(x: Tensor, w: PackedWeight) -> Tensor:
                return linear(x, w)

            held = eight.dequantize(torch.float32) if rounded else problem.x.float()
            got = run(problem.x, problem.weights[0])
            error = checked(relative_error(got, held @ weight.t()), 5e-3, f"{format} {name} M={m}")
            us = microseconds(problem.calls(run))
            others = {"8-bit product": microseconds([partial(linear_8_bit, eight, w) for w in problem.weights])}
            if format == "fp8":  # which is cuBLAS's
                ours = a8w8_config(m, n, k, integer=False)
                others["ours"] = microseconds([partial(linear_8_bit, eight, w, None, ours) for w in problem.weights])
            if grouped:
                others |= beside_4_bit(eight, problem)
            if m <= (256 if grouped else 64):
                others["A16W4" if grouped else "A16W8"] = microseconds(problem.calls(linear_fused))
            dense = [weight.bfloat16() for _ in range(max(2, min(6, (512 << 20) // (2 * n * k))))]
            others["cuBLAS bf16"] = microseconds([partial(F.linear, problem.x, w) for w in dense])
            tera_ops = problem.flops / us / 1e6 if m > 64 else None
            yield Row(format, f"{name} M={m}", us, error, None, problem.nbytes / us / 1e6, tera_ops, others)


def beside_4_bit(x: Activations, problem: problems.Matmul) -> dict[str, float]:
    """The same x times a weight that is int8 already, and times one that becomes int8 before the product."""
    known = problems.matmul("w8a8", problem.m, problem.n, problem.k)
    return {
        "w8a8 product": microseconds([partial(linear_8_bit, x, w) for w in known.weights]),
        "int8 form first": microseconds([partial(requantized_once, x, w) for w in problem.weights]),
    }
