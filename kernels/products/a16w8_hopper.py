"""A16W8 matmul of int8 in pairs (`packing.pack_pairs`) on Hopper, from one row to 2048: what `a16w4_hopper` does for
4-bit codes, by the same ring (`hopper_ring`).

A group of 128 columns is four parts of 32 here too: the low and the high bytes of one half of its words, then those of
the other half. One part becomes bf16 while the tensor core multiplies by the one before. The scale of the output
channel is there before the first product, and goes onto the sums when all are made.

    x tile [BM, 128]      words [halves, BN/halves, 64] int16      acc [BN, BM] float32
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from ..formats.packed import PackedWeight
from ..formats.unpacking import PAIR_GROUP
from ..triton_common import admission, int8_bf16, new_partials
from ..tuning import HopperConfig
from .hopper_ring import (
    X_LAYOUT,
    aligned,
    check_tiles,
    descriptor,
    following,
    launch_options,
    out_descriptor,
    release,
    stream,
)

WORDS_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


@gluon.jit
def factors(operands, ring, tile, layout: gl.constexpr):
    """float32 scales [BN] of a tile's weight rows: of BN neighbours, or of BN/2 gates and BN/2 ups."""
    scale, N = operands[3], operands[4]
    HALVES: gl.constexpr = ring[1].shape[1]
    ROWS: gl.constexpr = ring[1].shape[2]
    r = gl.arange(0, HALVES * ROWS, layout)
    n = tile[1] * ROWS + r % ROWS
    return gl.load(scale + r // ROWS * N + n, mask=n < N, other=0.0).to(gl.float32)


@gluon.jit
def multiply(operands, ring, tile, first, count, PRODUCER: gl.constexpr):
    """acc [BN, BM]; each wait leaves one product running, whose operand it keeps alive."""
    STAGES: gl.constexpr = ring[0].shape[0]
    BM: gl.constexpr = ring[0].shape[1]
    W: gl.constexpr = ring[1].shape[3]
    BN: gl.constexpr = ring[1].shape[1] * ring[1].shape[2]
    PART: gl.constexpr = W // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    factor = factors(operands, ring, tile, gl.SliceLayout(1, mma))
    acc = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, PART], gl.bfloat16, left)  # the operand of the product before
    slot, phase, before = 0, 0, STAGES - 1
    tl.assume(count > 0)  # else ptxas sees a way past the loop, and serializes its products (C7515)
    for i in range(count):
        mbarrier.wait(ring[3].index(slot), phase)
        x, w = ring[0].index(slot), ring[1].index(slot).reshape([BN, W])
        for p in gl.static_range(4):
            if p % 2 == 0:
                words = w.slice(p // 2 * PART, PART, 1).load(left)
            a = int8_bf16(words, p % 2 == 1, False)
            columns = x.slice(p % 2 * W + p // 2 * PART, PART, 1)
            acc = warpgroup_mma(a, columns.permute((1, 0)), acc, is_async=True)
            acc, held = warpgroup_mma_wait(1, deps=(acc, held))
            held = a
            if p == 0:  # the group before is done
                release(operands, ring, before, tile, first + i - 1 + STAGES, first + count, i > 0, PRODUCER)
        before = slot
        slot, phase = following(slot, phase, STAGES)
    acc, held = warpgroup_mma_wait(0, deps=(acc, held))
    return acc * gl.expand_dims(factor, 1)


@gluon.jit(do_not_specialize=["M", "N", "groups_per_split"])
def a16w8_hopper_kernel(
    x_desc, w_desc, y_desc, scale, out, M, N, K, groups_per_split, STAGES: gl.constexpr, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr, AHEAD: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr,
):
    """N: columns of out."""
    stream(
        multiply, (x_desc, w_desc, None, scale, N), y_desc, out, M, N, K, groups_per_split, STAGES, EARLY, PRODUCER,
        AHEAD, BAND, GATED,
    )


def boxes(config: HopperConfig, gated: bool) -> tuple[list[int], list[int]]:
    """What one copy of x and of words moves."""
    halves = 2 if gated else 1
    return [config.block_m, PAIR_GROUP], [halves, config.block_n // halves, PAIR_GROUP // 2]


def a16w8_hopper_partials(x: Tensor, weight: PackedWeight, config: HopperConfig, gated: bool = False) -> Tensor:
    """x [M, K] bf16 times a pairs weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where config has one
    split), on a GPU of compute capability 9.0. gated: as in `a16w4_partials`.

    x is copied where it does not begin at a multiple of 16 bytes, which TMA needs. ValueError: K no multiple of 8, for
    the same reason; a config whose block_n is no multiple of 16 rows a warp, or that has less than two stages.
    """
    assert weight.scale is not None
    (m, k), n, halves = x.shape, weight.shape[0], 2 if gated else 1
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    if k % 8:
        raise ValueError(f"a16w8_hopper_partials: rows of x must be multiples of 16 bytes, not {2 * k}")
    check_tiles("a16w8_hopper_partials", config, n, gated)
    x, width = aligned(x), n // halves
    out, per_split = new_partials(triton.cdiv(k, PAIR_GROUP), config.splits, m, width, x.device)
    x_box, w_box = boxes(config, gated)
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n), out.shape[0])
    a16w8_hopper_kernel[grid](
        descriptor(x, x_box, X_LAYOUT), descriptor(weight.data.view(halves, width, -1), w_box, WORDS_LAYOUT),
        out_descriptor(out, config, block_n // halves, PAIR_GROUP), weight.scale, out, m, width, k, per_split, stages,
        early, config.producer, min(config.ahead, stages), config.band, gated, launch_pdl=early > 0,
        **launch_options(config),
    )
    return out
