"""Activations in 8 bits, for weight formats whose larger products run in 8 bits on both sides (w8a8, fp8, w4a8).

    x[t, k] ~ codes[t, k] * scale[t]       codes int8 in -127..127, or e4m3; scale float32, from the largest |x[t]|

At few rows only the weight's bytes count: the codes of the weight are widened in registers and x keeps its 16 bits
(A16W8, A16W4). Above `WeightFormat.sixteen_bit_rows` the tensor core's 8-bit rate counts, and x is rounded.
`activation_codes` says so. A CPU differs in one case: what oneDNN has packed in int8 is multiplied by 8-bit x alone, at
one row too: there it takes as long as widening the weight, at sixteen rows a third of that. `codes_for` is the one
place that decides, the same for every implementation on a device and in the reference, so that a weight means the same
numbers in all of them. How they are made: `rounding`.

Scales per token and per output channel as in Dettmers et al., "LLM.int8()" (2022); e4m3 for both sides as in
Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.packing import device_layout
from ..formats.weights import E4M3_MAX, weight_format

LARGEST_CODE = {torch.int8: 127.0, torch.float8_e4m3fn: E4M3_MAX}
SMALLEST_RANGE = 1e-30  # largest |x| of a row that still spans the codes: smaller ones would overflow 1 / scale


def activation_codes(format: str, rows: int) -> torch.dtype | None:
    """What x [rows, K] becomes on a GPU before a product with a weight of that format; None: it stays in 16 bits."""
    chosen = weight_format(format)
    return chosen.activations if rows > chosen.sixteen_bit_rows else None


def codes_for(weight: PackedWeight, rows: int) -> torch.dtype | None:
    """What x [rows, K] becomes before a product with that weight; None: it stays in 16 bits."""
    chosen = weight_format(weight.format).activations
    return chosen if chosen is not None and _rounds_always(weight) else activation_codes(weight.format, rows)


def _rounds_always(weight: PackedWeight) -> bool:
    """The reference may hold plain codes of a weight that the fast path has packed."""
    held = weight.layout
    own = device_layout(weight.format, weight.device, weight.shape) if held == "plain" else held
    return own == "onednn8"


@dataclass(frozen=True)
class Activations:
    """x [..., K] in 8 bits, which `linear` takes in its place.

    codes: int8 or float8_e4m3fn [..., K]. scale: float32 [...] (float64 for float64 x). dtype: of x, and of the
    products that are made with it.
    """

    codes: Tensor
    scale: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """codes * scale in `dtype`, by default that of x."""
        wide = self.codes.to(self.scale.dtype) * self.scale[..., None]
        return wide.to(dtype or self.dtype)

    def rows(self) -> Activations:
        """The same as [M, K] and [M]."""
        return replace(self, codes=self.codes.reshape(-1, self.shape[-1]), scale=self.scale.reshape(-1))


@dataclass(frozen=True)
class SummedRows:
    """x [T, K] bf16 with the sums of its groups, float32 [K/G, T]: a product with 4-bit codes takes the zero points off
    by them instead of off every code (see `a16w4`). Only kernels that multiply planes profit, so only they get it."""

    x: Tensor
    sums: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype


Operand = Tensor | Activations | SummedRows
"""What `linear` multiplies with a weight."""
