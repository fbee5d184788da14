"""A16W4 matmul for M > 32 on Hopper: one plane is dequantized while the tensor core multiplies by the one before.

What `wide` does, in Gluon, Triton's language for explicit schedules. In plain Triton every product of a loop waits for
the one before it to end, or ptxas serializes them (C7515): dequantization and products take turns. Here a product is
issued, and the wait behind it leaves one outstanding; so the next plane is dequantized beside it:

    tensor core             | plane 0 | plane 1 | plane 2 | plane 3 | plane 0 of the next group
    dequantized   plane 0   | plane 1 | plane 2 | plane 3 | plane 0 |

    x tile   [BM, G] bf16          by TMA into a ring of STAGES slots; plane p multiplies G/4 columns of it
    words    [BN/64, 64, G/4]      int16 by TMA into a ring beside it, from there into registers
    scales   [BN] int32            straight into registers, one group ahead
    acc      [BN, BM] float32      in registers; out by TMA, or masked where a row of it is no multiple of 16 bytes

Slots are refilled by a warp group of its own (`producer`), which waits for `empty` slots and gives its registers to the
consumers, or by a thread of the warps that multiply, once the first product of the next group is on its way.

A product in flight still reads its left operand from registers, so these must not be written until it has ended.
Triton's own pipelining gets that wrong (https://github.com/triton-lang/triton/issues/9433). Here the wait keeps the
operand of the product before alive, and tests look for such writes in what ptxas made.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
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

from .packing import PLANE_ROWS, PackedWeight
from .triton_common import admission, admit_next, await_previous, new_partials
from .tuning import HopperConfig
from .wide import dequantized_plane

MULTIPROCESSOR_SHARED = 227 << 10  # bytes that programs on one multiprocessor share


@gluon.jit
def copy_group(operands, ring, slot, tile, group, wanted):
    """Start the copies of one group into a slot; its `full` flips when all their bytes are there."""
    x_desc, w_desc = operands
    x_ring, w_ring, full, _ = ring
    tile_m, tile_n, _ = tile
    x, w, arrived = x_ring.index(slot), w_ring.index(slot), full.index(slot)
    mbarrier.expect(arrived, x_desc.block_type.nbytes + w_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(x_desc, [tile_m * x.shape[0], group * x.shape[1]], arrived, x, pred=wanted)
    tma.async_copy_global_to_shared(w_desc, [tile_n * w.shape[0], group * w.shape[1], 0], arrived, w, pred=wanted)


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and its phase, which changes with every turn."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def produce(operands, ring, tile, first, count):
    """The loop of the warps that only copy."""
    empty = ring[3]
    slot, phase = 0, 1  # a barrier that nobody has arrived at counts as of the phase before
    for i in range(count):
        mbarrier.wait(empty.index(slot), phase)
        copy_group(operands, ring, slot, tile, first + i, True)
        slot, phase = following(slot, phase, empty.shape[0])


@gluon.jit
def consume(
    operands, ring, y_desc, scales, out, tile, first, count, M, N, N_PADDED, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr,
):
    """The loop of the warps that dequantize and multiply, and the end."""
    x_ring, w_ring, full, empty = ring
    tile_m, tile_n, split = tile
    STAGES: gl.constexpr = x_ring.shape[0]
    BM: gl.constexpr = x_ring.shape[1]
    W: gl.constexpr = w_ring.shape[3]
    BN: gl.constexpr = w_ring.shape[1] * w_ring.shape[2]
    # Each plane's words read again, so that ptxas does not dequantize all four first: 2 to 9 % faster at M = 2048 on an
    # H200 where registers are few, equal or slower elsewhere.
    RELOAD: gl.constexpr = PRODUCER and BM == 256
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    n = (tile_n * BN + gl.arange(0, BN, gl.SliceLayout(1, left))) % N_PADDED
    scale_at = scales + first * N_PADDED + n
    word = gl.load(scale_at)
    acc = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, W], gl.bfloat16, left)  # the operand of the product before
    slot, phase, before = 0, 0, STAGES - 1
    for i in range(count):
        scale_at += gl.where(i + 1 < count, N_PADDED, 0)  # not past the end
        next_word = gl.load(scale_at)
        scale = gl.expand_dims((word & -256).to(gl.float32, bitcast=True).to(gl.bfloat16), 1)
        zero = gl.expand_dims(((word & 127) | 0x4300).to(gl.int16).to(gl.bfloat16, bitcast=True), 1)
        mbarrier.wait(full.index(slot), phase)
        x, w = x_ring.index(slot), w_ring.index(slot).reshape([BN, W])
        words = w.load(left)
        for p in gl.static_range(4):
            if RELOAD and p > 0:
                words = w.load(left)
            a = dequantized_plane(words, zero, scale, 4 * p, False)
            acc = warpgroup_mma(a, x.slice(p * W, W, 1).permute((1, 0)), acc, is_async=True)
            acc, held = warpgroup_mma_wait(1, deps=(acc, held))
            held = a
            if p == 0:  # the group before is done: its slot is free
                tl.debug_barrier()  # in all warps: the wait was for four (Triton's issue 11047), one thread goes on
                if PRODUCER:
                    mbarrier.arrive(empty.index(before), count=1, pred=i > 0)
                else:
                    copy_group(operands, ring, before, tile, first + i + STAGES - 1, i + STAGES - 1 < count)
        word, before = next_word, slot
        slot, phase = following(slot, phase, STAGES)
    acc, held = warpgroup_mma_wait(0, deps=(acc, held))
    admit_next(EARLY)
    y = gl.permute(acc.to(out.dtype.element_ty), (1, 0))
    if y_desc is not None:
        tl.debug_barrier()  # nobody reads the ring any more
        stage = x_ring._reinterpret(y.dtype, [1, BM, BN], y_desc.layout)
        stage.reshape([BM, BN]).store(y)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [split, tile_m * BM, tile_n * BN], stage)
        tma.store_wait(0)
    else:
        m = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, y.type.layout))[:, None]
        n = tile_n * BN + gl.arange(0, BN, gl.SliceLayout(0, y.type.layout))[None, :]
        gl.store(out + (split * M + m).to(gl.int64) * N + n, y, mask=(m < M) & (n < N))


@gluon.jit(do_not_specialize=["M", "N", "groups_per_split"])
def wide_hopper_kernel(
    x_desc, w_desc, y_desc, scales, out, M, N, N_PADDED, K, groups_per_split, BN: gl.constexpr, STAGES: gl.constexpr,
    EARLY: gl.constexpr, PRODUCER: gl.constexpr,
):
    tile = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = tile[2] * groups_per_split
    count = gl.minimum(groups_per_split, K // x_desc.block_type.shape[1] - first)
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
                (consume, (operands, ring, y_desc, scales, out, tile, first, count, M, N, N_PADDED, EARLY, PRODUCER)),
                (produce, (operands, ring, tile, first, count)),
            ],
            [4],
            [24],
        )
    else:
        for s in gl.static_range(STAGES - 1):
            copy_group(operands, ring, s, tile, first + s, s < count)
        consume(operands, ring, y_desc, scales, out, tile, first, count, M, N, N_PADDED, EARLY, PRODUCER)


X_LAYOUT, WORDS_LAYOUT = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(64, 16, 3)
OUT_LAYOUTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 3), torch.float32: gl.NVMMASharedLayout(128, 32, 3)}


def launch_options(config: HopperConfig) -> dict[str, int]:
    """Warps; and registers, where two programs fit on a multiprocessor: with a producer they have 8 warps each."""
    options = {"num_warps": config.warps}
    shared = config.stages * (config.block_m * 256 + config.block_n * 64) + 1024
    if config.producer and config.warps == 4 and 2 * shared <= MULTIPROCESSOR_SHARED:
        options["maxnreg"] = 128
    return options


def wide_hopper_partials(x: Tensor, weight: PackedWeight, config: HopperConfig) -> Tensor:
    """x [M, K] bf16 times a planes weight [N, K] of group size 128 -> float32 partials [SPLITS, M, N] (bf16 [1, M, N]
    where config has one split), on a GPU of compute capability 9.0.

    x is copied where it does not begin at a multiple of 16 bytes, which TMA needs. ValueError: another group size; a
    config whose block_n is no multiple of 16 rows a warp, or that has less than two stages.
    """
    assert weight.scale is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    block_m, block_n, stages = config.block_m, config.block_n, config.stages
    if g != 128:
        raise ValueError(f"wide_hopper_partials: the group size must be 128, not {g}")
    if block_n % max(PLANE_ROWS, 16 * config.warps) or stages < 2:
        raise ValueError(
            f"wide_hopper_partials: block_n must be a multiple of {PLANE_ROWS} and of 16 rows a warp, and stages 2 or "
            f"more, not {block_n} for {config.warps} warps and {stages}"
        )
    if x.data_ptr() % 16:
        x = x.clone()
    out, per_split = new_partials(k // g, config.splits, m, n, x.device)
    splits, size, n_padded = out.shape[0], out.element_size(), weight.scale.shape[1]
    words = weight.data.view(-1, k // g * PLANE_ROWS, g // 4)
    box = [block_n // PLANE_ROWS, PLANE_ROWS, g // 4]
    x_desc = TensorDescriptor(x, [m, k], [k, 1], [block_m, g], X_LAYOUT)
    w_desc = TensorDescriptor(words, list(words.shape), list(words.stride()), box, WORDS_LAYOUT)
    y_desc = None
    if n * size % 16 == 0 and block_n * size <= stages * g * 2:  # else the tile does not fit into x's ring
        y_desc = TensorDescriptor(out, [splits, m, n], [m * n, n, 1], [1, block_m, block_n], OUT_LAYOUTS[out.dtype])
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n_padded, block_n), splits)
    wide_hopper_kernel[grid](
        x_desc, w_desc, y_desc, weight.scale, out, m, n, n_padded, k, per_split, block_n, stages, early,
        config.producer, launch_pdl=early > 0, **launch_options(config),
    )
    return out
