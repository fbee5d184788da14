"""A16W4 matmul on Hopper, from one row to 2048: one plane is dequantized while the tensor core multiplies by the one
before, and weights are on their way before the kernel that makes x has ended (`hopper_ring`).

What `a16w4` and `wide` do, in Gluon. In plain Triton every product of a loop waits for the one before it to end, or
ptxas serializes them (C7515): dequantization and products take turns. Here a product is issued, and the wait behind it
leaves one outstanding; so the next plane is dequantized beside it:

    tensor core             | plane 0 | plane 1 | plane 2 | plane 3 | plane 0 of the next group
    dequantized   plane 0   | plane 1 | plane 2 | plane 3 | plane 0 |

Up to 32 rows memory sets the time: codes less their zero multiply x, and the scale goes onto the sum of a group, as in
`a16w4`; that is an instruction less for two weights, and a wait for all products at the end of each group. Above, it
goes into the left operand, as in `wide`. Plane p multiplies G/4 columns of the x tile.

A product in flight still reads its left operand from registers, so these must not be written until it has ended.
Triton's own pipelining gets that wrong (https://github.com/triton-lang/triton/issues/9433). Here the wait keeps the
operand of the product before alive, and tests look for such writes in what ptxas made.
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
from ..formats.unpacking import PLANE_ROWS
from ..triton_common import admission, new_partials
from ..tuning import HopperConfig
from .a16w4 import plane
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
from .wide import dequantized_plane

WORDS_LAYOUT, SCALES_LAYOUT = gl.NVMMASharedLayout(64, 16, 4), gl.NVMMASharedLayout(0, 32, 3)


@gluon.jit
def operands_of(ring, slot, left: gl.constexpr):
    """A slot's x [BM, G] and words [BN, W] in shared memory, and its zeros 128 + zero in bf16 and scales [BN, 1]."""
    w_ring, s_ring = ring[1], ring[2]
    BN: gl.constexpr = w_ring.shape[1] * w_ring.shape[2] * w_ring.shape[3]
    word = s_ring.index(slot).reshape([1, BN]).permute((1, 0)).load(left)
    zero = ((word & 127) | 0x4300).to(gl.int16).to(gl.bfloat16, bitcast=True)
    scale = (word & -256).to(gl.float32, bitcast=True)
    return ring[0].index(slot), w_ring.index(slot).reshape([BN, w_ring.shape[4]]), zero, scale


@gluon.jit
def scaled_operand(operands, ring, tile, first, count, PRODUCER: gl.constexpr):
    """acc [BN, BM], the scale in the left operand."""
    STAGES: gl.constexpr = ring[0].shape[0]
    BM: gl.constexpr = ring[0].shape[1]
    W: gl.constexpr = ring[1].shape[4]
    BN: gl.constexpr = ring[1].shape[1] * ring[1].shape[2] * ring[1].shape[3]
    # Each plane's words read again, so that ptxas does not dequantize all four first: 2 to 9 % faster at M = 2048 on an
    # H200 where registers are few, equal or slower elsewhere.
    RELOAD: gl.constexpr = PRODUCER and BM == 256
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    acc = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, W], gl.bfloat16, left)  # the operand of the product before
    slot, phase, before = 0, 0, STAGES - 1
    tl.assume(count > 0)  # else ptxas sees a way past the loop, and serializes its products (C7515)
    for i in range(count):
        mbarrier.wait(ring[3].index(slot), phase)
        x, w, zero, scale = operands_of(ring, slot, left)
        scale = scale.to(gl.bfloat16)
        words = w.load(left)
        for p in gl.static_range(4):
            if RELOAD and p > 0:
                words = w.load(left)
            a = dequantized_plane(words, zero, scale, 4 * p, False)
            acc = warpgroup_mma(a, x.slice(p * W, W, 1).permute((1, 0)), acc, is_async=True)
            acc, held = warpgroup_mma_wait(1, deps=(acc, held))
            held = a
            if p == 0:  # the group before is done
                release(operands, ring, before, tile, first + i - 1 + STAGES, first + count, i > 0, PRODUCER)
        before = slot
        slot, phase = following(slot, phase, STAGES)
    acc, held = warpgroup_mma_wait(0, deps=(acc, held))
    return acc


@gluon.jit
def scaled_sum(operands, ring, tile, first, count, PRODUCER: gl.constexpr):
    """acc [BN, BM], the scale on the sum of a group: for tiles of up to 32 columns, beside which a second one fits."""
    STAGES: gl.constexpr = ring[0].shape[0]
    BM: gl.constexpr = ring[0].shape[1]
    W: gl.constexpr = ring[1].shape[4]
    BN: gl.constexpr = ring[1].shape[1] * ring[1].shape[2] * ring[1].shape[3]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    acc = gl.zeros([BN, BM], gl.float32, mma)
    zeros = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, W], gl.bfloat16, left)  # the operand of the product before
    slot, phase = 0, 0
    tl.assume(count > 0)  # as above
    for i in range(count):
        mbarrier.wait(ring[3].index(slot), phase)
        x, w, zero, scale = operands_of(ring, slot, left)
        scale = gl.convert_layout(scale, mma, assert_trivial=True)
        words = w.load(left)
        d = zeros
        for p in gl.static_range(4):
            a = plane(words, zero, 4 * p, True, False)
            d = warpgroup_mma(a, x.slice(p * W, W, 1).permute((1, 0)), d, use_acc=p > 0, is_async=True)
            d, held = warpgroup_mma_wait(1, deps=(d, held))
            held = a
        d, held = warpgroup_mma_wait(0, deps=(d, held))
        release(operands, ring, slot, tile, first + i + STAGES, first + count, i >= 0, PRODUCER)
        acc += scale * d
        slot, phase = following(slot, phase, STAGES)
    return acc


@gluon.jit(do_not_specialize=["M", "N", "groups_per_split"])
def a16w4_hopper_kernel(
    x_desc, w_desc, s_desc, y_desc, out, M, N, K, groups_per_split, STAGES: gl.constexpr, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr, AHEAD: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr,
):
    """N: columns of out."""
    multiply: gl.constexpr = scaled_sum if x_desc.block_type.shape[0] <= 32 else scaled_operand
    stream(
        multiply, (x_desc, w_desc, s_desc), y_desc, out, M, N, K, groups_per_split, STAGES, EARLY, PRODUCER, AHEAD,
        BAND, GATED,
    )


def boxes(config: HopperConfig, gated: bool) -> tuple[list[int], list[int], list[int]]:
    """What one copy of x, words and scales moves."""
    halves = 2 if gated else 1
    rows = config.block_n // halves
    return [config.block_m, 128], [halves, rows // PLANE_ROWS, PLANE_ROWS, 32], [1, halves, rows]


def a16w4_hopper_partials(x: Tensor, weight: PackedWeight, config: HopperConfig, gated: bool = False) -> Tensor:
    """x [M, K] bf16 times a planes weight [N, K] of group size 128 -> float32 partials [SPLITS, M, N] (bf16 [1, M, N]
    where config has one split), on a GPU of compute capability 9.0. gated: as in `a16w4_partials`.

    x is copied where it does not begin at a multiple of 16 bytes, which TMA needs. ValueError: another group size; a
    config whose block_n is no multiple of 16 rows a warp (32 if gated), or that has less than two stages.
    """
    assert weight.scale is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    halves = 2 if gated else 1
    if g != 128:
        raise ValueError(f"a16w4_hopper_partials: the group size must be 128, not {g}")
    check_tiles("a16w4_hopper_partials", config, n, gated, PLANE_ROWS)
    x, width = aligned(x), n // halves
    out, per_split = new_partials(k // g, config.splits, m, width, x.device)
    n_padded = weight.scale.shape[1]
    words = weight.data.view(halves, n_padded // PLANE_ROWS // halves, k // g * PLANE_ROWS, g // 4)
    scales = weight.scale.view(k // g, halves, n_padded // halves)
    x_box, w_box, s_box = boxes(config, gated)
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n_padded, block_n), out.shape[0])
    a16w4_hopper_kernel[grid](
        descriptor(x, x_box, X_LAYOUT), descriptor(words, w_box, WORDS_LAYOUT),
        descriptor(scales, s_box, SCALES_LAYOUT), out_descriptor(out, config, block_n // halves, g), out, m, width, k,
        per_split, stages, early, config.producer, min(config.ahead, stages), config.band, gated, launch_pdl=early > 0,
        **launch_options(config),
    )
    return out
