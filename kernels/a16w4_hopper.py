"""A16W4 matmul on Hopper, from one row to 2048: one plane is dequantized while the tensor core multiplies by the one
before, and weights are on their way before the kernel that makes x has ended.

What `a16w4` and `wide` do, in Gluon, Triton's language for explicit schedules. In plain Triton every product of a loop
waits for the one before it to end, or ptxas serializes them (C7515): dequantization and products take turns. Here a
product is issued, and the wait behind it leaves one outstanding; so the next plane is dequantized beside it:

    tensor core             | plane 0 | plane 1 | plane 2 | plane 3 | plane 0 of the next group
    dequantized   plane 0   | plane 1 | plane 2 | plane 3 | plane 0 |

    x tile   [BM, G] bf16          by TMA into a ring of STAGES slots; plane p multiplies G/4 columns of it
    words    [BN/64, 64, G/4]      int16 by TMA into a ring beside it, from there into registers
    scales   [BN] int32            by TMA into a third
    acc      [BN, BM] float32      in registers; out by TMA, or masked where a row of it is no multiple of 16 bytes

Up to 32 rows (GROUPED) memory sets the time: codes less their zero multiply x, and the scale goes onto the sum of a
group, as in `a16w4`; that is an instruction less for two weights, and a wait for all products at the end of each group.
Above, it goes into the left operand, as in `wide`. Words and scales of the first AHEAD groups, which no kernel of a
step writes, are copied before the kernel before has ended, x and the rest after it. GATED tiles hold BN/2 gates and the
BN/2 ups that belong to them, and end in silu(gate) * up.

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

from .a16w4 import plane
from .packing import PLANE_ROWS, PackedWeight
from .triton_common import admission, admit_next, await_previous, new_partials
from .tuning import HopperConfig
from .wide import dequantized_plane

GROUPED_ROWS = 32  # up to these columns of a tile: a second accumulator of 64 would not fit beside the first
REGISTERS = 65536  # 32-bit ones of a multiprocessor


@gluon.jit
def expect_group(operands, ring, slot, wanted):
    """All bytes of a group, so that a slot's `full` flips once, whenever its parts are copied."""
    x_desc, w_desc, s_desc = operands
    nbytes: gl.constexpr = x_desc.block_type.nbytes + w_desc.block_type.nbytes + s_desc.block_type.nbytes
    mbarrier.expect(ring[3].index(slot), nbytes, pred=wanted)


@gluon.jit
def copy_x(operands, ring, slot, tile, group, wanted):
    x = ring[0].index(slot)
    at = [tile[0] * x.shape[0], group * x.shape[1]]
    tma.async_copy_global_to_shared(operands[0], at, ring[3].index(slot), x, pred=wanted)


@gluon.jit
def copy_weights(operands, ring, slot, tile, group, wanted):
    """Words [halves, tiles, 64, W] and scales [1, halves, rows] of a group: halves are 2 where gates and ups meet."""
    w, s, full = ring[1].index(slot), ring[2].index(slot), ring[3].index(slot)
    w_at = [0, tile[1] * w.shape[1], group * w.shape[2], 0]
    tma.async_copy_global_to_shared(operands[1], w_at, full, w, pred=wanted)
    tma.async_copy_global_to_shared(operands[2], [group, 0, tile[1] * s.shape[2]], full, s, pred=wanted)


@gluon.jit
def copy_group(operands, ring, slot, tile, group, wanted):
    expect_group(operands, ring, slot, wanted)
    copy_weights(operands, ring, slot, tile, group, wanted)
    copy_x(operands, ring, slot, tile, group, wanted)


@gluon.jit
def following(slot, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and its phase, which changes with every turn."""
    last = slot == STAGES - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def produce(operands, ring, tile, first, count):
    """The loop of the warps that only copy: all slots were filled before the warps parted."""
    empty = ring[4]
    STAGES: gl.constexpr = empty.shape[0]
    slot, phase = 0, 0
    for i in range(STAGES, count):
        mbarrier.wait(empty.index(slot), phase)
        copy_group(operands, ring, slot, tile, first + i, True)
        slot, phase = following(slot, phase, STAGES)


@gluon.jit
def release(operands, ring, slot, tile, group, last, used, PRODUCER: gl.constexpr):
    """A slot that was `used` is free for `group`, if that comes before `last`."""
    tl.debug_barrier()  # in all warps: a wait is for four (Triton's issue 11047), one thread goes on
    if PRODUCER:
        mbarrier.arrive(ring[4].index(slot), count=1, pred=used)
    else:
        copy_group(operands, ring, slot, tile, group, used & (group < last))


@gluon.jit
def store_tile(
    acc, ring, y_desc, out, tile, M, N, BN: gl.constexpr, BM: gl.constexpr, GATED: gl.constexpr,
):
    """acc [BN, BM] to out [SPLITS, M, N], by TMA through the ring of x if there is y_desc."""
    tile_m, tile_n, split = tile
    WIDTH: gl.constexpr = BN // 2 if GATED else BN
    if GATED:
        gate, up = gl.split(gl.permute(gl.reshape(acc, [2, WIDTH, BM]), (1, 2, 0)))
        acc = gate / (1 + gl.exp(-gate)) * up
    y = gl.permute(acc.to(out.dtype.element_ty), (1, 0))
    if y_desc is not None:
        tl.debug_barrier()  # nobody reads the ring any more
        stage = ring[0]._reinterpret(y.dtype, [1, BM, WIDTH], y_desc.layout)
        stage.reshape([BM, WIDTH]).store(y)
        fence_async_shared()
        tma.async_copy_shared_to_global(y_desc, [split, tile_m * BM, tile_n * WIDTH], stage)
        tma.store_wait(0)
    else:
        m = tile_m * BM + gl.arange(0, BM, gl.SliceLayout(1, y.type.layout))[:, None]
        n = tile_n * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, y.type.layout))[None, :]
        gl.store(out + (split * M + m).to(gl.int64) * N + n, y, mask=(m < M) & (n < N))


@gluon.jit
def consume(
    operands, ring, y_desc, out, tile, first, count, M, N, EARLY: gl.constexpr, PRODUCER: gl.constexpr,
    GROUPED: gl.constexpr, GATED: gl.constexpr,
):
    """The loop of the warps that dequantize and multiply, and the end."""
    x_ring, w_ring, s_ring, full, _ = ring
    STAGES: gl.constexpr = x_ring.shape[0]
    BM: gl.constexpr = x_ring.shape[1]
    W: gl.constexpr = w_ring.shape[4]
    BN: gl.constexpr = w_ring.shape[1] * w_ring.shape[2] * w_ring.shape[3]
    # Each plane's words read again, so that ptxas does not dequantize all four first: 2 to 9 % faster at M = 2048 on an
    # H200 where registers are few, equal or slower elsewhere.
    RELOAD: gl.constexpr = PRODUCER and BM == 256
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, BM, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    acc = gl.zeros([BN, BM], gl.float32, mma)
    zeros = gl.zeros([BN, BM], gl.float32, mma)
    held = gl.zeros([BN, W], gl.bfloat16, left)  # the operand of the product before
    slot, phase, before = 0, 0, STAGES - 1
    tl.assume(count > 0)  # else ptxas sees a way past the loop, and serializes its products (C7515)
    for i in range(count):
        mbarrier.wait(full.index(slot), phase)
        word = s_ring.index(slot).reshape([1, BN]).permute((1, 0)).load(left)
        zero = ((word & 127) | 0x4300).to(gl.int16).to(gl.bfloat16, bitcast=True)
        scale = (word & -256).to(gl.float32, bitcast=True)
        x, w = x_ring.index(slot), w_ring.index(slot).reshape([BN, W])
        words = w.load(left)
        if GROUPED:
            scale = gl.convert_layout(scale, mma, assert_trivial=True)
            d = zeros
            for p in gl.static_range(4):
                a = plane(words, zero, 4 * p, True, False)
                d = warpgroup_mma(a, x.slice(p * W, W, 1).permute((1, 0)), d, use_acc=p > 0, is_async=True)
                d, held = warpgroup_mma_wait(1, deps=(d, held))
                held = a
            d, held = warpgroup_mma_wait(0, deps=(d, held))
            release(operands, ring, slot, tile, first + i + STAGES, first + count, i >= 0, PRODUCER)
            acc += scale * d
        else:
            scale = scale.to(gl.bfloat16)
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
    if not GROUPED:
        acc, held = warpgroup_mma_wait(0, deps=(acc, held))
    admit_next(EARLY)
    store_tile(acc, ring, y_desc, out, tile, M, N, BN, BM, GATED)


@gluon.jit(do_not_specialize=["M", "N", "groups_per_split"])
def a16w4_hopper_kernel(
    x_desc, w_desc, s_desc, y_desc, out, M, N, K, groups_per_split, STAGES: gl.constexpr, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr, GROUPED: gl.constexpr, AHEAD: gl.constexpr, GATED: gl.constexpr,
):
    """N: columns of out."""
    tile = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    first = tile[2] * groups_per_split
    count = gl.minimum(groups_per_split, K // x_desc.block_type.shape[1] - first)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(gl.int16, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    s_ring = gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    operands, ring = (x_desc, w_desc, s_desc), (x_ring, w_ring, s_ring, full, empty)
    for s in gl.static_range(STAGES):
        expect_group(operands, ring, s, s < count)
        if s < AHEAD:
            copy_weights(operands, ring, s, tile, first + s, s < count)
    await_previous(EARLY)
    for s in gl.static_range(STAGES):
        copy_x(operands, ring, s, tile, first + s, s < count)
        if s >= AHEAD:
            copy_weights(operands, ring, s, tile, first + s, s < count)
    if PRODUCER:
        gl.warp_specialize(
            [
                (consume, (operands, ring, y_desc, out, tile, first, count, M, N, EARLY, PRODUCER, GROUPED, GATED)),
                (produce, (operands, ring, tile, first, count)),
            ],
            [4],
            [24],
        )
    else:
        consume(operands, ring, y_desc, out, tile, first, count, M, N, EARLY, PRODUCER, GROUPED, GATED)


X_LAYOUT, WORDS_LAYOUT = gl.NVMMASharedLayout(128, 16, 2), gl.NVMMASharedLayout(64, 16, 4)
SCALES_LAYOUT = gl.NVMMASharedLayout(0, 32, 3)
OUT_LAYOUTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 3), torch.float32: gl.NVMMASharedLayout(128, 32, 3)}


def boxes(config: HopperConfig, gated: bool) -> tuple[list[int], list[int], list[int]]:
    """What one copy of x, words and scales moves."""
    halves = 2 if gated else 1
    rows = config.block_n // halves
    return [config.block_m, 128], [halves, rows // PLANE_ROWS, PLANE_ROWS, 32], [1, halves, rows]


def launch_options(config: HopperConfig) -> dict[str, int]:
    """Warps; and at most as many registers as leave room for all programs of a multiprocessor."""
    options = {"num_warps": config.warps}
    threads = 32 * (config.warps + 4 * config.producer)
    registers = REGISTERS // (threads * config.programs) // 8 * 8
    if config.programs > 1 and registers < 255:
        options["maxnreg"] = registers
    return options


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
    if block_n % (halves * max(PLANE_ROWS, 16 * config.warps)) or stages < 2 or (gated and n % block_n):
        raise ValueError(
            f"a16w4_hopper_partials: block_n must be a multiple of {halves * PLANE_ROWS} and of {16 * halves} rows a "
            f"warp{', and divide N,' if gated else ''} and stages 2 or more, not {block_n} for {config.warps} warps, "
            f"N = {n} and {stages}"
        )
    if x.data_ptr() % 16:
        x = x.clone()
    width = n // halves
    out, per_split = new_partials(k // g, config.splits, m, width, x.device)
    splits, size, n_padded = out.shape[0], out.element_size(), weight.scale.shape[1]
    words = weight.data.view(halves, n_padded // PLANE_ROWS // halves, k // g * PLANE_ROWS, g // 4)
    scales = weight.scale.view(k // g, halves, n_padded // halves)
    x_box, w_box, s_box = boxes(config, gated)
    x_desc = TensorDescriptor(x, [m, k], [k, 1], x_box, X_LAYOUT)
    w_desc = TensorDescriptor(words, list(words.shape), list(words.stride()), w_box, WORDS_LAYOUT)
    s_desc = TensorDescriptor(scales, list(scales.shape), list(scales.stride()), s_box, SCALES_LAYOUT)
    y_desc = None
    if block_m > GROUPED_ROWS and width * size % 16 == 0 and block_n // halves * size <= stages * g * 2:
        y_box = [1, block_m, block_n // halves]  # a tile that fits into x's ring
        y_desc = TensorDescriptor(out, [splits, m, width], [m * width, width, 1], y_box, OUT_LAYOUTS[out.dtype])
    early = admission(config.late)
    grid = (triton.cdiv(m, block_m), triton.cdiv(n_padded, block_n), splits)
    a16w4_hopper_kernel[grid](
        x_desc, w_desc, s_desc, y_desc, out, m, width, k, per_split, stages, early, config.producer,
        block_m <= GROUPED_ROWS, min(config.ahead, stages), gated, launch_pdl=early > 0, **launch_options(config),
    )
    return out
