"""Storing new keys and values in the paged cache, quantized on the way: one program per token and head.

The vector is read as [planes, words], so each plane's codes meet in the same word by a shift and a sum.
"""
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv_cache import KVLayer
from .triton_common import INTERP, to_bf16


@triton.jit
def _store(x, words, scales, block, offset, head, word_block, word_token, word_head, scale_block, scale_token, scale_head,
           D: tl.constexpr, BITS: tl.constexpr, INTERP: tl.constexpr):
    PLANES: tl.constexpr = 16 // BITS
    W: tl.constexpr = D // PLANES
    to = words + block * word_block + offset * word_token + head * word_head
    if BITS == 16:
        i = tl.arange(0, D)
        value = tl.load(x + i)
        tl.store(to + i, value if value.dtype == tl.bfloat16 else to_bf16(value.to(tl.float32), INTERP))
    else:
        LEVELS: tl.constexpr = (1 << BITS) - 1
        plane, i = tl.arange(0, PLANES)[:, None], tl.arange(0, W)[None, :]
        value = tl.load(x + plane * W + i).to(tl.float32)
        low_bits = tl.min(value).to(tl.int32, bitcast=True)
        low_bits = (low_bits + 0x7FFF + ((low_bits >> 16) & 1)) & -0x10000  # bf16, to nearest even
        low = low_bits.to(tl.float32, bitcast=True)
        span = tl.maximum(tl.max(value) - low, 0.0)
        scale_bits = (tl.div_rn(span, LEVELS + 0.0).to(tl.int32, bitcast=True) + 0xFFFF) & -0x10000  # bf16, upwards
        scale = scale_bits.to(tl.float32, bitcast=True)
        scale = tl.where(scale > 0, scale, 1.0)
        code = tl.floor(tl.div_rn(value - low, tl.zeros((PLANES, W), tl.float32) + scale) + 0.5)
        code = tl.minimum(tl.maximum(code, 0.0), LEVELS + 0.0).to(tl.int32)
        tl.store(to + tl.arange(0, W), tl.sum(code << (plane * BITS), 0).to(tl.int16))
        word = scale.to(tl.int32, bitcast=True) | ((low_bits >> 16) & 0xFFFF)
        tl.store(scales + block * scale_block + offset * scale_token + head * scale_head, word)


@triton.jit
def write_kv_kernel(k, v, slots, key, value, key_scale, value_scale, k_row, k_head, v_row, v_head, key_block, key_token, key_head,
                    value_block, value_token, value_head, scale_block, scale_token, scale_head, BLOCK: tl.constexpr, D: tl.constexpr,
                    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, INTERP: tl.constexpr):
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + row)
    if slot >= 0:
        block, offset = slot // BLOCK, slot % BLOCK
        if tl.program_id(2) == 0:
            _store(k + row * k_row + head * k_head, key, key_scale, block, offset, head, key_block, key_token, key_head,
                   scale_block, scale_token, scale_head, D, KEY_BITS, INTERP)
        else:
            _store(v + row * v_row + head * v_head, value, value_scale, block, offset, head, value_block, value_token, value_head,
                   scale_block, scale_token, scale_head, D, VALUE_BITS, INTERP)


def scale_strides(layer: KVLayer) -> tuple[int, int, int]:
    """Strides (block, token, head) of the scale words, which keys and values share; zeros where there are none."""
    scales = layer.key_scale if layer.key_scale is not None else layer.value_scale
    return (0, 0, 0) if scales is None else (scales.stride(0), scales.stride(1), scales.stride(2))


def write_kv_triton(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """k, v [T, Hkv, D], last dimension contiguous."""
    if k.stride(2) != 1 or v.stride(2) != 1 or slots.dtype != torch.int64:
        raise ValueError(f"write_kv: k and v need a contiguous last dimension, slots int64, not {k.stride()}, {v.stride()}, {slots.dtype}")
    key, value = layer.key, layer.value
    if len(slots):
        write_kv_kernel[(len(slots), layer.kv_heads, 2)](
            k, v, slots, key, value, layer.key_scale, layer.value_scale, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
            *key.stride()[:3], *value.stride()[:3], *scale_strides(layer), layer.block_size, layer.head_dim,
            layer.format.key.bits, layer.format.value.bits, INTERP, num_warps=1)
