"""Paged decode attention in Triton: split over the context (flash decoding, Dao et al. 2023), query heads of one KV head packed.

Quantized keys and values are read as planes (see `kv_cache`), and only the step from code to fp16 1024 + code touches a tile; every
scale is factored out of it, with k = ks * code + kl and v = vs * code + vl per token:

    S[h, n] = ks[n] * ( q[h] . (1024 + code) )  +  qsum[h] * (kl[n] - 1024 * ks[n])
    O[h]    = sum_n p[n] * vs[n] * (1024 + code)  +  sum_n p[n] * (vl[n] - 1024 * vs[n])

Each plane has its own slice of q and its own accumulator, so nothing is interleaved. p * vs is normalised by the tile's largest vs
before it is rounded to fp16, and the correction uses the rounded numbers, so that the large 1024 cancels exactly.

    grid [B, kv heads, splits]   q [16, D/planes] x planes   tile [TILE tokens, D/planes]   partial [B, H, splits, D] float32
"""
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kv_cache import KVLayer
from .kv_cache_triton import scale_strides
from .triton_common import INTERP, codes_fp16, dot, next_power_of_2, to_bf16
from .tuning import DecodeConfig, decode_config

ROWS = 16  # query rows of one program: a tensor-core tile


@triton.jit
def key_scores(q0, q1, q2, q3, words, BITS: tl.constexpr, zeros, INTERP: tl.constexpr):
    """q . k for a tile of key words [TILE, W] -> [rows, TILE]; for codes, q . (1024 + code)."""
    if BITS == 16:
        s = dot(q0, tl.trans(words), zeros, INTERP)
    else:
        s = dot(q0, tl.trans(codes_fp16(words, 0, BITS, INTERP)), zeros, INTERP)
        s = dot(q1, tl.trans(codes_fp16(words, 1, BITS, INTERP)), s, INTERP)
    if BITS == 4:
        s = dot(q2, tl.trans(codes_fp16(words, 2, BITS, INTERP)), s, INTERP)
        s = dot(q3, tl.trans(codes_fp16(words, 3, BITS, INTERP)), s, INTERP)
    return s


@triton.jit
def load_plane(q, rows, inside, PLANE: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr):
    """The slice of q [rows, D] that meets one plane of the keys, in the dtype of the dot."""
    W: tl.constexpr = D * BITS // 16
    x = tl.load(q + rows[:, None] + PLANE * W + tl.arange(0, W)[None, :], mask=inside[:, None], other=0.0)
    return x if BITS == 16 else x.to(tl.float32).to(tl.float16)


@triton.jit
def values_into(acc, p, words, PLANE: tl.constexpr, BITS: tl.constexpr, alpha, vmax, zeros, INTERP: tl.constexpr):
    """acc * alpha + p @ values of one plane."""
    if BITS == 16:
        acc = dot(p, words, acc * alpha[:, None], INTERP)
    else:
        acc = acc * alpha[:, None] + dot(p, codes_fp16(words, PLANE, BITS, INTERP), zeros, INTERP) * vmax
    return acc


@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(q, key, value, key_scale, value_scale, tables, lengths, out, partial, partial_ml, scale, q_row, q_head, table_row,
                  key_block, key_token, key_head, value_block, value_token, value_head, scale_block, scale_token, scale_head,
                  H, GROUP: tl.constexpr, D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, BLOCK: tl.constexpr,
                  TILE: tl.constexpr, SPLIT: tl.constexpr, MIN_SPLIT: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
                  INTERP: tl.constexpr):
    KW: tl.constexpr = D * KEY_BITS // 16
    VW: tl.constexpr = D * VALUE_BITS // 16
    HEAD_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    split, kv_head, b = tl.program_id(0), tl.program_id(1) // HEAD_TILES, tl.program_id(2)
    splits = tl.num_programs(0)
    length = tl.load(lengths + b)
    per_split = tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(length, splits), TILE) * TILE)
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    if first < last or (not SPLIT):
        g = (tl.program_id(1) % HEAD_TILES) * ROWS + tl.arange(0, ROWS)
        head = kv_head * GROUP + g
        real = g < GROUP
        q_at = b.to(tl.int64) * q_row + head * q_head
        q0 = load_plane(q, q_at, real, 0, KEY_BITS, D)
        q1, q2, q3 = q0, q0, q0
        if KEY_BITS != 16:
            q1 = load_plane(q, q_at, real, 1, KEY_BITS, D)
        if KEY_BITS == 4:
            q2 = load_plane(q, q_at, real, 2, KEY_BITS, D)
            q3 = load_plane(q, q_at, real, 3, KEY_BITS, D)
        q_sum = tl.zeros((ROWS,), tl.float32)
        if KEY_BITS != 16:
            q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
        if KEY_BITS == 4:
            q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
        n, i, j = tl.arange(0, TILE), tl.arange(0, KW), tl.arange(0, VW)
        score_zeros = tl.zeros((ROWS, TILE), tl.float32)
        value_zeros = tl.zeros((ROWS, VW), tl.float32)
        acc0, acc1, acc2, acc3 = value_zeros, value_zeros, value_zeros, value_zeros
        shift = tl.zeros((ROWS,), tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        denominator = tl.zeros((ROWS,), tl.float32)
        for start in tl.range(first, last, TILE, num_stages=STAGES):
            inside = start + n < last
            if BLOCK >= TILE:  # the tile lies in one block
                block = tl.load(tables + b * table_row + start // BLOCK).to(tl.int64)
                token = start % BLOCK + n
                key_at = key + block * key_block + kv_head * key_head + token * key_token
                value_at = value + block * value_block + kv_head * value_head + token * value_token
                scale_at = block * scale_block + kv_head * scale_head + token * scale_token
            else:
                blocks = tl.load(tables + b * table_row + (start + n) // BLOCK, mask=inside, other=0).to(tl.int64)
                token = n % BLOCK
                key_at = key + blocks * key_block + kv_head * key_head + token * key_token
                value_at = value + blocks * value_block + kv_head * value_head + token * value_token
                scale_at = blocks * scale_block + kv_head * scale_head + token * scale_token
            k = tl.load(key_at[:, None] + i[None, :], mask=inside[:, None], other=0)
            v = tl.load(value_at[:, None] + j[None, :], mask=inside[:, None], other=0)
            s = key_scores(q0, q1, q2, q3, k, KEY_BITS, score_zeros, INTERP)
            if KEY_BITS != 16:
                word = tl.load(key_scale + scale_at, mask=inside, other=0)
                ks = (word & -0x10000).to(tl.float32, bitcast=True)
                kl = (word << 16).to(tl.float32, bitcast=True)
                s = s * ks[None, :] + q_sum[:, None] * (kl - 1024.0 * ks)[None, :]
            s = tl.where(inside[None, :], s * scale, float("-inf"))
            new_top = tl.maximum(top, tl.max(s, 1))
            alpha = tl.exp2(top - new_top)
            p = tl.exp2(s - new_top[:, None])
            top = new_top
            denominator = denominator * alpha + tl.sum(p, 1)
            if VALUE_BITS == 16:
                acc0 = values_into(acc0, to_bf16(p, INTERP), v, 0, VALUE_BITS, alpha, 1.0, value_zeros, INTERP)
            else:
                word = tl.load(value_scale + scale_at, mask=inside, other=0)
                vs = (word & -0x10000).to(tl.float32, bitcast=True)
                vl = (word << 16).to(tl.float32, bitcast=True)
                vmax = tl.max(vs, 0)
                weighted = (p * (vs / vmax)[None, :]).to(tl.float16)
                shift = shift * alpha + tl.sum(p * vl[None, :] - weighted.to(tl.float32) * (1024.0 * vmax), 1)
                acc0 = values_into(acc0, weighted, v, 0, VALUE_BITS, alpha, vmax, value_zeros, INTERP)
                acc1 = values_into(acc1, weighted, v, 1, VALUE_BITS, alpha, vmax, value_zeros, INTERP)
                if VALUE_BITS == 4:
                    acc2 = values_into(acc2, weighted, v, 2, VALUE_BITS, alpha, vmax, value_zeros, INTERP)
                    acc3 = values_into(acc3, weighted, v, 3, VALUE_BITS, alpha, vmax, value_zeros, INTERP)
        row = b.to(tl.int64) * H + head
        if not SPLIT:
            norm = tl.where(denominator > 0, 1 / denominator, 0.0)  # length 0: zeros
            to = out + row[:, None] * D + j[None, :]
            tl.store(to, to_bf16((acc0 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
            if VALUE_BITS != 16:
                tl.store(to + VW, to_bf16((acc1 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
            if VALUE_BITS == 4:
                tl.store(to + 2 * VW, to_bf16((acc2 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
                tl.store(to + 3 * VW, to_bf16((acc3 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
        else:
            to = partial + (row[:, None] * splits + split) * D + j[None, :]
            tl.store(to, acc0 + shift[:, None], mask=real[:, None])
            if VALUE_BITS != 16:
                tl.store(to + VW, acc1 + shift[:, None], mask=real[:, None])
            if VALUE_BITS == 4:
                tl.store(to + 2 * VW, acc2 + shift[:, None], mask=real[:, None])
                tl.store(to + 3 * VW, acc3 + shift[:, None], mask=real[:, None])
            tl.store(partial_ml + (row * splits + split) * 2, top, mask=real)
            tl.store(partial_ml + (row * splits + split) * 2 + 1, denominator, mask=real)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(partial, partial_ml, lengths, out, H, splits, D: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
                   MIN_SPLIT: tl.constexpr, INTERP: tl.constexpr):
    """Merge the splits of one query head; splits past the length were never written and are not read."""
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // H)
    per_split = tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(length, splits), TILE) * TILE)
    s, i = tl.arange(0, PADDED), tl.arange(0, D)
    live = s * per_split < length
    live = live & (s < splits)
    top = tl.load(partial_ml + (row * splits + s) * 2, mask=live, other=float("-inf"))
    denominator = tl.load(partial_ml + (row * splits + s) * 2 + 1, mask=live, other=0.0)
    acc = tl.load(partial + (row * splits + s)[:, None] * D + i[None, :], mask=live[:, None], other=0.0)
    highest = tl.where(length > 0, tl.max(top, 0), 0.0)
    weight = tl.where(live, tl.exp2(top - highest), 0.0)
    total = tl.sum(weight * denominator, 0)
    y = tl.sum(acc * weight[:, None], 0) / tl.where(length > 0, total, 1.0)
    tl.store(out + row * D + i, to_bf16(y, INTERP))


def decode_triton(q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float,
                  config: DecodeConfig | None = None) -> Tensor:
    """q [B, H, D] bf16; lengths are read on the device only, so the launch is the same for every step (CUDA graphs)."""
    if q.dtype != torch.bfloat16 or q.stride(2) != 1:
        raise ValueError(f"decode_attention: impl 'triton' takes bfloat16 q with a contiguous last dimension, not {q.dtype} {q.stride()}")
    batch, heads, d = q.shape
    group = heads // layer.kv_heads
    config = config or decode_config(layer.format.name, batch, layer.kv_heads, block_tables.shape[1] * layer.block_size)
    out = torch.empty(batch, heads, d, dtype=q.dtype, device=q.device)
    splits = config.splits
    partial = torch.empty(batch, heads, splits, d, dtype=torch.float32, device=q.device) if splits > 1 else out
    partial_ml = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device) if splits > 1 else out
    grid = (splits, layer.kv_heads * triton.cdiv(group, ROWS), batch)
    decode_kernel[grid](
        q, layer.key, layer.value, layer.key_scale, layer.value_scale, block_tables, lengths, out, partial, partial_ml, scale * 1.4426950408889634,
        q.stride(0), q.stride(1), block_tables.stride(0), *layer.key.stride()[:3], *layer.value.stride()[:3], *scale_strides(layer), heads,
        group, d, layer.format.key.bits, layer.format.value.bits, layer.block_size, config.tile, splits > 1, config.min_split, ROWS, config.stages,
        INTERP, num_warps=config.warps, num_stages=config.stages)
    if splits > 1:
        combine_kernel[(batch * heads,)](partial, partial_ml, lengths, out, heads, splits, d, config.tile, next_power_of_2(splits),
                                         config.min_split, INTERP, num_warps=4)
    return out
