"""What kernels for Hopper share that stream a weight through a ring in shared memory, in Gluon, Triton's language for
explicit schedules.

    x tile    [BM, G] bf16                     by TMA into a ring of STAGES slots
    weights   words [halves, BN/64/halves, 64, G/4] int16 and scales [1, halves, BN/halves] int32 of 4-bit weights, or
              bf16 [halves, BN/halves, G], int8 in pairs [halves, BN/halves, 64]      by TMA into rings beside it
    full      flips when all bytes of a slot are there; empty, when it may be filled again
    acc       [BN, BM] float32                 in registers; out by TMA, or masked where that cannot be or rows are few

Weights of the first AHEAD groups, which no kernel of a step writes, are copied before the kernel before has ended, x
and the rest after it. GATED tiles hold BN/2 gates and the BN/2 ups that belong to them, and end in silu(gate) * up.

Slots are refilled by a warp group of its own (`producer`), which waits for `empty` slots and gives its registers to the
consumers, or by a thread of the warps that multiply.
"""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton_common import admit_next, await_previous, banded
from ..tuning import HopperConfig

REGISTERS = 65536  # 32-bit ones of a multiprocessor


@gluon.jit
def expect_group(operands, ring, slot, wanted):
    """All bytes of a group, so that a slot's `full` flips once, whenever its parts are copied."""
    x_desc, w_desc, s_desc = operands[0], operands[1], operands[2]
    nbytes: gl.constexpr = (
        x_desc.block_type.nbytes + w_desc.block_type.nbytes + (0 if s_desc is None else s_desc.block_type.nbytes)
    )
    mbarrier.expect(ring[3].index(slot), nbytes, pred=wanted)


@gluon.jit
def copy_x(operands, ring, slot, tile, group, wanted):
    x = ring[0].index(slot)
    at = [tile[0] * x.shape[0], group * x.shape[1]]
    tma.async_copy_global_to_shared(operands[0], at, ring[3].index(slot), x, pred=wanted)


@gluon.jit
def copy_weights(operands, ring, slot, tile, group, wanted):
    """Of a group; halves are 2 where gates and ups meet."""
    w, full = ring[1].index(slot), ring[3].index(slot)
    if operands[2] is None:
        at = [0, tile[1] * w.shape[1], group * w.shape[2]]
        tma.async_copy_global_to_shared(operands[1], at, full, w, pred=wanted)
    else:
        s = ring[2].index(slot)
        at = [0, tile[1] * w.shape[1], group * w.shape[2], 0]
        tma.async_copy_global_to_shared(operands[1], at, full, w, pred=wanted)
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
def store_tile(acc, ring, y_desc, out, tile, M, N, GATED: gl.constexpr):
    """acc [BN, BM] to out [SPLITS, M, N], by TMA through the ring of x if there is y_desc."""
    tile_m, tile_n, split = tile
    BM: gl.constexpr = acc.shape[1]
    WIDTH: gl.constexpr = acc.shape[0] // 2 if GATED else acc.shape[0]
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
    multiply: gl.constexpr, operands, ring, y_desc, out, tile, first, count, M, N, EARLY: gl.constexpr,
    PRODUCER: gl.constexpr, GATED: gl.constexpr,
):
    """The warps that multiply."""
    acc = multiply(operands, ring, tile, first, count, PRODUCER)
    admit_next(EARLY)
    store_tile(acc, ring, y_desc, out, tile, M, N, GATED)


@gluon.jit
def stream(
    multiply: gl.constexpr, operands, y_desc, out, M, N, K, groups_per_split, STAGES: gl.constexpr,
    EARLY: gl.constexpr, PRODUCER: gl.constexpr, AHEAD: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr,
):
    """A whole kernel: one tile of out [SPLITS, M, N], whose `multiply` goes through `count` groups of K and releases
    the slot of each. operands: descriptors of x, of weights and of scales (or None), and what else it reads."""
    x_desc, w_desc, s_desc = operands[0], operands[1], operands[2]
    tile = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if BAND > 0:
        rows = gl.num_programs(0)
        tile_m, tile_n = banded(tile[0] + tile[1] * rows, rows, gl.num_programs(1), BAND)
        tile = tile_m, tile_n, tile[2]
    first = tile[2] * groups_per_split
    count = gl.minimum(groups_per_split, gl.cdiv(K, x_desc.block_type.shape[1]) - first)
    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + x_desc.block_type.shape, x_desc.layout)
    w_ring = gl.allocate_shared_memory(w_desc.dtype, [STAGES] + w_desc.block_type.shape, w_desc.layout)
    s_ring: gl.constexpr = None
    if s_desc is not None:
        s_ring = gl.allocate_shared_memory(gl.int32, [STAGES] + s_desc.block_type.shape, s_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    fence_async_shared()
    ring = (x_ring, w_ring, s_ring, full, empty)
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
                (consume, (multiply, operands, ring, y_desc, out, tile, first, count, M, N, EARLY, PRODUCER, GATED)),
                (produce, (operands, ring, tile, first, count)),
            ],
            [4],
            [24],
        )
    else:
        consume(multiply, operands, ring, y_desc, out, tile, first, count, M, N, EARLY, PRODUCER, GATED)


X_LAYOUT = gl.NVMMASharedLayout(128, 16, 2)
OUT_LAYOUTS = {torch.bfloat16: gl.NVMMASharedLayout(128, 16, 3), torch.float32: gl.NVMMASharedLayout(128, 32, 3)}


def launch_options(config: HopperConfig) -> dict[str, int]:
    """Warps; and at most as many registers as leave room for all programs of a multiprocessor."""
    options = {"num_warps": config.warps}
    threads = 32 * (config.warps + 4 * config.producer)
    registers = REGISTERS // (threads * config.programs) // 8 * 8
    if config.programs > 1 and registers < 255:
        options["maxnreg"] = registers
    return options


def check_tiles(op: str, config: HopperConfig, n: int, gated: bool, tile_rows: int = 1) -> None:
    """ValueError for tiles that a kernel for Hopper does not take of a weight with n rows, which are stored in tiles of
    tile_rows."""
    rows = max(tile_rows, 16 * config.warps) * (2 if gated else 1)
    if config.block_n % rows or config.stages < 2 or (gated and n % config.block_n):
        raise ValueError(
            f"{op}: by {config.warps} warps block_n must be a multiple of {rows}{', and divide N,' if gated else ''} "
            f"and stages 2 or more, not {config.block_n}, N = {n} and {config.stages}"
        )


def aligned(x: Tensor) -> Tensor:
    """x, or a copy of it, that begins at a multiple of 16 bytes, as TMA needs it."""
    return x.clone() if x.data_ptr() % 16 else x


def descriptor(tensor: Tensor, box: list[int], layout: gl.NVMMASharedLayout) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), box, layout)


def out_descriptor(out: Tensor, config: HopperConfig, width: int, group: int) -> TensorDescriptor | None:
    """For a tile [BM, width] of out [SPLITS, M, N] that fits into x's ring; None where few rows are stored masked, or
    rows of out are no multiple of 16 bytes."""
    size = out.element_size()
    if config.block_m < 64 or out.shape[2] * size % 16 or width * size > config.stages * group * 2:
        return None
    return descriptor(out, [1, config.block_m, width], OUT_LAYOUTS[out.dtype])
