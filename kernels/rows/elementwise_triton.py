"""RMSNorm (+ residual, or of looked-up rows), SiLU-mul, RoPE in Triton: one pass over memory, statistics in float32."""

# ruff: noqa: N803
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import INTERP, await_previous, early_launch, fetch_l2, next_power_of_2, to_bf16
from .activations import SummedRows


@triton.jit
def load_sum(x, at, inside, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK] at offsets `at`, summed over SPLITS partials that lie `size` elements apart."""
    total = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(x + split * size + at, mask=inside, other=0.0)
    return total


@triton.jit
def store_row(y, out, sums, at, i, inside, row, rows, BLOCK: tl.constexpr, G: tl.constexpr, INTERP: tl.constexpr):
    """y [BLOCK] float32, elements i of a row, as bf16 at out + at + i; where G, also the sum of each group of G as it
    was rounded, at sums [groups, rows]. What is not inside is zero, so it adds nothing."""
    rounded = to_bf16(y, INTERP)
    tl.store(out + at + i, rounded, mask=inside)
    if G:
        total = tl.sum(tl.reshape(rounded.to(tl.float32), (BLOCK // G, G)), 1)
        group = tl.min(i, 0) // G + tl.arange(0, BLOCK // G)
        tl.store(sums + group * rows + row, total, mask=group * G < tl.max(tl.where(inside, i, -1), 0) + 1)


@triton.jit
def normed_row(
    x, at, residual, weight, total, row, size, D, eps, SPLITS: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr,
    EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    """float32 RMSNorm [BLOCK] of the row of x at offset `at`, zeros past D; ADD: of its sum with a row of residual,
    which goes to total. Comes before every other read of what the kernel before wrote: it waits for that one."""
    i = tl.arange(0, BLOCK)
    inside = i < D
    factor = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)  # a parameter: no need to wait for it
    if ADD:  # from the memory, where the weights since have pushed it out of the L2
        LINES: tl.constexpr = (BLOCK + 63) // 64
        fetch_l2(residual + row * D + tl.minimum(tl.arange(0, LINES) * 64, D - 1), INTERP)
    await_previous(EARLY)
    value = load_sum(x, at + i, inside, size, SPLITS, BLOCK)
    if ADD:
        value += tl.load(residual + row * D + i, mask=inside, other=0.0).to(tl.float32)
        rounded = to_bf16(value, INTERP)
        tl.store(total + row * D + i, rounded, mask=inside)
        value = rounded.to(tl.float32)
    return value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * factor


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, total, sums, stride_outer, stride_inner, INNER, size, D, eps, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, ADD: tl.constexpr, G: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    at = (row // INNER) * stride_outer + (row % INNER) * stride_inner
    y = normed_row(x, at, residual, weight, total, row, size, D, eps, SPLITS, BLOCK, ADD, EARLY, INTERP)
    store_row(y, out, sums, row * D, i, i < D, row, tl.num_programs(0), BLOCK, G, INTERP)


@triton.jit
def embed_rms_norm_kernel(
    tokens, table, weight, out, rows, D, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr, INTERP: tl.constexpr
):
    """A row of the table, as it is to rows and normed to out, both [T, D]."""
    i = tl.arange(0, BLOCK)
    inside = i < D
    factor = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)  # a parameter: no need to wait for it
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    found = tl.load(table + tl.load(tokens + row).to(tl.int64) * D + i, mask=inside, other=0.0)
    tl.store(rows + row * D + i, found, mask=inside)
    value = found.to(tl.float32)
    y = value * tl.rsqrt(tl.sum(value * value, 0) / D + eps) * factor
    tl.store(out + row * D + i, to_bf16(y, INTERP), mask=inside)


@triton.jit
def silu_mul_kernel(
    gate_up, out, sums, I, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr, G: tl.constexpr, EARLY: tl.constexpr,
    INTERP: tl.constexpr,
):
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < I
    gate = load_sum(gate_up, row * 2 * I + i, inside, size, SPLITS, BLOCK)
    up = load_sum(gate_up, row * 2 * I + I + i, inside, size, SPLITS, BLOCK)
    y = gate / (1 + tl.exp(-gate)) * up
    store_row(y, out, sums, row * I, i, inside, row, tl.num_programs(0), BLOCK, G, INTERP)


@triton.jit
def rotation_kernel(positions, cos_sin, turn, stride, D, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Cosines [D/2] of a row twice, its sines [D/2] negated and as they are."""
    await_previous(EARLY)
    row, i = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = i < D
    half = D // 2
    at = cos_sin + tl.load(positions + row).to(tl.int64) * stride + i % half
    to = turn + row * 2 * D + i
    tl.store(to, tl.load(at, mask=inside), mask=inside)
    sign = tl.where(i < half, -1.0, 1.0)  # times -1 and not 0 - x, which makes -0 of position 0 positive
    tl.store(to + D, tl.load(at + half, mask=inside) * sign, mask=inside)


@triton.jit
def rope_kernel(
    x, turn, out, stride_row, stride_head, HEADS, D: tl.constexpr, BH: tl.constexpr, INTERP: tl.constexpr
):
    HALF: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64)
    h, i = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, HALF)
    cos = tl.load(turn + row * 2 * D + i)[None, :]
    sin = tl.load(turn + row * 2 * D + D + HALF + i)[None, :]
    inside = (h < HEADS)[:, None]
    at = x + row * stride_row + h[:, None] * stride_head + i[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    to = out + (row * HEADS + h[:, None]) * D + i[None, :]
    tl.store(to, to_bf16(first * cos - second * sin, INTERP), mask=inside)
    tl.store(to + HALF, to_bf16(second * cos + first * sin, INTERP), mask=inside)


def _check(op: str, *tensors: Tensor) -> None:
    for x in tensors:
        if x.dtype != torch.bfloat16 or x.stride(-1) != 1:
            raise ValueError(
                f"{op}: impl 'triton' takes bfloat16 with a contiguous last dimension, "
                f"not {x.dtype} of strides {x.stride()}"
            )


def split_sum(op: str, x: Tensor, rank: int) -> tuple[Tensor, int, int]:
    """x of `rank` dimensions, or float32 partials of one more -> (x, number of partials, elements from one to the
    next)."""
    if x.dim() == rank + 1 and x.dtype == torch.float32 and x.is_contiguous():
        return x, x.shape[0], x[0].numel()
    _check(op, x)
    return x.contiguous(), 1, 0


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] bf16; views of up to two leading dimensions are read in place."""
    return _rms_norm(x, weight, eps, 0)[0]


def _rms_norm(x: Tensor, weight: Tensor, eps: float, group: int) -> tuple[Tensor, Tensor]:
    _check("rms_norm", x, weight)
    d = x.shape[-1]
    if x.dim() > 3:
        x = x.reshape(-1, d)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    inner = x.shape[1] if x.dim() == 3 else 1
    outer_stride, inner_stride = (x.stride(0), x.stride(1)) if x.dim() == 3 else (x.stride(0) if x.dim() == 2 else d, 0)
    block, early, rows = next_power_of_2(d), early_launch(), max(1, x.numel() // d)
    sums = _sums(d, rows, group, x.device)
    rms_norm_kernel[(rows,)](
        x, x, weight, out, out, sums, outer_stride, inner_stride, inner, 0, d, eps, 1, block, False, group, early,
        INTERP, num_warps=_warps(block), launch_pdl=early,
    )
    return out, sums


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, D] bf16 or partials [S, T, D] float32, residual [T, D] bf16."""
    out, total, _ = _add_rms_norm(x, residual, weight, eps, 0)
    return out, total


def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check("add_rms_norm", residual, weight)
    residual = residual.contiguous()
    x, splits, size = split_sum("add_rms_norm", x, residual.dim())
    d = residual.shape[-1]
    out, total = torch.empty_like(residual), torch.empty_like(residual)
    block, early, rows = next_power_of_2(d), early_launch(), residual.numel() // d
    sums = _sums(d, rows, group, x.device)
    rms_norm_kernel[(rows,)](
        x, residual, weight, out, total, sums, d, 0, 1, size, d, eps, splits, block, True, group, early, INTERP,
        num_warps=_warps(block), launch_pdl=early,
    )
    return out, total, sums


def embed_rms_norm(tokens: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """table [vocab, D] and weight [D] bf16."""
    _check("embed_rms_norm", table, weight)
    tokens, table, d = tokens.contiguous(), table.contiguous(), table.shape[1]
    out, rows = (torch.empty(len(tokens), d, dtype=table.dtype, device=table.device) for _ in range(2))
    block, early = next_power_of_2(d), early_launch()
    if len(tokens):
        embed_rms_norm_kernel[(len(tokens),)](
            tokens, table, weight, out, rows, d, eps, block, early, INTERP, num_warps=_warps(block), launch_pdl=early
        )
    return out, rows


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up [T, 2I] bf16 or partials [S, T, 2I] float32."""
    return _silu_mul(gate_up, 0)[0]


def _silu_mul(gate_up: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[-2], gate_up.shape[-1] // 2
    gate_up, splits, size = split_sum("silu_mul", gate_up, 2)
    out = torch.empty(rows, width, dtype=torch.bfloat16, device=gate_up.device)
    block, early = 256 if rows <= 16 else 1024, early_launch()
    sums = _sums(width, rows, group, gate_up.device)
    silu_mul_kernel[(rows, triton.cdiv(width, block))](
        gate_up, out, sums, width, size, splits, block, group, early, INTERP, num_warps=block // 256, launch_pdl=early
    )
    return out, sums


def _sums(width: int, rows: int, group: int, device: torch.device) -> Tensor:
    return torch.empty(width // group if group else 0, rows, dtype=torch.float32, device=device)


def summed_rms_norm(x: Tensor, weight: Tensor, eps: float, group: int) -> SummedRows:
    """As `rms_norm` of x [T, D], with the sums of its groups."""
    return SummedRows(*_rms_norm(x, weight, eps, group))


def summed_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: int
) -> tuple[SummedRows, Tensor]:
    """As `add_rms_norm`, with the sums of the groups of its normed half."""
    out, total, sums = _add_rms_norm(x, residual, weight, eps, group)
    return SummedRows(out, sums), total


def summed_silu_mul(gate_up: Tensor, group: int) -> SummedRows:
    """As `silu_mul`, with the sums of its groups."""
    return SummedRows(*_silu_mul(gate_up, group))


def rotation(positions: Tensor, cos_sin: Tensor) -> Tensor:
    """cos_sin float32 [max_position, D], rows of any stride."""
    if cos_sin.dtype != torch.float32 or cos_sin.stride(1) != 1:
        raise ValueError(
            f"rotation: impl 'triton' takes float32 with a contiguous last dimension, not {cos_sin.dtype} of strides "
            f"{cos_sin.stride()}"
        )
    d, early = cos_sin.shape[1], early_launch()
    turn = torch.empty(len(positions), 2, d, dtype=cos_sin.dtype, device=cos_sin.device)
    if len(positions):
        rotation_kernel[(len(positions),)](
            positions.contiguous(), cos_sin, turn, cos_sin.stride(0), d, next_power_of_2(d), early, num_warps=1,
            launch_pdl=early,
        )
    return turn


def rope(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k [T, Hkv, D] bf16 views whose last dimension is contiguous."""
    _check("rope", q, k)
    turned = []
    for x in (q, k):
        t, heads, d = x.shape
        out = torch.empty(t, heads, d, dtype=x.dtype, device=x.device)
        bh = min(8, next_power_of_2(heads))
        rope_kernel[(t, triton.cdiv(heads, bh))](
            x, turn, out, x.stride(0), x.stride(1), heads, d, bh, INTERP, num_warps=1
        )
        turned.append(out)
    return turned[0], turned[1]
