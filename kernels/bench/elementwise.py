"""The small operations between the products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ..measuring.timing import microseconds
from ..rows import elementwise, rounding
from ..rows.activations import Activations
from ..rows.rounding import quantize_rows
from .row import Row, checked, relative_error


def elementwise_rows() -> Iterator[Row]:
    """The operations between the products, at 4096 tokens of a 7B model (bytes read and written over time)."""
    t, d, i = 4096, 4096, 14336
    sets = [[torch.randn(t, size, device="cuda", dtype=torch.bfloat16) for size in (d, d, 2 * i)] for _ in range(3)]
    weight = torch.randn(d, device="cuda", dtype=torch.bfloat16)

    def row(name: str, nbytes: int, run: Callable[..., object], error: float) -> Row:
        us = microseconds([lambda s=s: run(*s) for s in sets])  # type: ignore[misc]
        return Row(name, f"{t} tokens", us, checked(error, 5e-3, name), None, nbytes / us / 1e6)

    x, residual, gate_up = sets[0]
    yield row(
        "add + RMSNorm",
        8 * t * d,
        lambda x, r, g: elementwise.add_rms_norm(x, r, weight, 1e-5),
        relative_error(
            elementwise.add_rms_norm(x, residual, weight, 1e-5)[0],
            elementwise.add_rms_norm(x, residual, weight, 1e-5, impl="torch")[0],
        ),
    )
    yield row(
        "SiLU-mul",
        6 * t * i,
        lambda x, r, g: elementwise.silu_mul(g),
        relative_error(elementwise.silu_mul(gate_up), elementwise.silu_mul(gate_up, impl="torch")),
    )

    def of_codes(got: Activations, want: Tensor) -> float:
        """Rounding itself errs by up to 3 %: a hundredth is left for what comes before."""
        held = quantize_rows(want, got.codes.dtype, impl="torch").dequantize(torch.float32)
        return relative_error(got.dequantize(torch.float32), held)

    for codes, short in ((torch.int8, "int8"), (torch.float8_e4m3fn, "fp8")):
        yield row(
            f"add + RMSNorm to {short}",
            7 * t * d,
            partial(lambda codes, x, r, g: rounding.quantized_add_rms_norm(x, r, weight, 1e-5, codes), codes),
            of_codes(
                rounding.quantized_add_rms_norm(x, residual, weight, 1e-5, codes)[0],
                elementwise.rms_norm((x + residual).float(), weight.float(), 1e-5, impl="torch"),
            ),
        )
        yield row(
            f"SiLU-mul to {short}",
            5 * t * i,
            partial(lambda codes, x, r, g: rounding.quantized_silu_mul(g, codes), codes),
            of_codes(
                rounding.quantized_silu_mul(gate_up, codes), elementwise.silu_mul(gate_up.float(), impl="torch")
            ),
        )
        yield row(
            f"quantize rows to {short}",
            3 * t * d,
            partial(lambda codes, x, r, g: quantize_rows(x, codes), codes),
            of_codes(quantize_rows(x, codes), x.float()),
        )
