"""Codecs of the KV cache (`kv_cache.Codec`) as kernels read them: int16 words to fp16 operands, plane by plane."""

# ruff: noqa: N803
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..triton_common import INTERP


@triton.jit
def codes_fp16(words, PLANE: tl.constexpr, BITS: tl.constexpr, CENTRED: tl.constexpr, INTERP: tl.constexpr):
    """fp16 bias + code of one plane of int16 words, exactly; see `code_bias`.

    A 4-bit code shifted to mantissa bits 6..9 under the exponent of 16 is 16 + code; a byte in the low mantissa under
    the exponent of 1024 is 1024 + code, from which CENTRED subtracts 1152. The small biases are for values: a large one
    would have to cancel against a sum over the whole context, and the tensor core truncates as it accumulates."""
    if INTERP:
        code = ((words >> (PLANE * BITS)) & ((1 << BITS) - 1)).to(tl.float32)
        return (code + code_bias(BITS, CENTRED)).to(tl.float16)
    asm: tl.constexpr = code_to_fp16(PLANE, BITS, CENTRED)
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.constexpr_function
def code_to_fp16(plane: int, bits: int, centred: bool) -> str:
    """PTX for two codes of one plane of the words in $1, see `codes_fp16`."""
    if bits == 4:
        shift = ("shl.b32 t, $1, 6;", "shl.b32 t, $1, 2;", "shr.u32 t, $1, 2;", "shr.u32 t, $1, 6;")[plane]
        return f"{{ .reg .b32 t; {shift} lop3.b32 $0, t, 0x03c003c0, 0x4c004c00, 0xea; }}"
    byte = "0x4341" if plane else "0x4240"
    if not centred:
        return f"prmt.b32 $0, $1, 0x64646464, {byte};"
    return (
        f"{{ .reg .b32 t, c; prmt.b32 t, $1, 0x64646464, {byte}; mov.b32 c, 0xe480e480; "
        "add.f16x2 $0, t, c; }"
    )


@triton.constexpr_function
def code_bias(bits: int, centred: bool) -> float:
    """What `codes_fp16` adds to a code."""
    return 16.0 if bits == 4 else -128.0 if centred else 1024.0


@lru_cache(maxsize=1)
def converts_e4m3() -> bool:
    """Whether the GPU has an instruction that converts e4m3 to fp16 (compute capability 8.9 and later)."""
    return not INTERP and torch.cuda.get_device_capability() >= (8, 9)


def reading(codec: str) -> str:
    """The codec's name for kernels that read it: "fp8" where the GPU converts e4m3 itself, else "fp8_shifted"."""
    return "fp8_shifted" if codec == "fp8" and not converts_e4m3() else codec


@triton.constexpr_function
def bits_of(codec: str) -> int:
    """Bits per element of a codec."""
    return {"bf16": 16, "int8": 8, "int4": 4}.get(codec, 8)


@triton.constexpr_function
def has_low(codec: str) -> bool:
    """Whether a vector's smallest element belongs to its scale word (integer codes count from it)."""
    return codec.startswith("int")


@triton.constexpr_function
def operand_bias(codec: str, centred: bool) -> float:
    """What `operand_fp16` adds to a code."""
    return 0.0 if codec.startswith("fp8") else code_bias(bits_of(codec), centred)


@triton.jit
def operand_fp16(words, PLANE: tl.constexpr, CODE: tl.constexpr, CENTRED: tl.constexpr, INTERP: tl.constexpr):
    """One plane of int16 words as fp16, exactly: bias + code of an integer codec, the number itself of fp8."""
    if CODE == "fp8" or CODE == "fp8_shifted":
        return e4m3_fp16(words, PLANE, CODE == "fp8" and not INTERP)
    return codes_fp16(words, PLANE, bits_of(CODE), CENTRED, INTERP)


@triton.jit
def e4m3_fp16(words, PLANE: tl.constexpr, CONVERT: tl.constexpr):
    """The e4m3 numbers in one byte of int16 words as fp16, which holds them all.

    CONVERT: the bytes of two words are put side by side and converted by one instruction. Otherwise sign, exponent
    and mantissa are shifted to their places in fp16, whose exponent bias is larger by 8: hence the factor of 2^8.
    """
    if not CONVERT:
        byte = (words >> (8 * PLANE)).to(tl.int32)
        moved = (((byte & 0x7F) << 7) | ((byte & 0x80) << 8)).to(tl.int16)
        return moved.to(tl.float16, bitcast=True) * 256.0
    asm: tl.constexpr = e4m3_to_fp16(PLANE)
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.constexpr_function
def e4m3_to_fp16(plane: int) -> str:
    """PTX for the e4m3 numbers in one byte of two words in $1."""
    byte = "0x4431" if plane else "0x4420"
    return (
        f"{{ .reg .b32 t; .reg .b16 pair, rest; prmt.b32 t, $1, 0, {byte}; mov.b32 {{pair, rest}}, t; "
        "cvt.rn.f16x2.e4m3x2 $0, pair; }"
    )
