"""Weight formats and the quantizer: a weight [N, K] (out features, in features) as codes, scales and zero points.

    bf16   w
    int8   A16W8, symmetric per output channel:   w ~ code * scale[n],                   code in -127..127
    int4   A16W4, asymmetric per group of K:      w ~ (code - zero[n, g]) * scale[n, g],  code and zero in 0..15
    w8a8   A8W8: the codes and scales of int8; the activations of larger steps are int8 too (on a CPU those of large
           weights always, see `activations`)
    fp8    A8W8: as w8a8 in e4m3 (4 bits of exponent, 3 of mantissa, largest 448): w ~ code * scale[n]
    w4a8   A8W4: the codes, scales and zeros of int4; larger steps multiply its int8 form, see `requantized`

Scales are rounded to bfloat16 before the codes are chosen, so every device layout holds exactly the same codes, scales
and zeros; those of fp8 stay float32, as `torch._scaled_mm` reads them. ATen's int4 product on a CPU takes a group's
offset, (8 - zero) * scale, in bfloat16, which moves its weights by up to 0.03 of a step. Rounding to nearest is the
baseline of Nagel et al., "A White Paper on Neural Network Quantization" (2021); e4m3 is that of Micikevicius et al.,
"FP8 Formats for Deep Learning" (2022).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

GROUP_SIZES = (64, 128)
E4M3_MAX = 448.0
LARGEST_WEIGHT = 1e38  # the span from its negative to it is still a float32
SMALLEST_SCALE = 2.0**-100  # smaller ones count as 0: reciprocals of denormal numbers are not finite
FEATURES_OF_8_BIT_PRODUCTS = 16  # K of w8a8 and fp8 is a multiple: what one load of the kernels moves, in bytes


@dataclass(frozen=True)
class WeightFormat:
    """One entry of `WEIGHT_FORMATS`: what a panel lists, and what a memory plan needs."""

    name: str
    label: str
    description: str
    code_bits: int
    scale_bytes: int  # per group of K where `grouped`, else per output channel
    grouped: bool
    quantize: Callable[[Tensor, int], QuantizedWeight]
    activations: torch.dtype | None = None  # codes of the activations, None where they stay 16 bit
    sixteen_bit_rows: int = 0  # up to so many rows of x they stay 16 bit: there the weight's bytes count
    channel_bytes: int = 0  # per output channel, beside the scales of groups

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the scales per output channel in a plain layout."""
        return torch.float32 if self.scale_bytes == 4 else torch.bfloat16

    def nbytes(self, n: int, k: int, group_size: int = 128) -> int:
        """Bytes of a packed [n, k] weight with its scales and zeros, before a layout pads n to its tile."""
        scales = n * (k // group_size) if self.grouped else n
        return n * k * self.code_bits // 8 + scales * self.scale_bytes + n * self.channel_bytes


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [N, K] in its canonical, device-neutral form.

    codes [N, K]: bfloat16 for bf16, int8 for int8 and w8a8, float8_e4m3fn for fp8, uint8 (0..15) for int4 and w4a8.
    scale: None, float32 [N] (int8, w8a8, fp8) or float32 [N, K/G] (int4, w4a8).
    zero: None, or uint8 [N, K/G] (int4, w4a8).
    order: int64 [K], column j of the codes belongs to in feature order[j] (GPTQ's activation order, which sorts
        features into groups by importance); None where each column stands in its place.
    """

    format: str
    codes: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    group_size: int | None = None
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held in this form, not in a packed one."""
        held = (self.codes, self.scale, self.zero, self.order)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the codes stand for, every column in its place."""
        dense = self._dequantize(dtype)
        return dense if self.order is None else dense[:, self.order.argsort()]

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.scale is None:
            return self.codes.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.zero is None:
            return (self.codes.to(wide) * self.scale.to(wide)[:, None]).to(dtype)
        n, k = self.shape
        grouped = self.codes.view(n, self.zero.shape[1], -1).to(wide) - self.zero.to(wide)[:, :, None]
        return (grouped * self.scale.to(wide)[:, :, None]).view(n, k).to(dtype)

    def requantized(self) -> QuantizedWeight:
        """The int8 form of a 4-bit weight, one scale per output channel, by which w4a8 multiplies 8-bit activations:

            code8[n, k] = round((code - zero) * ratio[n, g])      ratio = fp16(scale[n, g] * (1 / channel[n]))

        No scale per group is left to apply to sums, so that they stay in int32. Ties go to the even code; every product
        above is exact in float32, so each device gets the same codes. Progressive quantization as in Lin et al.,
        "QServe" (2024), here from the 4-bit side.
        """
        assert self.scale is not None and self.zero is not None
        channel = channel_scales(self.scale, self.zero)
        ratio = (self.scale.float() * channel.reciprocal()[:, None]).half().float()[:, :, None]
        grouped = self.codes.unflatten(1, (self.zero.shape[1], -1)).float() - self.zero.float()[:, :, None]
        return QuantizedWeight("w8a8", (grouped * ratio).round_().to(torch.int8).flatten(1), channel, order=self.order)


def channel_scales(scale: Tensor, zero: Tensor) -> Tensor:
    """float32 [N]: scales under which int8 holds all that 4-bit codes can say with `scale` and `zero` [N, K/G]."""
    reach = (scale.float().abs() * torch.maximum(zero, 15 - zero)).amax(1)
    channel = reach / torch.full_like(reach, 127)  # with a plain number CUDA would round twice
    return torch.where(channel > 0, channel, 1.0)


def check_groups(k: int, group_size: int) -> None:
    """ValueError unless group_size is supported and divides k."""
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, not {group_size}")
    if k % group_size:
        raise ValueError(f"in features must be a multiple of the group size: {k} is not a multiple of {group_size}")


def check_weight(weight: Tensor) -> None:
    """ValueError unless it is a floating [N, K] matrix of numbers that every format can scale."""
    if weight.dim() != 2 or not weight.is_floating_point() or not weight.numel():
        raise ValueError(f"weight must be a floating [N, K] matrix, not {weight.dtype} {tuple(weight.shape)}")
    low, high = (float(x) for x in weight.aminmax())
    if not (-LARGEST_WEIGHT <= low and high <= LARGEST_WEIGHT):
        raise ValueError(
            f"weight {tuple(weight.shape)} holds NaN, infinity or numbers beyond {LARGEST_WEIGHT:g} and cannot be "
            "quantized"
        )


def usable(scale: Tensor) -> Tensor:
    """scale, 1 where a group or channel has no range, or none to speak of: any scale represents its zeros."""
    return torch.where(scale >= SMALLEST_SCALE, scale, 1.0)


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(torch.float32)


def _quantize_bf16(weight: Tensor, group_size: int) -> QuantizedWeight:
    return QuantizedWeight("bf16", weight.to(torch.bfloat16))


def _quantize_int8(weight: Tensor, group_size: int) -> QuantizedWeight:
    w = weight.float()
    scale = usable(_bf16(w.abs().amax(1) / 127))
    codes = (w / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return QuantizedWeight("int8", codes, scale)


def _quantize_w8a8(weight: Tensor, group_size: int) -> QuantizedWeight:
    _check_8_bit(weight.shape[1], "w8a8")
    return replace(_quantize_int8(weight, group_size), format="w8a8")


def _quantize_fp8(weight: Tensor, group_size: int) -> QuantizedWeight:
    _check_8_bit(weight.shape[1], "fp8")
    w = weight.float()
    scale = usable(w.abs().amax(1) / E4M3_MAX)
    return QuantizedWeight("fp8", (w / scale[:, None]).to(torch.float8_e4m3fn), scale)


def _check_8_bit(k: int, format: str) -> None:
    if k % FEATURES_OF_8_BIT_PRODUCTS:
        raise ValueError(f"in features of {format} must be a multiple of {FEATURES_OF_8_BIT_PRODUCTS}, {k} is not")


def _quantize_int4(weight: Tensor, group_size: int) -> QuantizedWeight:
    n, k = weight.shape
    check_groups(k, group_size)
    w = weight.float().view(n, k // group_size, group_size)
    low, high = w.amin(-1).clamp_(max=0), w.amax(-1).clamp_(min=0)  # the range holds 0, so zero is a code
    scale = usable(_bf16((high - low) / 15))
    zero = (-low / scale).round_().clamp_(0, 15)
    codes = (w / scale[..., None]).add_(zero[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return QuantizedWeight("int4", codes.view(n, k), scale, zero.to(torch.uint8), group_size)


def _quantize_w4a8(weight: Tensor, group_size: int) -> QuantizedWeight:
    return replace(_quantize_int4(weight, group_size), format="w4a8")


WEIGHT_FORMATS: dict[str, WeightFormat] = {
    "bf16": WeightFormat("bf16", "bf16", "16-bit weights, the reference", 16, 0, False, _quantize_bf16),
    "int8": WeightFormat(
        "int8",
        "int8 (A16W8)",
        "8-bit weights, one scale per output channel: half the bytes",
        8,
        2,
        False,
        _quantize_int8,
    ),
    "int4": WeightFormat(
        "int4", "int4 (A16W4)", "4-bit weights, scale and zero per group: 3.8x fewer bytes", 4, 4, True, _quantize_int4
    ),
    "w8a8": WeightFormat(
        "w8a8",
        "w8a8 (A8W8)",
        "the weights of int8; larger steps round activations to int8 per token and multiply in int8",
        8,
        2,
        False,
        _quantize_w8a8,
        torch.int8,
        16,
    ),
    "fp8": WeightFormat(
        "fp8",
        "fp8 (A8W8)",
        "8-bit floating-point weights; larger steps round activations to fp8 per token and multiply in fp8",
        8,
        4,
        False,
        _quantize_fp8,
        torch.float8_e4m3fn,
        16,
    ),
    "w4a8": WeightFormat(
        "w4a8",
        "w4a8 (A8W4)",
        "the weights of int4; larger steps round activations to int8 per token, and weights to int8 as they multiply",
        4,
        4,
        True,
        _quantize_w4a8,
        torch.int8,
        64,
        4,
    ),
}


def weight_format(name: str) -> WeightFormat:
    """The format of that name; ValueError listing the names there are."""
    if name not in WEIGHT_FORMATS:
        raise ValueError(f"weight format must be one of {sorted(WEIGHT_FORMATS)}, not {name!r}")
    return WEIGHT_FORMATS[name]


def quantize_weight(weight: Tensor, format: str, group_size: int = 128) -> QuantizedWeight:
    """Quantize a floating weight [N, K] on its own device, rounding to nearest.

    ValueError: unknown format; not a matrix; NaN, infinity or beyond 1e38; K not a multiple of group_size (64 or 128;
        int4 and w4a8 only).
    """
    chosen = weight_format(format)
    check_weight(weight)
    return chosen.quantize(weight, group_size)
