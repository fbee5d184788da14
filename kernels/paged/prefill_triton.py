"""Causal attention of ragged prompt chunks over the paged, maybe quantized cache (FlashAttention-2, Dao 2023).

A program owns BQ queries of one sequence and one head. Program t belongs to the last sequence b with query_starts[b] //
BQ + b <= t, so the grid is sized by the batch's rows and no host value of a length is needed. Tiles are read and
accumulated as in `decode_triton`; tiles that end before the first query of the program run without masks.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERP, next_power_of_2
from ..tuning import PrefillConfig, prefill_config
from .codec_triton import bits_of, reading
from .decode_triton import LOG2_E, accumulate, load_query, load_side, scores, store_planes, tile_blocks
from .expansion import worth_expanding
from .kv_cache import KVLayer
from .kv_cache_triton import expand_blocks, scale_strides


@triton.jit(do_not_specialize=["table_row", "T", "B"])
def prefill_kernel(
    q, key, value, key_scale, value_scale, tables, query_starts, lengths, out, scale, q_row, q_head, table_row,
    key_block, key_token, key_head, value_block, value_token, value_head, scale_block, scale_token, scale_head, T, B,
    H, GROUP: tl.constexpr, D: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    BQ: tl.constexpr, TILE: tl.constexpr, B_PADDED: tl.constexpr, STAGES: tl.constexpr, INTERP: tl.constexpr,
):
    VW: tl.constexpr = D * bits_of(VALUE) // 16
    t, head = tl.program_id(1), tl.program_id(0)
    kv_head = head // GROUP
    every = tl.arange(0, B_PADDED)
    starts = tl.load(query_starts + every, mask=every < B, other=0)
    b = tl.sum(((starts // BQ + every <= t) & (every < B)).to(tl.int32), 0) - 1
    query_start = tl.load(query_starts + b)
    queries = tl.load(query_starts + b + 1) - query_start
    first = (t - (query_start // BQ + b)) * BQ
    if b == B - 1:  # tiles that run past the last sequence cover the padding rows
        row, i = first + tl.arange(0, BQ), tl.arange(0, D)
        padding = (row >= queries) & (query_start + row < T)
        at = out + ((query_start + row).to(tl.int64) * H + head)[:, None] * D + i[None, :]
        tl.store(at, tl.zeros((BQ, D), tl.bfloat16), mask=padding[:, None])
    if first < queries:
        length = tl.load(lengths + b)
        tables += b.to(tl.int64) * table_row
        row = first + tl.arange(0, BQ)
        real = row < queries
        position = length - queries + row
        q0, q1, q2, q3, q_sum = load_query(
            q, (query_start + row).to(tl.int64) * q_row + head * q_head, real, scale, KEY, D, BQ
        )
        n = tl.arange(0, TILE)
        score_zeros = tl.zeros((BQ, TILE), tl.float32)
        a0 = tl.zeros((BQ, VW), tl.float32)
        a1, a2, a3 = a0, a0, a0
        top = tl.full((BQ,), float("-inf"), tl.float32)
        total = tl.zeros((BQ,), tl.float32)
        shift, largest = total, 1e-30
        full = (length - queries + first + 1) // TILE * TILE  # every query sees all of these
        last = tl.minimum(length, length - queries + first + BQ)
        for start in tl.range(0, full, TILE, num_stages=STAGES):
            block, token = tile_blocks(tables, start, n, n, BLOCK, TILE, False)
            k, ks, kl = load_side(
                key, key_scale, block, token, kv_head, n, key_block, key_token, key_head, scale_block, scale_token,
                scale_head, KEY, D, TILE, False,
            )
            v, vs, vl = load_side(
                value, value_scale, block, token, kv_head, n, value_block, value_token, value_head, scale_block,
                scale_token, scale_head, VALUE, D, TILE, False,
            )
            s = scores(q0, q1, q2, q3, q_sum, k, ks, kl, scale, score_zeros, KEY, INTERP)
            top, total, largest, shift, a0, a1, a2, a3 = accumulate(
                s, v, vs, vl, top, total, largest, shift, a0, a1, a2, a3, VALUE, INTERP
            )
        for start in tl.range(full, last, TILE, num_stages=1):
            inside = start + n < last
            block, token = tile_blocks(tables, start, n, inside, BLOCK, TILE, True)
            k, ks, kl = load_side(
                key, key_scale, block, token, kv_head, inside, key_block, key_token, key_head, scale_block, scale_token,
                scale_head, KEY, D, TILE, True,
            )
            v, vs, vl = load_side(
                value, value_scale, block, token, kv_head, inside, value_block, value_token, value_head, scale_block,
                scale_token, scale_head, VALUE, D, TILE, True,
            )
            s = scores(q0, q1, q2, q3, q_sum, k, ks, kl, scale, score_zeros, KEY, INTERP)
            s = tl.where(
                (start + n)[None, :] <= position[:, None], s, -1e30
            )  # finite: a row may see nothing of its last tile
            top, total, largest, shift, a0, a1, a2, a3 = accumulate(
                s, v, vs, vl, top, total, largest, shift, a0, a1, a2, a3, VALUE, INTERP
            )
        norm = 1 / total
        factor = norm
        if VALUE != "bf16":
            factor *= largest
        store_planes(
            out + ((query_start + row).to(tl.int64) * H + head) * D, a0, a1, a2, a3, factor, shift * norm, real, VW,
            VALUE, INTERP,
        )


LEAST_PADDED = 64  # sequences looked through at once: fewer cost the same, and each size is a variant to compile


def prefill_triton(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    config: PrefillConfig | None = None, out: Tensor | None = None,
) -> Tensor:
    """q [T, H, D] bf16; see `attention.prefill_attention`."""
    if q.dtype != torch.bfloat16 or q.stride(2) != 1:
        raise ValueError(
            f"prefill_attention: impl 'triton' takes bfloat16 q with a contiguous last dimension, "
            f"not {q.dtype} of strides {q.stride()}"
        )
    t, heads, d = q.shape
    batch = lengths.shape[0]
    if config is None and worth_expanding(t, batch, block_tables.shape[1], layer):
        layer, block_tables = expand_blocks(layer, block_tables, lengths)
    config = config or prefill_config(layer.format.name, d)
    out = torch.empty(t, heads, d, dtype=q.dtype, device=q.device) if out is None else out
    grid = (heads, triton.cdiv(t, config.block_q) + batch)
    prefill_kernel[grid](
        q, layer.key, layer.value, layer.key_scale, layer.value_scale, block_tables, query_starts, lengths, out,
        scale * LOG2_E, q.stride(0), q.stride(1), block_tables.stride(0), *layer.key.stride()[:3],
        *layer.value.stride()[:3], *scale_strides(layer), t, batch, heads, heads // layer.kv_heads, d,
        reading(layer.format.key.name), reading(layer.format.value.name), layer.block_size, config.block_q, config.tile,
        max(LEAST_PADDED, next_power_of_2(batch)), config.stages, INTERP, num_warps=config.warps,
        num_stages=config.stages,
    )
    return out
