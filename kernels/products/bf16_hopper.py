"""bf16 matmul on Hopper for M up to 64: a stream over the weight rows by TMA, and weights on their way before the
kernel that makes x has ended (`hopper_ring`).

What `skinny` does, in Gluon. Both operands of a warp-group product come from shared memory, so that the warps that
multiply do nothing else, and a copy is one instruction of one thread: what counts is bytes in flight.

    x tile [BM, 128]      weights [halves, BN/halves, 128]      acc [BN, BM] float32
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
from ..triton_common import admission, new_partials
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

STEP = 128  # columns of a slot
WEIGHT_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


@gluon.jit
def multiply(operands, ring, tile, first, count, PRODUCER: gl.constexpr):
    """acc [BN, BM]; one product is on its way while the next slot is waited for."""
    x_ring, w_ring, _, full, _ = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BM: gl.constexpr = x_ring.shape[1]
    BN: gl.constexpr = w_ring.shape[1] * w_ring.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    acc = gl.zeros([BN, BM], gl.float32, mma)
    slot, phase, before = 0, 0, STAGES - 1
    tl.assume(count > 0)
    for i in range(count):
        mbarrier.wait(full.index(slot), phase)
        w = w_ring.index(slot).reshape([BN, w_ring.shape[3]])
        acc = warpgroup_mma(w, x_ring.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        release(operands, ring, before, tile, first + i - 1 + STAGES, first + count, i > 0, PRODUCER)
        before = slot
        slot, phase = following(slot, phase, STAGES)
    return warpgroup_mma_wait(0, deps=(acc,))


@gluon.jit(do_not_specialize=["M", "N", "groups_per_split"])
def bf16_hopper_kernel(
    x_desc, w_desc, y_desc, out, M, N, K, groups_per_split, STAGES: gl.constexpr, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr, AHEAD: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr,
):
    """N: columns of out."""
    stream(
        multiply, (x_desc, w_desc, None), y_desc, out, M, N, K, groups_per_split, STAGES, EARLY, PRODUCER, AHEAD,
        BAND, GATED,
    )


def boxes(config: HopperConfig, gated: bool) -> tuple[list[int], list[int]]:
    """What one copy of x and of weights moves."""
    halves = 2 if gated else 1
    return [config.block_m, STEP], [halves, config.block_n // halves, STEP]


def bf16_hopper_partials(x: Tensor, weight: PackedWeight, config: HopperConfig, gated: bool = False) -> Tensor:
    """x [M, K] bf16 times a bf16 weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where config has one
    split), on a GPU of compute capability 9.0. gated: as in `a16w4_partials`.

    x is copied where it does not begin at a multiple of 16 bytes, which TMA needs. ValueError: K no multiple of 8, for
    the same reason; a config whose block_n is no multiple of 16 rows a warp, or that has less than two stages.
    """
    (m, k), n, halves = x.shape, weight.shape[0], 2 if gated else 1
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    if k % 8 or weight.data.data_ptr() % 16:
        raise ValueError(f"bf16_hopper_partials: rows of the weight must be multiples of 16 bytes, not {2 * k}")
    check_tiles("bf16_hopper_partials", config, n, gated)
    x, width = aligned(x), n // halves
    out, per_split = new_partials(triton.cdiv(k, STEP), config.splits, m, width, x.device)
    x_box, w_box = boxes(config, gated)
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n), out.shape[0])
    bf16_hopper_kernel[grid](
        descriptor(x, x_box, X_LAYOUT), descriptor(weight.data.view(halves, width, k), w_box, WEIGHT_LAYOUT),
        out_descriptor(out, config, block_n // halves, STEP), out, m, width, k, per_split, stages, early,
        config.producer, min(config.ahead, stages), config.band, gated, launch_pdl=early > 0, **launch_options(config),
    )
    return out
