"""A8W4 matmul: y[M, N] = (x8 @ w8.T) * x_scale (per token) * channel (per output channel), where w8 is the int8 form
of a 4-bit weight (`QuantizedWeight.requantized`), made in registers.

At a few hundred rows arithmetic and the traffic of x count. In int8 the tensor core is twice as fast as in bf16 and x
half as large, and since w8 has one scale per output channel sums stay in int32 over all of K. Planes give four codes in
two words, and fp16 makes them int8 without a conversion:

    lop3    1024 + code, or 64 + code       under the exponent of that bias, in pairs
    sub     code - zero                     exact
    fma     1536 + (code - zero) * ratio    rounded to a whole number, ties to even; its low byte is the int8 in two's
    prmt    four low bytes                  complement, since 1536 is a multiple of 256

The planes of a group side by side, [BN, G], are the left operand, straight from registers: a thread holds the same 4
bytes of every 16 that it needs there, so that joining planes moves nothing. One product takes a whole group of x.

    w tile   words [BN, G/4]  -->  int8 [BN, G]       x tile   int8 [G, BM], K contiguous       acc   int32 [BN, BM]
"""

# ruff: noqa: N803
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..formats.packed import PackedWeight
from ..formats.unpacking import PLANE_ROWS
from ..rows.activations import Activations
from ..triton_common import INTERP, admission, admit_next, await_previous, new_partials, store_product
from ..tuning import WideConfig, a8w4_config
from .a16w4 import planes_at


@triton.constexpr_function
def requantizing(plane: int) -> str:
    """PTX for four codes of one plane ($1, $2) with their biased zeros ($3, $4) and ratios ($5, $6), in pairs."""
    shift = "shr.u32 a, $1, 8; shr.u32 b, $2, 8;" if plane > 1 else "mov.b32 a, $1; mov.b32 b, $2;"
    mask, bias = ("0x00f000f0", "0x54005400") if plane % 2 else ("0x000f000f", "0x64006400")
    return f"""{{ .reg .b32 a, b, magic; mov.b32 magic, 0x66006600; {shift}
        lop3.b32 a, a, {mask}, {bias}, 0xea; lop3.b32 b, b, {mask}, {bias}, 0xea;
        sub.f16x2 a, a, $3; sub.f16x2 b, b, $4;
        fma.rn.f16x2 a, a, $5, magic; fma.rn.f16x2 b, b, $6, magic; prmt.b32 $0, a, b, 0x6420; }}"""


@triton.jit
def int8_plane(words, zero, ratio, PLANE: tl.constexpr, INTERP: tl.constexpr):
    """int8 round((code - zero) * ratio) of one plane of int16 words. zero, ratio: fp16 of the shape of words; the zero
    comes with the bias of its plane, see `biased_zeros`."""
    if INTERP:
        code = ((words >> (4 * PLANE)) & 15).to(tl.float32) + (64.0 if PLANE % 2 else 1024.0)
        value = (code - zero.to(tl.float32)) * ratio.to(tl.float32)
        return ((value + 12582912.0) - 12582912.0).to(tl.int8)  # 1.5 * 2^23: float32 rounds to a whole number
    return tl.inline_asm_elementwise(
        requantizing(PLANE), "=r,r,r,r,r,r,r", [words, zero, ratio], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def biased_zeros(word):
    """fp16 1024 + zero for planes 0 and 2, 64 + zero for planes 1 and 3, from scale words."""
    zero = word & 127
    low = (zero | 0x6400).to(tl.int16).to(tl.float16, bitcast=True)
    high = ((zero << 4) | 0x5400).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def ratios(word, inverse):
    """fp16 scale / channel, from scale words and 1 / channel."""
    return ((word & -256).to(tl.float32, bitcast=True) * inverse).to(tl.float16)


@triton.jit
def beside(a, b):
    """[N, K] and [N, K] as [N, 2K]."""
    return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (a.shape[0], 2 * a.shape[1]))


@triton.jit
def int8_group(w, word, inverse, INTERP: tl.constexpr):
    """int8 [N, G] of a group's words [N, G/4]. word: its scale words [N, 1]; inverse: 1 / channel [N, 1]."""
    word = tl.broadcast_to(word, w.shape)
    zero, zero_high = biased_zeros(word)
    ratio = ratios(word, inverse)
    lower = beside(int8_plane(w, zero, ratio, 0, INTERP), int8_plane(w, zero_high, ratio, 1, INTERP))
    upper = beside(int8_plane(w, zero, ratio, 2, INTERP), int8_plane(w, zero_high, ratio, 3, INTERP))
    return beside(lower, upper)


@triton.jit(do_not_specialize=["M", "groups_per_split"])
def a8w4_kernel(
    x, words, scales, x_scale, channel, out, M, N, N_PADDED, K, groups_per_split, ROWS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, G: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    await_previous(EARLY)
    W: tl.constexpr = G // 4
    tile_m, tile_n, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = K // G
    m, n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    j = tl.arange(0, G)
    first = split * groups_per_split
    last = tl.minimum(first + groups_per_split, groups)
    here = n % N_PADDED  # where BN does not divide it, rows past the end repeat others, not stored
    words_at, scale_at = planes_at(words, scales, here, first, groups, N_PADDED, ROWS, W)
    x_at = x + m[None, :].to(tl.int64) * K + j[:, None] + first * G
    live = (m < M)[None, :]
    of_channel = tl.load(channel + here)
    inverse = tl.math.div_rn(1.0, of_channel)
    acc = tl.zeros((BN, BM), tl.int32)
    for _ in tl.range(first, last, num_stages=STAGES):
        w = tl.load(words_at)
        word = tl.load(scale_at)[:, None]
        a = tl.load(x_at, mask=live, other=0)
        acc = tl.dot(int8_group(w, word, inverse[:, None], INTERP), a, acc, out_dtype=tl.int32)
        words_at += ROWS * W
        scale_at += N_PADDED
        x_at += G
    admit_next(EARLY)
    y = acc.to(tl.float32) * tl.load(x_scale + m, mask=m < M, other=0.0)[None, :] * of_channel[:, None]
    store_product(out, y, tile_n, split, m, M, N, BN, BM, False, INTERP)


@triton.jit
def requantize_kernel(
    words, scales, channel, out, K, N_PADDED, first_row, rows, ROWS: tl.constexpr, G: tl.constexpr,
    INTERP: tl.constexpr,
):
    """One tile of ROWS output features by one group: planes -> int8 [rows, K]."""
    W: tl.constexpr = G // 4
    tile, group = tl.program_id(0), tl.program_id(1)
    r, j = tl.arange(0, ROWS), tl.arange(0, G)
    n = first_row + tile * ROWS + r
    words_at, scale_at = planes_at(words, scales, n, group, K // G, N_PADDED, ROWS, W)
    w, word = tl.load(words_at), tl.load(scale_at)[:, None]
    inverse = tl.math.div_rn(1.0, tl.load(channel + n))[:, None]
    at = out + (tile * ROWS + r)[:, None].to(tl.int64) * K + group * G + j[None, :]
    tl.store(at, int8_group(w, word, inverse, INTERP), mask=(tile * ROWS + r < rows)[:, None])


def a8w4_partials(x: Activations, weight: PackedWeight, config: WideConfig | None = None) -> Tensor:
    """x [M, K] int8 times a planes weight [N, K] of w4a8 -> float32 partials [SPLITS, M, N] (bf16 [1, M, N] where
    config has one split)."""
    assert weight.scale is not None and weight.channel is not None and weight.group_size is not None
    (m, k), n, g = x.shape, weight.shape[0], weight.group_size
    config = config or a8w4_config(m, n, k, g)
    out, per_split = new_partials(k // g, config.splits, m, n, x.device)
    n_padded, early = weight.scale.shape[1], admission(config.late)
    grid = (triton.cdiv(m, config.block_m), triton.cdiv(n_padded, config.block_n), out.shape[0])
    a8w4_kernel[grid](
        x.codes, weight.data, weight.scale, x.scale, weight.channel, out, m, n, n_padded, k, per_split, PLANE_ROWS,
        config.block_m, config.block_n, g, config.stages, early, INTERP, num_warps=config.warps,
        num_stages=config.stages, launch_pdl=early > 0,
    )
    return out


def requantize_rows(weight: PackedWeight, first: int, out: Tensor) -> None:
    """Write the int8 form of rows first : first + len(out) of a planes weight into out [rows, K]; `first` is a multiple
    of 64."""
    assert weight.scale is not None and weight.channel is not None and weight.group_size is not None
    rows, k = out.shape
    grid = (triton.cdiv(rows, PLANE_ROWS), k // weight.group_size)
    requantize_kernel[grid](
        weight.data, weight.scale, weight.channel, out, k, weight.scale.shape[1], first, rows, PLANE_ROWS,
        weight.group_size, INTERP, num_warps=4,
    )
