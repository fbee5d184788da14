"""What the Triton kernels share: dots and code-to-float tricks that also run in Triton's interpreter.

The interpreter has no inline assembly and gets bf16 arithmetic wrong, so every kernel takes `INTERP: tl.constexpr` and
these helpers use plain float32 arithmetic under it; on a GPU the same source compiles to the fast form.
"""

# ruff: noqa: N803  (Triton's constexpr parameters are upper case by custom)
from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.language.target_info import cuda_capability_geq

from .dispatch import interpreted

INTERP = interpreted()


@lru_cache(maxsize=1)
def early_launch() -> bool:
    """Whether kernels are launched before their predecessor ends (programmatic dependent launch, Hopper and later)."""
    return not INTERP and torch.cuda.get_device_capability() >= (9, 0)


@lru_cache(maxsize=1)
def warp_group_products() -> bool:
    """Whether the GPU has Hopper's products of warp groups (wgmma), which no later one has."""
    return not INTERP and torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


AT_START, AFTER_LOOP = 1, 2


def admission(late: bool) -> int:
    """When a kernel lets its successor be launched: 0 not before it ends, else `AT_START` or `AFTER_LOOP`."""
    return (AFTER_LOOP if late else AT_START) if early_launch() else 0


def new_partials(steps: int, splits: int, m: int, n: int, device: torch.device) -> tuple[Tensor, int]:
    """Unwritten partials [SPLITS, M, N] of a product that takes `steps` steps over K (float32; bf16 where there is one
    split), and the steps of each split: none is empty, so every partial is written."""
    per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, per_split)
    dtype = torch.float32 if splits > 1 else torch.bfloat16
    return torch.empty(splits, m, n, dtype=dtype, device=device), per_split


def next_power_of_2(n: int) -> int:
    return int(triton.next_power_of_2(n))


@triton.jit
def await_previous(EARLY: tl.constexpr):
    """First statement of every kernel launched early: wait for the previous kernel's memory, let the next one be
    launched, unless EARLY is 2: then `admit_next` does, or where a kernel has no loop, its end.

    Every program must come here, idle ones too: a kernel that ends without having waited would let its successor
    overtake. The order counts: letting the next kernel in before this one may begin spreads its programs unevenly over
    the multiprocessors (a decode step of 7B int4 took 2.61 instead of 1.98 ms on an H200)."""
    if EARLY:
        gdc_wait()
    if EARLY == 1:
        gdc_launch_dependents()


@triton.jit
def admit_next(EARLY: tl.constexpr):
    """After the loop of a kernel of many programs: let the next one be launched, if EARLY is 2.

    A successor that is let in at the start takes the place of the first programs that end, and where many of its own
    crowd on one multiprocessor it reads no faster than that one can. Behind attention late was never slower; behind
    a product it depends on both, so that `kernels.tune_layer` decides (a layer of a 7B in int4 at M = 64 takes 132
    instead of 144 us on an H200, in bf16 170 instead of 167)."""
    if EARLY == 2:
        gdc_launch_dependents()


@triton.jit
def fetch(at, INTERP: tl.constexpr):
    """Ask for the cache line at a pointer that will be read later."""
    if not INTERP:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def fetch_l2(at, INTERP: tl.constexpr):
    """Ask for cache lines, at pointers, that any program will read later. The L2 is where writes of other programs meet
    as well, so that nothing read from it is old."""
    if not INTERP:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def dot(a, b, acc, INTERP: tl.constexpr):
    """a @ b + acc in float32."""
    if INTERP:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def banded(program, rows, columns, BAND: tl.constexpr):
    """Tile (row, column) of the program-th of rows * columns: they go down bands of BAND rows, so that those that run
    at once share tiles of both operands in the L2."""
    band = program // (BAND * columns)
    height = tl.minimum(rows - band * BAND, BAND)
    inside = program % (BAND * columns)
    return band * BAND + inside % height, inside // height


@triton.jit
def feature_rows(tile, N, BN: tl.constexpr, GATED: tl.constexpr):
    """Weight rows [BN] of one tile. GATED: half of them from the first N/2 rows, the gates, and the same ones of the
    second half, so that one program holds what SiLU-mul takes together."""
    r = tl.arange(0, BN)
    if GATED:
        return tile * (BN // 2) + r % (BN // 2) + r // (BN // 2) * (N // 2)
    return tile * BN + r


@triton.jit
def store_product(
    out, acc, tile, split, m, M, N, BN: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr, INTERP: tl.constexpr
):
    """acc [BN, BM] of a tile's `feature_rows` to out [SPLITS, M, N]; GATED: silu(gate) * up to out [1, M, N/2]."""
    y, width = acc, N
    n = tile * BN + tl.arange(0, BN)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (2, BN // 2, BM)), (1, 2, 0)))
        y, width = gate / (1 + tl.exp(-gate)) * up, N // 2
        n = tile * (BN // 2) + tl.arange(0, BN // 2)
    at = out + (split * M + m[None, :]).to(tl.int64) * width + n[:, None]
    inside = (m < M)[None, :] & (n < width)[:, None]
    if out.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bf16(y, INTERP), mask=inside)
    else:
        tl.store(at, y, mask=inside)


@triton.jit
def to_bf16(x, INTERP: tl.constexpr):
    """float32 -> bf16, to nearest even in the interpreter too (which would truncate)."""
    if INTERP:
        bits = x.to(tl.int32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.constexpr_function
def minus(to: str, a: str, b: str, native: bool) -> str:
    """PTX for to = a - b of pairs of bf16. Subtraction came with compute capability 9.0; before, a - 1 * b is the same
    number."""
    if native:
        return f"sub.bf16x2 {to}, {a}, {b};"
    return f"{{ .reg .b32 one; mov.b32 one, 0xbf80bf80; fma.rn.bf16x2 {to}, {b}, one, {a}; }}"


@triton.constexpr_function
def times(to: str, a: str, b: str, native: bool) -> str:
    """PTX for to = a * b of pairs of bf16; before compute capability 9.0 as a * b + -0."""
    if native:
        return f"mul.bf16x2 {to}, {a}, {b};"
    return f"{{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 {to}, {a}, {b}, zero; }}"


@triton.constexpr_function
def nibbles(bits: int) -> str:
    """PTX for t = 128 + the 4-bit codes at `bits` of the words in $1, as bf16: 0x4300 | code is that number exactly."""
    shift = f"shr.u32 t, $1, {bits};" if bits else "mov.b32 t, $1;"
    return shift + " lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea;"


@triton.jit
def nibbles_bf16(words, SHIFT: tl.constexpr, INTERP: tl.constexpr):
    """bf16 128 + code of the 4-bit plane at bit SHIFT of int16 words."""
    if INTERP:
        return (((words >> SHIFT) & 15) | 0x4300).to(tl.int16).to(tl.bfloat16, bitcast=True)
    asm: tl.constexpr = "{ .reg .b32 t; " + nibbles(SHIFT) + " mov.b32 $0, t; }"
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def minus_bf16(a, b, INTERP: tl.constexpr):
    """a - b of bf16 tensors of one shape, in pairs; exact for whole numbers up to 256."""
    if INTERP:
        return to_bf16(a.to(tl.float32) - b.to(tl.float32), INTERP)
    asm: tl.constexpr = minus("$0", "$1", "$2", cuda_capability_geq(9, 0))
    return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def int8_bf16(words, HIGH: tl.constexpr, INTERP: tl.constexpr):
    """bf16 of the int8 codes in the low or high bytes of int16 words, exactly.

    Seven bits under the exponent of 128 are 128 + bits; the sign bit is the last of that exponent, which makes it 128
    or 256. Their difference is the code in two's complement: three instructions for two codes, and a shift for the
    high ones."""
    if INTERP:
        return ((words if HIGH else (words << 8).to(tl.int16)) >> 8).to(tl.float32)
    asm: tl.constexpr = int8_pair("$0", "$1", HIGH, cuda_capability_geq(9, 0))
    return tl.inline_asm_elementwise(asm, "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.constexpr_function
def int8_pair(to: str, words: str, high: bool, native: bool) -> str:
    """PTX for two codes of two words, see `int8_bf16`."""
    shift = f"shr.u32 w, {words}, 8;" if high else f"mov.b32 w, {words};"
    return (
        f"{{ .reg .b32 w, bits, sign; {shift} lop3.b32 bits, w, 0x007f007f, 0x43004300, 0xea; "
        f"lop3.b32 sign, w, 0x00800080, 0x43004300, 0xea; {minus(to, 'bits', 'sign', native)} }}"
    )
