"""The paged KV cache: formats and one layer's storage; `kv_access` writes and reads it.

A quantized format keeps, per token and head, a code for each element and one 32-bit scale word: x ~ code * scale + low,
with the bf16 scale in the word's upper and the bf16 low (the smallest element) in its lower half. In fp8 a code is an
e4m3 number (Micikevicius et al., "FP8 Formats for Deep Learning", 2022), low is 0, and the scale is the power of two
that brings the largest element into (224, 448], so that numbers of four significant bits are kept exactly. Codes are
planes in int16 words, so that a word tile has the shape of a 16-bit operand (as in `packing.pack_planes`):

    8-bit  word[i] = code[i] | code[i + D/2] << 8                                              i < D/2
    int4   word[i] = code[i] | code[i + D/4] << 4 | code[i + D/2] << 8 | code[i + 3D/4] << 12  i < D/4

Per-token, per-head quantization as in LMDeploy and in Sheng et al., "FlexGen" (2023), with scale and range guarded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

HEAD_DIMS = (64, 128)
BLOCK_SIZES = (16, 32, 64, 128)
E4M3_MAX = 448.0
# The scale of a vector whose elements are all equal: any would do to decode it. But attention factors scales out, takes
# codes from the middle of their range, and rounds what belongs to small scales beside large ones: this one stays out.
NO_SPAN = 2.0**-64
FP8_LARGEST = E4M3_MAX * 2.0**119  # what a vector in fp8 can hold; float32 ends below twice that


@dataclass(frozen=True)
class Codec:
    """How one side (keys or values) of a token's head is stored: `name`, by which kernels know it; `bits` per element;
    `scale_bytes` per token and head."""

    name: str
    bits: int
    scale_bytes: int

    def words(self, head_dim: int) -> int:
        """16-bit words per token and head."""
        return head_dim * self.bits // 16

    def noise(self, span: float, rms: float) -> float:
        """Expected root-mean-square rounding error of vectors whose elements lie `span` apart and have this `rms`.

        Evenly spaced codes err by at most half a step, evenly spread; floating point by at most half its last place,
        whose share of a number is 0.7 times its share of the power of two below, on average over [1, 2)."""
        if self.name in ("bf16", "fp8"):
            mantissa = 7 if self.name == "bf16" else 3
            return 0.7 * 2.0**-mantissa * rms / 12**0.5
        return span / ((1 << self.bits) - 1) / 12**0.5


@dataclass(frozen=True)
class KVFormat:
    """One entry of `KV_FORMATS`: what a panel lists, and what a memory plan needs. Keys and values may differ
    (k8v4)."""

    name: str
    label: str
    description: str
    key: Codec
    value: Codec

    def bytes_per_token(self, kv_heads: int, head_dim: int) -> int:
        """Bytes of one token's keys and values in one layer, scale words included."""
        sides = (self.key, self.value)
        return kv_heads * sum(2 * side.words(head_dim) + side.scale_bytes for side in sides)


_BF16, _INT8, _INT4, _FP8 = Codec("bf16", 16, 0), Codec("int8", 8, 4), Codec("int4", 4, 4), Codec("fp8", 8, 4)
KV_FORMATS: dict[str, KVFormat] = {
    "bf16": KVFormat("bf16", "bf16", "16-bit keys and values, the reference", _BF16, _BF16),
    "int8": KVFormat(
        "int8", "int8", "8-bit codes, scale per token and head: 1.94x the tokens at head_dim 128", _INT8, _INT8
    ),
    "int4": KVFormat(
        "int4", "int4", "4-bit codes, scale per token and head: 3.76x the tokens at head_dim 128", _INT4, _INT4
    ),
    "fp8": KVFormat(
        "fp8", "fp8", "8-bit floats (e4m3), scale per token and head: 1.94x the tokens at head_dim 128", _FP8, _FP8
    ),
    "k8v4": KVFormat(
        "k8v4",
        "k8v4",
        "8-bit keys, 4-bit values, scale per token and head: 2.56x the tokens at head_dim 128",
        _INT8,
        _INT4,
    ),
}


@dataclass(frozen=True)
class KVLayer:
    """One layer's paged keys and values, allocated once.

    key, value [num_blocks, block_size, kv_heads, words]: bfloat16, or int16 planes; key_scale, value_scale [num_blocks,
    block_size, kv_heads] int32, or None. The shapes are views; the memory order is the device's: blocks, heads, tokens
    on CUDA (a program streams one head of a block), heads, blocks, tokens on the CPU (gathered blocks are a batch of
    matrices).
    """

    format: KVFormat
    head_dim: int
    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def num_blocks(self) -> int:
        return self.key.shape[0]

    @property
    def block_size(self) -> int:
        return self.key.shape[1]

    @property
    def kv_heads(self) -> int:
        return self.key.shape[2]

    @property
    def device(self) -> torch.device:
        return self.key.device

    @cached_property
    def slots_by_head(self) -> tuple[Tensor, Tensor]:
        """Keys and values as [kv_heads, slots, words], without a copy in the CPU's memory order. Kept, since making
        views costs a step as much as a small product."""
        return self.key.movedim(2, 0).flatten(1, 2), self.value.movedim(2, 0).flatten(1, 2)

    @property
    def nbytes(self) -> int:
        """Bytes held by this layer."""
        return sum(
            t.numel() * t.element_size()
            for t in (self.key, self.value, self.key_scale, self.value_scale)
            if t is not None
        )


def kv_format(name: str) -> KVFormat:
    """The format of that name; ValueError listing the names there are."""
    if name not in KV_FORMATS:
        raise ValueError(f"KV format must be one of {sorted(KV_FORMATS)}, not {name!r}")
    return KV_FORMATS[name]


def allocate_kv(
    format: str, num_blocks: int, block_size: int, kv_heads: int, head_dim: int, device: torch.device | str,
    order: str | None = None,
) -> KVLayer:
    """Allocate one layer of `num_blocks` blocks of `block_size` tokens, zeroed.

    order: the outermost dimension in memory, "block" or "head", instead of the device's own (see KVLayer).
    ValueError: unknown format; head_dim not 64 or 128; block_size not 16, 32, 64 or 128; a count below 1.
    """
    chosen = kv_format(format)
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim must be one of {HEAD_DIMS}, not {head_dim}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, not {block_size}")
    if num_blocks < 1 or kv_heads < 1:
        raise ValueError(f"num_blocks and kv_heads must be at least 1, not {num_blocks} and {kv_heads}")
    device = torch.device(device)
    head_first = (order or ("head" if device.type == "cpu" else "block")) == "head"

    def zeros(dtype: torch.dtype, *last: int) -> Tensor:
        if head_first:
            return torch.zeros(kv_heads, num_blocks, block_size, *last, dtype=dtype, device=device).movedim(0, 2)
        return torch.zeros(num_blocks, kv_heads, block_size, *last, dtype=dtype, device=device).transpose(1, 2)

    def side(codec: Codec) -> tuple[Tensor, Tensor | None]:
        data = zeros(torch.bfloat16 if codec.bits == 16 else torch.int16, codec.words(head_dim))
        return data, zeros(torch.int32) if codec.scale_bytes else None

    (key, key_scale), (value, value_scale) = side(chosen.key), side(chosen.value)
    return KVLayer(chosen, head_dim, key, value, key_scale, value_scale)


# codes


def encode(x: Tensor, codec: Codec) -> tuple[Tensor, Tensor | None]:
    """x [..., D] -> words [..., words] and scale words [...] int32 (None for bf16)."""
    if codec.bits == 16:
        return x.to(torch.bfloat16), None
    x = x.float()
    if codec.name == "fp8":
        low = x.new_zeros(x.shape[:-1], dtype=torch.bfloat16)
        scale = _scale_upwards(x.abs().amax(-1).clamp_(max=FP8_LARGEST), E4M3_MAX, 23)
        codes = (x / scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        codes = codes.view(torch.uint8).to(torch.int16)
    else:
        levels = (1 << codec.bits) - 1
        low = x.amin(-1).bfloat16()
        scale = _scale_upwards((x.amax(-1) - low.float()).clamp_(min=0), levels, 16)
        codes = torch.floor((x - low.float()[..., None]) / scale[..., None] + 0.5).clamp_(0, levels).to(torch.int16)
    planes = codes.unflatten(-1, (16 // codec.bits, -1))
    words = planes[..., 0, :].clone()
    for plane in range(1, 16 // codec.bits):
        words |= planes[..., plane, :] << (plane * codec.bits)
    return words, scale.view(torch.int32) | (low.view(torch.int16).to(torch.int32) & 0xFFFF)


def _scale_upwards(span: Tensor, levels: float, dropped: int) -> Tensor:
    """span / levels as float32, rounded up to what leaves the last `dropped` bits zero (16: bf16; 23: a power of two),
    so that the largest element never lies beyond the last code; NO_SPAN where it is zero: then every code is 0."""
    # (Divided by a tensor: on CUDA, division by a number is multiplication by its rounded reciprocal.)
    scale_bits = (span / torch.full_like(span, levels)).view(torch.int32).add_((1 << dropped) - 1) & -(1 << dropped)
    scale = scale_bits.view(torch.float32)
    return torch.where(scale > 0, scale, NO_SPAN)


def scale_and_low(scale_words: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 scale and low of int32 scale words."""
    return (scale_words & -0x10000).view(torch.float32), (scale_words << 16).view(torch.float32)


def decode(words: Tensor, scale_words: Tensor | None, codec: Codec) -> Tensor:
    """The inverse of `encode`: float32 [..., D]."""
    if scale_words is None:
        return words.float()
    shifts = torch.arange(0, 16, codec.bits, dtype=torch.int16, device=words.device)[:, None]
    codes = ((words[..., None, :] >> shifts) & ((1 << codec.bits) - 1)).flatten(-2)
    codes = codes.to(torch.uint8).view(torch.float8_e4m3fn).float() if codec.name == "fp8" else codes.float()
    scale, low = scale_and_low(scale_words)
    return codes * scale[..., None] + low[..., None]
