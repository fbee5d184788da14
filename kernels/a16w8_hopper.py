"""A16W8 matmul of pairs (`packing.pack_pairs`) on Hopper for M > 32: `wide_hopper` with int8 codes.

The schedule, the ring and who refills it are those of `wide_hopper`. A group of 128 columns is four parts of 32 here
too: the low and the high bytes of one half of its words, then those of the other half.

    x tile   [BM, 128] bf16        by TMA into a ring of STAGES slots
    words    [BN, 1, 64] int16     by TMA into a ring beside it, from there into registers, half by half
    scale    [BN]                  of the output channels, onto the sums when all are made
    acc      [BN, BM] float32      in registers; out by TMA, or masked where a row of it is no multiple of 16 bytes
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .packing import PAIR_GROUP, PackedWeight
from .triton_common import admission, admit_next, await_previous, int8_bf16, new_partials
from .tuning import HopperConfig
from .wide_hopper import MULTIPROCESSOR_SHARED, OUT_LAYOUTS, X_LAYOUT, copy_group, following, produce

WORDS_LAYOUT = gl.NVMMASharedLayout(128, 16, 3)


@gluon.jit
def consume(
    operands, ring, y_desc, scale, out, tile, first, count, M, N, EARLY: gl.constexpr, PRODUCER: gl.constexpr
):
    """The loop of the warps that make operands and multiply, and the end."""
    x_ring, w_ring, full, empty = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BM: gl.constexpr = x_ring.shape[1]
    BN: gl.constexpr = w_ring.shape[1]
    W: gl.constexpr = w_ring.shape[3]
    PART: gl.constexpr = W // 2
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    n = tile[1] * BN + gl.arange(0, BN, gl.SliceLayout(1, mma))
    factor = gl.load(scale + n, mask=n < N, other=0.0).to(gl.float32)
    acc = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, PART], gl.bfloat16, left)  # the operand of the product before
    slot, phase, before = 0, 0, STAGES - 1
    tl.assume(count > 0)  # else ptxas sees a way past the loop, and serializes its products (C7515)
    for i in range(count):
        mbarrier.wait(full.index(slot), phase)
        x, w = x_ring.index(slot), w_ring.index(slot).reshape([BN, W])
        for p in gl.static_range(4):
            if p % 2 == 0:
                words = w.slice(p // 2 * PART, PART, 1).load(left)
            a = int8_bf16(words, p % 2 == 1, False)
            columns = x.slice(p % 2 * W + p // 2 * PART, PART, 1)
            acc = warpgroup_mma(a, columns.permute((1, 0)), acc, is_async=True)
            acc, held = warpgroup_mma_wait(1, deps=(acc, held))
            held = a
            if p == 0:  # the group before is done: its slot is free
                tl.debug_barrier()  # in all warps: the wait was for four (Triton's issue 11047), one thread goes on
                if PRODUCER:
                    mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
                else:
                    copy_group(operands, ring, before, tile, first + i + STAGES - 1, i + STAGES - 1 < count)
        before = slot
        slot, phase = following(slot, phase, STAGES)
    acc, held = warpgroup_mma_wait(0, deps=(acc, held))
    admit_next(EARLY)
    y = gl.permute((acc * gl.expand_dims(factor, 1)).to(out.dtype.element_ty), (1, 0))
    store_tile(y, x_ring, y_desc, out, tile, M, N)


@gluon.jit
def store_tile(y, x_ring, y_desc, out, tile, M, N):
    """y [BM, BN] to its place in out [SPLITS, M, N]: through the ring, which nobody reads any more, by TMA."""
    BM: gl.constexpr = y.shape[0]
    BN: gl.constexpr = y.shape[1]
    tile_m, tile_n, split = tile
    if y_desc is not None:
        tl.debug_barrier()
        stage = x_ring._reinterpret(y.dtype, [1, BM, BN], y_desc.layout)
        stage.reshape([BM, BN]).store(y)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [split, tile_m * BM, tile_n * BN], stage)
        tma.store_wait(0)
    else:
        m = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, y.type.layout))[:, None]
        n = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, y.type.layout))[None, :]
        gl.store(out + (split * M + m).to(gl.int64) * N + n, y, mask=(m < M) & (n < N))


@gluon.jit(do_not_specialize=["M", "N", "groups", "groups_per_split"])
def a16w8_hopper_kernel(
    x_desc, w_desc, y_desc, scale, out, M, N, groups, groups_per_split, STAGES: gl.constexpr, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr,
):
    tile = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = tile[2] * groups_per_split
    count = gl.minimum(groups_per_split, groups - first)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int16, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    await_previous(EARLY)
    operands, ring = (x_desc, w_desc), (x_ring, w_ring, full, empty)
    if PRODUCER:
        gl.warp_specialize(
            [
                (consume, (operands, ring, y_desc, scale, out, tile, first, count, M, N, EARLY, PRODUCER)),
                (produce, (operands, ring, tile, first, count)),
            ],
            [4],
            [24],
        )
    else:
        for s in gl.static_range(STAGES - 1):
            copy_group(operands, ring, s, tile, first + s, s < count)
        consume(operands, ring, y_desc, scale, out, tile, first, count, M, N, EARLY, PRODUCER)


def launch_options(config: HopperConfig) -> dict[str, int]:
    """Warps; and registers, where two programs fit on a multiprocessor: with a producer they have 8 warps each."""
    options = {"num_warps": config.warps}
    shared = config.stages * (config.block_m * 256 + config.block_n * 128) + 1024
    if config.producer and config.warps == 4 and 2 * shared <= MULTIPROCESSOR_SHARED:
        options["maxnreg"] = 128
    return options


def a16w8_hopper_partials(x: Tensor, weight: PackedWeight, config: HopperConfig) -> Tensor:
    """x [M, K] bf16, K a multiple of 8, times a pairs weight [N, K] -> float32 partials [SPLITS, M, N] (bf16 [1, M, N]
    where config has one split), on a GPU of compute capability 9.0.

    x is copied where it does not begin at a multiple of 16 bytes, which TMA needs. ValueError: another K; a config
    whose block_n is no multiple of 16 rows a warp, or that has less than two stages.
    """
    assert weight.scale is not None
    (m, k), n = x.shape, weight.shape[0]
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    if k % 8:
        raise ValueError(f"a16w8_hopper_partials: in features must be a multiple of 8, {k} is not")
    if block_n % (16 * config.warps) or stages < 2:
        raise ValueError(
            "a16w8_hopper_partials: block_n must be a multiple of 16 rows a warp, and stages 2 or more, not "
            f"{block_n} for {config.warps} warps and {stages}"
        )
    if x.data_ptr() % 16:
        x = x.clone()
    words = weight.data.view(n, -1, PAIR_GROUP // 2)
    groups = words.shape[1]
    out, per_split = new_partials(groups, config.splits, m, n, x.device)
    splits, size = out.shape[0], out.element_size()
    x_desc = TensorDescriptor(x, [m, k], [k, 1], [block_m, PAIR_GROUP], X_LAYOUT)
    box = [block_n, 1, PAIR_GROUP // 2]
    w_desc = TensorDescriptor(words, list(words.shape), list(words.stride()), box, WORDS_LAYOUT)
    y_desc = None
    if n * size % 16 == 0 and block_n * size <= stages * PAIR_GROUP * 2:  # else the tile does not fit into x's ring
        y_desc = TensorDescriptor(out, [splits, m, n], [m * n, n, 1], [1, block_m, block_n], OUT_LAYOUTS[out.dtype])
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n, block_n), splits)
    a16w8_hopper_kernel[grid](
        x_desc, w_desc, y_desc, weight.scale, out, m, n, groups, per_split, stages, early, config.producer,
        launch_pdl=early > 0, **launch_options(config),
    )
    return out
