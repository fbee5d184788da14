"""`highest` and `feed_tokens` in Triton.

A row of logits reduced at once would occupy one multiprocessor (by torch.max 27 us for 92,544 logits on an H200), so
programs take parts of it, and a second kernel the parts' best. What they compare is one whole number per logit, the
logit above and its index below, so that a maximum of these numbers is the answer: the lowest index of equals, and NaN
above everything.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERP, await_previous, early_launch, next_power_of_2, to_bf16


@triton.jit
def ranked(x, i):
    """int64 of float32 x at indices i >= 0: larger for larger x, for NaN largest of all, and of equals for lower i."""
    x = tl.where(x == 0, 0.0, x)  # -0 and 0 are equal
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # negative ones order the other way round
    bits = tl.where(x == x, bits, 0x7FC00000)  # a NaN, whatever its sign
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - i).to(tl.int64)


@triton.jit
def ranked_value(rank):
    """The float32 that `ranked` was given, NaN for NaN and 0 for -0."""
    bits = (rank >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def ranked_index(rank):
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF)


@triton.jit
def best_of_part_kernel(logits, best, stride, V, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """The best of BLOCK logits of a row to best [S, parts]."""
    await_previous(EARLY)
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + i, mask=i < V, other=0.0).to(tl.float32)
    rank = tl.where(i < V, ranked(x, i), -0x8000000000000000)
    tl.store(best + row * tl.num_programs(1) + part, tl.max(rank, 0))


@triton.jit
def best_of_row_kernel(
    best, values, indices, PARTS, BLOCK: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr
):
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    rank = tl.max(tl.load(best + row * PARTS + i, mask=i < PARTS, other=-0x8000000000000000), 0)
    value = ranked_value(rank)
    if values.dtype.element_ty == tl.bfloat16:
        tl.store(values + row, to_bf16(value, INTERP))
    else:
        tl.store(values + row, value)
    tl.store(indices + row, ranked_index(rank))


@triton.jit
def feed_tokens_kernel(sampled, given, feed, out, R, T, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    await_previous(EARLY)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(feed + i, mask=i < T, other=0)
    before = tl.load(sampled + at, mask=(i < T) & (at < R))
    tl.store(out + i, tl.where(at < R, before, tl.load(given + at - R, mask=(i < T) & (at >= R))), mask=i < T)


def highest(logits: Tensor, out: tuple[Tensor, Tensor]) -> None:
    """logits [S, vocab] bf16 or float32, rows of any stride."""
    if logits.dtype not in (torch.bfloat16, torch.float32) or logits.stride(1) != 1:
        raise ValueError(
            "highest: impl 'triton' takes bfloat16 or float32 with a contiguous last dimension, "
            f"not {logits.dtype} of strides {logits.stride()}"
        )
    rows, vocab = logits.shape
    values, indices = out
    if not values.is_contiguous() or not indices.is_contiguous():
        raise ValueError(f"highest: out must be contiguous, not of strides {values.stride()} and {indices.stride()}")
    if not rows:
        return
    block, early = 1024 if rows <= 16 else 4096, early_launch()
    parts = triton.cdiv(vocab, block)
    best = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    best_of_part_kernel[(rows, parts)](
        logits, best, logits.stride(0), vocab, block, early, num_warps=block // 512, launch_pdl=early
    )
    best_of_row_kernel[(rows,)](
        best, values, indices, parts, next_power_of_2(parts), early, INTERP, num_warps=1, launch_pdl=early
    )


def feed_tokens(sampled: Tensor, given: Tensor, feed: Tensor) -> Tensor:
    """int64, all of them."""
    for name, x in (("sampled", sampled), ("given", given), ("feed", feed)):
        if x.dtype != torch.int64 or not x.is_contiguous():
            raise ValueError(f"feed_tokens: {name} must be contiguous int64, not {x.dtype} of strides {x.stride()}")
    out, early, block = torch.empty_like(feed), early_launch(), 256
    if len(feed):
        feed_tokens_kernel[(triton.cdiv(len(feed), block),)](
            sampled, given, feed, out, len(sampled), len(feed), block, early, num_warps=1, launch_pdl=early
        )
    return out
