"""`rope_write` in Triton: one pass from the qkv product, or its split-K partials, to queries and KV cache."""

# ruff: noqa: N803
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rows.elementwise_triton import split_sum
from ..triton_common import INTERP, await_previous, early_launch, to_bf16
from .codec_triton import bits_of
from .kv_cache import KVLayer
from .kv_cache_triton import encode_rows, scale_strides


@triton.jit
def load_heads(qkv, at, size, SPLITS: tl.constexpr):
    """float32 heads at offsets `at`, summed over SPLITS partials that lie `size` elements apart."""
    x = tl.load(qkv + at).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        x += tl.load(qkv + split * size + at)
    return x


@triton.jit
def turned_heads(
    qkv, at, size, cos, sin, weight, eps, SPLITS: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr,
):
    """Heads [BH, D] whose rows begin at `at` [BH], normed and turned by cos and sin [D]: element i with i + D/2."""
    i = tl.arange(0, D)
    other = (i + D // 2) % D
    x = load_heads(qkv, at[:, None] + i[None, :], size, SPLITS)
    y = load_heads(qkv, at[:, None] + other[None, :], size, SPLITS)
    if NORM:
        inverse = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x *= inverse * tl.load(weight + i).to(tl.float32)[None, :]
        y *= inverse * tl.load(weight + other).to(tl.float32)[None, :]
    return x * cos[None, :] + y * sin[None, :]


@triton.jit
def store_heads(
    x, words, scales, slot, head, word_block, word_token, word_head, scale_block, scale_token, scale_head,
    BLOCK: tl.constexpr, BH: tl.constexpr, D: tl.constexpr, CODE: tl.constexpr, INTERP: tl.constexpr,
):
    """Keys or values [BH, D] of one token to its slot, encoded."""
    block, offset = slot // BLOCK, slot % BLOCK
    word, scale_word = encode_rows(x, CODE, BH, D, INTERP)
    at = words + block * word_block + offset * word_token + head * word_head
    tl.store(at[:, None] + tl.arange(0, D * bits_of(CODE) // 16)[None, :], word)
    if CODE != "bf16":
        tl.store(scales + block * scale_block + offset * scale_token + head * scale_head, scale_word)


@triton.jit
def rope_write_kernel(
    qkv, q_out, turn, slots, q_norm, k_norm, key, value, key_scale, value_scale, size, H, HKV, eps, key_block,
    key_token, key_head, value_block, value_token, value_head, scale_block, scale_token, scale_head,
    SPLITS: tl.constexpr, D: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr, KEY: tl.constexpr,
    VALUE: tl.constexpr, NORM: tl.constexpr, SETTLED: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    """SETTLED: slots and turn are read while the kernel before ends. The weights of the layers have driven them out of
    the caches, and for keys and values one read stands behind the other."""
    if not SETTLED:
        await_previous(EARLY)
    row, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * BH
    head = first + tl.arange(0, BH)
    at = (row * (H + 2 * HKV) + head) * D
    turn += row * 2 * D
    slot, cos, sin = tl.load(slots + row), tl.load(turn + tl.arange(0, D)), tl.load(turn + D + tl.arange(0, D))
    if SETTLED:
        await_previous(EARLY)
    if first < H:
        x = turned_heads(qkv, at, size, cos, sin, q_norm, eps, SPLITS, D, NORM)
        tl.store(q_out + ((row * H + head) * D)[:, None] + tl.arange(0, D)[None, :], to_bf16(x, INTERP))
    elif slot >= 0:
        if first < H + HKV:
            x = turned_heads(qkv, at, size, cos, sin, k_norm, eps, SPLITS, D, NORM)
            store_heads(
                x, key, key_scale, slot, head - H, key_block, key_token, key_head, scale_block, scale_token,
                scale_head, BLOCK, BH, D, KEY, INTERP,
            )
        else:
            x = load_heads(qkv, at[:, None] + tl.arange(0, D)[None, :], size, SPLITS)
            store_heads(
                x, value, value_scale, slot, head - H - HKV, value_block, value_token, value_head, scale_block,
                scale_token, scale_head, BLOCK, BH, D, VALUE, INTERP,
            )


def heads_together(rows: int, heads: int, kv_heads: int) -> tuple[int, int]:
    """Heads of one program, all queries, keys or values, and its warps. Few rows: a program per head, for latency.
    Many: heads together, so that a token's turn is read less, at first with a warp each, since one warp takes long to
    encode several (64 rows of int8 on an H200: 2.4 us, by one warp for eight heads 4.7)."""
    if rows <= 16:
        return 1, 1
    together = math.gcd(4 if rows <= 256 else 8, heads, kv_heads)
    return together, together if rows <= 256 else 1


def rope_write_triton(
    qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: tuple[Tensor, Tensor, float] | None,
    settled: bool = False,
) -> Tensor:
    """qkv [T, (H + 2 Hkv) * D] bf16, or partials [S, T, ...] float32; turn float32. The arithmetic is float32 from the
    partials to the codes."""
    if turn.dtype != torch.float32 or slots.dtype != torch.int64 or not turn.is_contiguous():
        raise ValueError(
            f"rope_write: turn must be contiguous float32 and slots int64, not {turn.dtype} and {slots.dtype}"
        )
    qkv, splits, size = split_sum("rope_write", qkv, 2)
    rows, width = qkv.shape[-2:]
    d, hkv = layer.head_dim, layer.kv_heads
    heads = width // d - 2 * hkv
    q = torch.empty(rows, heads, d, dtype=torch.bfloat16, device=qkv.device)
    if not rows:
        return q
    together, warps = heads_together(rows, heads, hkv)
    q_norm, k_norm, eps = norms or (turn, turn, 0.0)
    key, value, early = layer.key, layer.value, early_launch()
    rope_write_kernel[(rows, width // d // together)](
        qkv, q, turn, slots, q_norm, k_norm, key, value, layer.key_scale, layer.value_scale, size, heads, hkv, eps,
        *key.stride()[:3], *value.stride()[:3], *scale_strides(layer), splits, d, together, layer.block_size,
        layer.format.key.name, layer.format.value.name, norms is not None, settled, early, INTERP,
        num_warps=warps, launch_pdl=early,
    )
    return q
