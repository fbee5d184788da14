"""Causal attention of ragged prompt chunks over the paged, maybe quantized cache (FlashAttention-2, Dao 2023).

A program owns BQ queries of one sequence and one head. Program t belongs to the last sequence b with
query_starts[b] // BQ + b <= t, so the grid is sized by the batch's rows and no host value of a length is needed. Keys and values are
read as in `decode_triton`.
"""
# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode_triton import key_scores, load_plane, values_into
from .kv_cache import KVLayer
from .kv_cache_triton import scale_strides
from .triton_common import INTERP, next_power_of_2, to_bf16
from .tuning import PrefillConfig, prefill_config


@triton.jit(do_not_specialize=["table_row", "B"])
def prefill_kernel(q, key, value, key_scale, value_scale, tables, query_starts, lengths, out, scale, q_row, q_head, table_row,
                   key_block, key_token, key_head, value_block, value_token, value_head, scale_block, scale_token, scale_head,
                   B, H, GROUP: tl.constexpr, D: tl.constexpr, KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, BLOCK: tl.constexpr,
                   BQ: tl.constexpr, TILE: tl.constexpr, B_PADDED: tl.constexpr, STAGES: tl.constexpr, INTERP: tl.constexpr):
    KW: tl.constexpr = D * KEY_BITS // 16
    VW: tl.constexpr = D * VALUE_BITS // 16
    t, head = tl.program_id(1), tl.program_id(0)
    kv_head = head // GROUP
    every = tl.arange(0, B_PADDED)
    starts = tl.load(query_starts + every, mask=every < B, other=0)
    b = tl.sum(((starts // BQ + every <= t) & (every < B)).to(tl.int32), 0) - 1
    query_start = tl.load(query_starts + b)
    queries = tl.load(query_starts + b + 1) - query_start
    first = (t - (query_start // BQ + b)) * BQ
    if first < queries:
        length = tl.load(lengths + b)
        row = first + tl.arange(0, BQ)
        real = row < queries
        position = length - queries + row
        q_at = (query_start + row).to(tl.int64) * q_row + head * q_head
        q0 = load_plane(q, q_at, real, 0, KEY_BITS, D)
        q1, q2, q3 = q0, q0, q0
        q_sum = tl.zeros((BQ,), tl.float32)
        if KEY_BITS != 16:
            q1 = load_plane(q, q_at, real, 1, KEY_BITS, D)
            q_sum = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
        if KEY_BITS == 4:
            q2 = load_plane(q, q_at, real, 2, KEY_BITS, D)
            q3 = load_plane(q, q_at, real, 3, KEY_BITS, D)
            q_sum += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
        n, i, j = tl.arange(0, TILE), tl.arange(0, KW), tl.arange(0, VW)
        score_zeros = tl.zeros((BQ, TILE), tl.float32)
        value_zeros = tl.zeros((BQ, VW), tl.float32)
        acc0, acc1, acc2, acc3 = value_zeros, value_zeros, value_zeros, value_zeros
        shift = tl.zeros((BQ,), tl.float32)
        top = tl.full((BQ,), float("-inf"), tl.float32)
        denominator = tl.zeros((BQ,), tl.float32)
        last = tl.minimum(length, length - queries + first + BQ)
        for start in tl.range(0, last, TILE, num_stages=STAGES):
            inside = start + n < last
            blocks = tl.load(tables + b * table_row + (start + n) // BLOCK, mask=inside, other=0).to(tl.int64)
            token = (start + n) % BLOCK
            k = tl.load((key + blocks * key_block + kv_head * key_head + token * key_token)[:, None] + i[None, :],
                        mask=inside[:, None], other=0)
            v = tl.load((value + blocks * value_block + kv_head * value_head + token * value_token)[:, None] + j[None, :],
                        mask=inside[:, None], other=0)
            scale_at = blocks * scale_block + kv_head * scale_head + token * scale_token
            s = key_scores(q0, q1, q2, q3, k, KEY_BITS, score_zeros, INTERP)
            if KEY_BITS != 16:
                word = tl.load(key_scale + scale_at, mask=inside, other=0)
                ks = (word & -0x10000).to(tl.float32, bitcast=True)
                kl = (word << 16).to(tl.float32, bitcast=True)
                s = s * ks[None, :] + q_sum[:, None] * (kl - 1024.0 * ks)[None, :]
            s = tl.where(start + n[None, :] <= position[:, None], s * scale, float("-inf"))
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
        norm = 1 / denominator
        to = out + ((query_start + row).to(tl.int64)[:, None] * H + head) * D + j[None, :]
        tl.store(to, to_bf16((acc0 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
        if VALUE_BITS != 16:
            tl.store(to + VW, to_bf16((acc1 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
        if VALUE_BITS == 4:
            tl.store(to + 2 * VW, to_bf16((acc2 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])
            tl.store(to + 3 * VW, to_bf16((acc3 + shift[:, None]) * norm[:, None], INTERP), mask=real[:, None])


def prefill_triton(q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
                   config: PrefillConfig | None = None) -> Tensor:
    """q [T, H, D] bf16; see `attention.prefill_attention`."""
    if q.dtype != torch.bfloat16 or q.stride(2) != 1:
        raise ValueError(f"prefill_attention: impl 'triton' takes bfloat16 q with a contiguous last dimension, not {q.dtype} {q.stride()}")
    t, heads, d = q.shape
    batch = lengths.shape[0]
    config = config or prefill_config(layer.format.name, d)
    out = torch.zeros(t, heads, d, dtype=q.dtype, device=q.device)  # padding rows give zeros
    grid = (heads, triton.cdiv(t, config.block_q) + batch)
    prefill_kernel[grid](
        q, layer.key, layer.value, layer.key_scale, layer.value_scale, block_tables, query_starts, lengths, out, scale * 1.4426950408889634,
        q.stride(0), q.stride(1), block_tables.stride(0), *layer.key.stride()[:3], *layer.value.stride()[:3], *scale_strides(layer),
        batch, heads, heads // layer.kv_heads, d, layer.format.key.bits, layer.format.value.bits, layer.block_size, config.block_q, config.tile,
        next_power_of_2(batch), config.stages, INTERP, num_warps=config.warps, num_stages=config.stages)
    return out
