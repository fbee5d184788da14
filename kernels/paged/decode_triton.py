"""Paged decode attention in Triton: split over the context (flash decoding, Dao et al. 2023), query heads of one KV
head packed.

Quantized keys and values are read as planes (see `kv_cache`), and only the step from code to fp16 bias + code touches a
tile; every scale is factored out of it, with k = ks * code + kl and v = vs * code + vl per token (for fp8 the code is
the number, bias and low are zero, and the second terms are left out):

    S[h, n] = ks[n] * ( q[h] . (bias + code) )  +  qsum[h] * (kl[n] - bias * ks[n])
    O[h]    = sum_n p[n] * vs[n] * (bias + code)  +  sum_n p[n] * (vl[n] - bias * vs[n])

Each plane has its own slice of q and its own accumulator, so nothing is interleaved. p * vs is divided by the largest
vs so far before it is rounded to fp16. Full tiles run without masks; a masked tile at the end of the context follows.

    grid [splits, kv heads, B]   q [16, D/planes] for each plane   tile [TILE tokens, D/planes]
    partial [B, H, splits, D] float32, merged by `combine_kernel`
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERP, admission, admit_next, await_previous, dot, fetch, next_power_of_2, to_bf16
from ..tuning import DecodeConfig, decode_config
from .codec_triton import bits_of, has_low, operand_bias, operand_fp16, reading
from .kv_cache import KVLayer
from .kv_cache_triton import scale_strides

ROWS = 16  # query rows of one program: a tensor-core tile
LOG2_E = 1.4426950408889634  # softmax in powers of two


@triton.jit
def load_plane(q, rows, inside, scale, PLANE: tl.constexpr, CODE: tl.constexpr, D: tl.constexpr):
    """The slice of q [rows, D] that meets one plane of the keys: bf16 as it is, or fp16 with the scale applied."""
    W: tl.constexpr = D * bits_of(CODE) // 16
    x = tl.load(q + rows[:, None] + PLANE * W + tl.arange(0, W)[None, :], mask=inside[:, None], other=0.0)
    return x if CODE == "bf16" else (x.to(tl.float32) * scale).to(tl.float16)


@triton.jit
def load_query(q, rows, inside, scale, CODE: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr):
    """q as one, two or four planes (the rest repeats the first and is not used), and the sum of its elements as
    rounded."""
    q0 = load_plane(q, rows, inside, scale, 0, CODE, D)
    q1, q2, q3 = q0, q0, q0
    total = tl.zeros((ROWS,), tl.float32)
    if CODE != "bf16":
        q1 = load_plane(q, rows, inside, scale, 1, CODE, D)
        total = tl.sum(q0.to(tl.float32), 1) + tl.sum(q1.to(tl.float32), 1)
    if bits_of(CODE) == 4:
        q2 = load_plane(q, rows, inside, scale, 2, CODE, D)
        q3 = load_plane(q, rows, inside, scale, 3, CODE, D)
        total += tl.sum(q2.to(tl.float32), 1) + tl.sum(q3.to(tl.float32), 1)
    return q0, q1, q2, q3, total


@triton.jit
def load_side(
    words, scales, block, token, head, inside, block_stride, token_stride, head_stride, scale_block, scale_token,
    scale_head, CODE: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):
    """The words [TILE, W] of a tile's keys or values, and their scale and low [TILE] (zeros for bf16)."""
    i = tl.arange(0, D * bits_of(CODE) // 16)
    at = (words + block * block_stride + head * head_stride + token * token_stride)[:, None] + i[None, :]
    scale = tl.zeros((TILE,), tl.float32)
    low = scale
    if MASKED:
        x = tl.load(at, mask=inside[:, None], other=0)
    else:
        x = tl.load(at)
    if CODE != "bf16":
        scale_at = scales + block * scale_block + head * scale_head + token * scale_token
        word = tl.load(scale_at, mask=inside, other=0) if MASKED else tl.load(scale_at)
        scale = (word & -0x10000).to(tl.float32, bitcast=True)
        low = (word << 16).to(tl.float32, bitcast=True)
    return x, scale, low


@triton.jit
def tile_blocks(tables, start, n, inside, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Block and offset of the TILE tokens from `start` on: one block where the tile lies in it, else one a token."""
    if BLOCK >= TILE:
        block = tl.load(tables + start // BLOCK).to(tl.int64)
        token = start % BLOCK + n
    else:
        at = tables + (start + n) // BLOCK
        block = (tl.load(at, mask=inside, other=0) if MASKED else tl.load(at)).to(tl.int64)
        token = n % BLOCK
    return block, token


@triton.jit
def scores(q0, q1, q2, q3, q_sum, k, ks, kl, scale, zeros, CODE: tl.constexpr, INTERP: tl.constexpr):
    """scale * q . k of a key tile [TILE, W] -> [rows, TILE]; for codes, q holds the scale already."""
    if CODE == "bf16":
        s = dot(q0, tl.trans(k), zeros, INTERP) * scale
    else:
        s = dot(q0, tl.trans(operand_fp16(k, 0, CODE, False, INTERP)), zeros, INTERP)
        s = dot(q1, tl.trans(operand_fp16(k, 1, CODE, False, INTERP)), s, INTERP)
        if bits_of(CODE) == 4:
            s = dot(q2, tl.trans(operand_fp16(k, 2, CODE, False, INTERP)), s, INTERP)
            s = dot(q3, tl.trans(operand_fp16(k, 3, CODE, False, INTERP)), s, INTERP)
        s *= ks[None, :]
        if has_low(CODE):
            s += q_sum[:, None] * (kl - operand_bias(CODE, False) * ks)[None, :]
    return s


@triton.jit
def accumulate(s, v, vs, vl, top, total, largest, shift, a0, a1, a2, a3, CODE: tl.constexpr, INTERP: tl.constexpr):
    """One step of the online softmax: scores s [rows, TILE] and a value tile into the running state.

    State: top and total [rows], the maximum and the denominator; a0..a3, one accumulator per plane, in units of
    `largest`, the largest vs so far; shift, what a token adds to every element: the sum of p * (vl - bias * vs)."""
    new_top = tl.maximum(top, tl.max(s, 1))
    alpha = tl.exp2(top - new_top)
    p = tl.exp2(s - new_top[:, None])
    total = total * alpha + tl.sum(p, 1)
    if CODE == "bf16":
        a0 = dot(to_bf16(p, INTERP), v, a0 * alpha[:, None], INTERP)
    else:
        new_largest = tl.maximum(largest, tl.max(vs, 0))
        weighted = (p * (vs * (1.0 / new_largest))[None, :]).to(tl.float16)
        beta = alpha * (largest / new_largest)
        largest = new_largest
        if has_low(CODE):
            shift = shift * alpha + tl.sum(p * (vl - operand_bias(CODE, True) * vs)[None, :], 1)
        a0 = dot(weighted, operand_fp16(v, 0, CODE, True, INTERP), a0 * beta[:, None], INTERP)
        a1 = dot(weighted, operand_fp16(v, 1, CODE, True, INTERP), a1 * beta[:, None], INTERP)
        if bits_of(CODE) == 4:
            a2 = dot(weighted, operand_fp16(v, 2, CODE, True, INTERP), a2 * beta[:, None], INTERP)
            a3 = dot(weighted, operand_fp16(v, 3, CODE, True, INTERP), a3 * beta[:, None], INTERP)
    return new_top, total, largest, shift, a0, a1, a2, a3


@triton.jit
def store_planes(to, a0, a1, a2, a3, factor, shift, inside, W: tl.constexpr, CODE: tl.constexpr, INTERP: tl.constexpr):
    """a * factor + shift of each plane to its slice of the rows at `to`."""
    at = to[:, None] + tl.arange(0, W)[None, :]
    for plane in tl.static_range(16 // bits_of(CODE)):
        a = a0 if plane == 0 else a1 if plane == 1 else a2 if plane == 2 else a3
        y = a * factor[:, None] + shift[:, None]
        if to.dtype.element_ty == tl.bfloat16:
            y = to_bf16(y, INTERP)
        tl.store(at + plane * W, y, mask=inside[:, None])


@triton.jit(do_not_specialize=["table_row"])
def decode_kernel(
    q, key, value, key_scale, value_scale, tables, lengths, out, partial, partial_ml, scale, q_row, q_head, table_row,
    key_block, key_token, key_head, value_block, value_token, value_head, scale_block, scale_token, scale_head, H,
    GROUP: tl.constexpr, D: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, MIN_SPLIT: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    SETTLED: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    if not SETTLED:
        await_previous(EARLY)
    VW: tl.constexpr = D * bits_of(VALUE) // 16
    HEAD_TILES: tl.constexpr = (GROUP + ROWS - 1) // ROWS
    split, kv_head, b = tl.program_id(0), tl.program_id(1) // HEAD_TILES, tl.program_id(2)
    splits = tl.num_programs(0)
    length = tl.load(lengths + b)
    per_split = tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(length, splits), TILE) * TILE)
    first = split * per_split
    last = tl.minimum(first + per_split, length)
    tables += b.to(tl.int64) * table_row
    if SETTLED:
        fetch(tables + tl.maximum(tl.minimum(first, length - 1), 0) // BLOCK, INTERP)
        await_previous(EARLY)
    if first < last or (not SPLIT):
        g = (tl.program_id(1) % HEAD_TILES) * ROWS + tl.arange(0, ROWS)
        head = kv_head * GROUP + g
        real = g < GROUP
        q0, q1, q2, q3, q_sum = load_query(q, b.to(tl.int64) * q_row + head * q_head, real, scale, KEY, D, ROWS)
        n = tl.arange(0, TILE)
        score_zeros = tl.zeros((ROWS, TILE), tl.float32)
        a0 = tl.zeros((ROWS, VW), tl.float32)
        a1, a2, a3 = a0, a0, a0
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        shift, largest = total, 1e-30
        full = first + tl.maximum(last - first, 0) // TILE * TILE
        for start in tl.range(first, full, TILE, num_stages=STAGES):
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
        if full < last:
            inside = full + n < last
            block, token = tile_blocks(tables, full, n, inside, BLOCK, TILE, True)
            k, ks, kl = load_side(
                key, key_scale, block, token, kv_head, inside, key_block, key_token, key_head, scale_block, scale_token,
                scale_head, KEY, D, TILE, True,
            )
            v, vs, vl = load_side(
                value, value_scale, block, token, kv_head, inside, value_block, value_token, value_head, scale_block,
                scale_token, scale_head, VALUE, D, TILE, True,
            )
            s = scores(q0, q1, q2, q3, q_sum, k, ks, kl, scale, score_zeros, KEY, INTERP)
            s = tl.where(inside[None, :], s, float("-inf"))
            top, total, largest, shift, a0, a1, a2, a3 = accumulate(
                s, v, vs, vl, top, total, largest, shift, a0, a1, a2, a3, VALUE, INTERP
            )
        admit_next(EARLY)
        row = b.to(tl.int64) * H + head
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if VALUE != "bf16":
            factor *= largest
        if SPLIT:
            store_planes(
                partial + (row * splits + split) * D, a0, a1, a2, a3, factor, shift, real, VW, VALUE, INTERP
            )
            tl.store(partial_ml + (row * splits + split) * 2, top, mask=real)
            tl.store(partial_ml + (row * splits + split) * 2 + 1, total, mask=real)
        else:
            norm = tl.where(total > 0, 1 / tl.where(total > 0, total, 1.0), 0.0)  # length 0: zeros
            store_planes(out + row * D, a0, a1, a2, a3, factor * norm, shift * norm, real, VW, VALUE, INTERP)


@triton.jit(do_not_specialize=["splits"])
def combine_kernel(
    partial, partial_ml, lengths, out, H, splits, D: tl.constexpr, TILE: tl.constexpr, PADDED: tl.constexpr,
    MIN_SPLIT: tl.constexpr, SETTLED: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    """Merge the splits of one query head; splits past the length were never written and are not read."""
    if not SETTLED:
        await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + row // H)
    if SETTLED:
        await_previous(EARLY)
    per_split = tl.maximum(MIN_SPLIT, tl.cdiv(tl.cdiv(length, splits), TILE) * TILE)
    s, i = tl.arange(0, PADDED), tl.arange(0, D)
    live = (s * per_split < length) & (s < splits)
    top = tl.load(partial_ml + (row * splits + s) * 2, mask=live, other=float("-inf"))
    total = tl.load(partial_ml + (row * splits + s) * 2 + 1, mask=live, other=0.0)
    acc = tl.load(partial + (row * splits + s)[:, None] * D + i[None, :], mask=live[:, None], other=0.0)
    highest = tl.where(length > 0, tl.max(top, 0), 0.0)
    weight = tl.where(live, tl.exp2(top - highest), 0.0)
    denominator = tl.where(length > 0, tl.sum(weight * total, 0), 1.0)
    tl.store(out + row * D + i, to_bf16(tl.sum(acc * weight[:, None], 0) / denominator, INTERP))


def decode_triton(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float, config: DecodeConfig | None = None,
    settled: bool = False, out: Tensor | None = None,
) -> Tensor:
    """q [B, H, D] bf16; lengths are read on the device only, so the launch is the same for every step (CUDA graphs).
    settled: see `Settled`."""
    if q.dtype != torch.bfloat16 or q.stride(2) != 1:
        raise ValueError(
            f"decode_attention: impl 'triton' takes bfloat16 q with a contiguous last dimension, "
            f"not {q.dtype} of strides {q.stride()}"
        )
    batch, heads, d = q.shape
    group = heads // layer.kv_heads
    config = config or decode_config(layer.format.name, batch, layer.kv_heads, block_tables.shape[1] * layer.block_size)
    out = torch.empty(batch, heads, d, dtype=q.dtype, device=q.device) if out is None else out
    splits, early = config.splits, admission(late=True)
    partial = torch.empty(batch, heads, splits, d, dtype=torch.float32, device=q.device) if splits > 1 else out
    partial_ml = torch.empty(batch, heads, splits, 2, dtype=torch.float32, device=q.device) if splits > 1 else out
    grid = (splits, layer.kv_heads * triton.cdiv(group, ROWS), batch)
    decode_kernel[grid](
        q, layer.key, layer.value, layer.key_scale, layer.value_scale, block_tables, lengths, out, partial, partial_ml,
        scale * LOG2_E, q.stride(0), q.stride(1), block_tables.stride(0), *layer.key.stride()[:3],
        *layer.value.stride()[:3], *scale_strides(layer), heads, group, d, reading(layer.format.key.name),
        reading(layer.format.value.name), layer.block_size, config.tile, splits > 1, config.min_split, ROWS,
        config.stages, settled, early, INTERP, num_warps=config.warps, num_stages=config.stages, launch_pdl=early > 0,
    )
    if splits > 1:
        combine_kernel[(batch * heads,)](
            partial, partial_ml, lengths, out, heads, splits, d, config.tile, next_power_of_2(splits), config.min_split,
            settled, early, INTERP, num_warps=2 if splits <= 16 else 4, launch_pdl=early > 0,
        )
    return out
