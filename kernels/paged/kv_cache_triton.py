"""Storing new keys and values in the paged cache, quantized on the way, and expanding blocks to bf16 again.

A vector is read as [planes, words], so each plane's codes meet in the same word by a shift and a sum: one program per
token and head.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERP, to_bf16
from .codec_triton import bits_of, operand_bias, operand_fp16, reading
from .kv_cache import KV_FORMATS, KVLayer


@triton.jit
def scale_upwards(span, LEVELS: tl.constexpr, DROPPED: tl.constexpr, ROWS: tl.constexpr):
    """The bits of span / LEVELS, span [ROWS] float32, rounded up to what leaves the last DROPPED bits zero; of
    `kv_cache.NO_SPAN` where that is zero."""
    bits = tl.div_rn(span, tl.zeros((ROWS,), tl.float32) + LEVELS).to(tl.int32, bitcast=True)
    bits = (bits + ((1 << DROPPED) - 1)) & -(1 << DROPPED)
    return tl.where(bits > 0, bits, 0x1F800000)


@triton.jit
def e4m3_code(x):
    """float32 -> the e4m3 code 0..255 as int32, to nearest even; beyond 448 the largest code, NaN stays NaN.

    Integer arithmetic, so that a GPU of any age and the interpreter give the same bits. Below 2^-6, the smallest normal
    number, codes are multiples of 2^-9: what adding 2^14 leaves in the last bits of a float32."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 127 -> 7
    tiny = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, tiny, tl.minimum(normal, 0x7E))  # 2^-6; 448
    return tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@triton.jit
def encode_rows(x, CODE: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, INTERP: tl.constexpr):
    """x [ROWS, D] float32 -> words [ROWS, D * bits / 16] and scale words [ROWS] int32 (zeros for bf16), each row the
    same bits as `kv_cache.encode`. CODE: the codec's name."""
    if CODE == "bf16":
        return to_bf16(x, INTERP), tl.zeros((ROWS,), tl.int32)
    else:
        BITS: tl.constexpr = bits_of(CODE)
        PLANES: tl.constexpr = 16 // BITS
        if CODE == "fp8":
            LARGEST: tl.constexpr = 448.0 * 2.0**119  # kv_cache.FP8_LARGEST
            scale_bits = scale_upwards(tl.minimum(tl.max(tl.abs(x), 1), LARGEST), 448.0, 23, ROWS)
            scale = scale_bits.to(tl.float32, bitcast=True)
            code = e4m3_code(tl.div_rn(x, tl.zeros((ROWS, D), tl.float32) + scale[:, None]))
            word = scale_bits
        else:
            LEVELS: tl.constexpr = (1 << BITS) - 1
            low_bits = tl.min(x, 1).to(tl.int32, bitcast=True)
            low_bits = (low_bits + 0x7FFF + ((low_bits >> 16) & 1)) & -0x10000  # bf16, to nearest even
            low = low_bits.to(tl.float32, bitcast=True)
            scale_bits = scale_upwards(tl.maximum(tl.max(x, 1) - low, 0.0), LEVELS + 0.0, 16, ROWS)
            scale = scale_bits.to(tl.float32, bitcast=True)
            code = tl.floor(tl.div_rn(x - low[:, None], tl.zeros((ROWS, D), tl.float32) + scale[:, None]) + 0.5)
            code = tl.minimum(tl.maximum(code, 0.0), LEVELS + 0.0).to(tl.int32)
            word = scale_bits | ((low_bits >> 16) & 0xFFFF)
        planes = tl.reshape(code, (ROWS, PLANES, D // PLANES))
        shift = tl.arange(0, PLANES)[None, :, None] * BITS
        return tl.sum(planes << shift, 1).to(tl.int16), word


@triton.jit
def _store(
    x, words, scales, block, offset, head, word_block, word_token, word_head, scale_block, scale_token, scale_head,
    D: tl.constexpr, CODE: tl.constexpr, INTERP: tl.constexpr,
):
    W: tl.constexpr = D * bits_of(CODE) // 16
    word, scale_word = encode_rows(tl.load(x + tl.arange(0, D)).to(tl.float32)[None, :], CODE, 1, D, INTERP)
    to = words + block * word_block + offset * word_token + head * word_head
    tl.store(to + tl.arange(0, W)[None, :], word)
    if CODE != "bf16":
        to = scales + block * scale_block + offset * scale_token + head * scale_head
        tl.store(to + tl.arange(0, 1), scale_word)


@triton.jit
def write_kv_kernel(
    k, v, slots, key, value, key_scale, value_scale, k_row, k_head, v_row, v_head, key_block, key_token, key_head,
    value_block, value_token, value_head, scale_block, scale_token, scale_head, BLOCK: tl.constexpr, D: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, INTERP: tl.constexpr,
):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        block, offset = slot // BLOCK, slot % BLOCK
        if tl.program_id(2) == 0:
            _store(
                k + row * k_row + head * k_head, key, key_scale, block, offset, head, key_block, key_token, key_head,
                scale_block, scale_token, scale_head, D, KEY, INTERP,
            )
        else:
            _store(
                v + row * v_row + head * v_head, value, value_scale, block, offset, head, value_block, value_token,
                value_head, scale_block, scale_token, scale_head, D, VALUE, INTERP,
            )


def scale_strides(layer: KVLayer) -> tuple[int, int, int]:
    """Strides (block, token, head) of the scale words, which keys and values share; zeros where there are none."""
    scales = layer.key_scale if layer.key_scale is not None else layer.value_scale
    return (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(1), scales.stride(2))


def write_kv_triton(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D], last dimension contiguous."""
    if k.stride(2) != 1 or v.stride(2) != 1 or slots.dtype != torch.int64:
        raise ValueError(
            "write_kv: k and v need a contiguous last dimension, slots int64, "
            f"not {k.stride()}, {v.stride()}, {slots.dtype}"
        )
    key, value = layer.key, layer.value
    if len(slots):
        write_kv_kernel[(len(slots), layer.kv_heads, 2)](
            k, v, slots, key, value, layer.key_scale, layer.value_scale, k.stride(0), k.stride(1), v.stride(0),
            v.stride(1), *key.stride()[:3], *value.stride()[:3], *scale_strides(layer), layer.block_size,
            layer.head_dim, layer.format.key.name, layer.format.value.name, INTERP, num_warps=1,
        )


@triton.jit
def _expand(
    words, scales, out, block, tokens, head, word_block, word_token, word_head, scale_block, scale_token, scale_head,
    D: tl.constexpr, CODE: tl.constexpr, BLOCK: tl.constexpr, INTERP: tl.constexpr,
):
    PLANES: tl.constexpr = 16 // bits_of(CODE)
    W: tl.constexpr = D // PLANES
    n, i = tl.arange(0, BLOCK), tl.arange(0, W)
    inside = n < tokens
    w = tl.load(
        words + block * word_block + head * word_head + n[:, None] * word_token + i[None, :],
        mask=inside[:, None],
        other=0,
    )
    to = out + n[:, None] * D + i[None, :]
    if CODE == "bf16":
        tl.store(to, w, mask=inside[:, None])
    else:
        word = tl.load(scales + block * scale_block + head * scale_head + n * scale_token, mask=inside, other=0)
        scale = (word & -0x10000).to(tl.float32, bitcast=True)[:, None]
        low = (word << 16).to(tl.float32, bitcast=True)[:, None]
        for plane in tl.static_range(PLANES):
            code = operand_fp16(w, plane, CODE, True, INTERP).to(tl.float32) - operand_bias(CODE, True)
            tl.store(to + plane * W, to_bf16(code * scale + low, INTERP), mask=inside[:, None])


@triton.jit(do_not_specialize=["table_row"])
def expand_kernel(
    key, value, key_scale, value_scale, tables, lengths, key_out, value_out, table_row, key_block, key_token, key_head,
    value_block, value_token, value_head, scale_block, scale_token, scale_head, D: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, BLOCK: tl.constexpr, INTERP: tl.constexpr,
):
    index, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2) // 2
    tokens = tl.minimum(tl.load(lengths + b) - index * BLOCK, BLOCK)
    if tokens > 0:
        block = tl.load(tables + b * table_row + index).to(tl.int64)
        to = ((b.to(tl.int64) * tl.num_programs(0) + index) * tl.num_programs(1) + head) * BLOCK * D
        if tl.program_id(2) % 2 == 0:
            _expand(
                key, key_scale, key_out + to, block, tokens, head, key_block, key_token, key_head, scale_block,
                scale_token, scale_head, D, KEY, BLOCK, INTERP,
            )
        else:
            _expand(
                value, value_scale, value_out + to, block, tokens, head, value_block, value_token, value_head,
                scale_block, scale_token, scale_head, D, VALUE, BLOCK, INTERP,
            )


def expand_blocks(layer: KVLayer, block_tables: Tensor, lengths: Tensor) -> tuple[KVLayer, Tensor]:
    """The blocks of a batch as a bf16 layer of their own, and the tables [B, width] that address it; written up to each
    length."""
    batch, width = block_tables.shape
    shape = (batch * width, layer.kv_heads, layer.block_size, layer.head_dim)
    key, value = (torch.empty(shape, dtype=torch.bfloat16, device=layer.device) for _ in range(2))
    expand_kernel[(width, layer.kv_heads, 2 * batch)](
        layer.key, layer.value, layer.key_scale, layer.value_scale, block_tables, lengths, key, value,
        block_tables.stride(0), *layer.key.stride()[:3], *layer.value.stride()[:3], *scale_strides(layer),
        layer.head_dim, reading(layer.format.key.name), reading(layer.format.value.name), layer.block_size, INTERP,
        num_warps=2,
    )
    dense = KVLayer(KV_FORMATS["bf16"], layer.head_dim, key.transpose(1, 2), value.transpose(1, 2), None, None)
    return dense, torch.arange(batch * width, dtype=torch.int32, device=layer.device).view(batch, width)
