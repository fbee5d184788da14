"""y = x @ weight.T + bias for a weight in any format: the operation, its implementations, and which variant runs at
which M."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose
from ..formats.packed import PackedWeight
from ..formats.unpacking import nibble_rows
from ..formats.weights import weight_format
from ..rows.activations import Activations, Operand, SummedRows, codes_for
from ..rows.rounding import quantize_rows

# ATen's packed CPU kernels win while reading the weights dominates; above this many rows, dequantizing blocks of them
# into a small bf16 buffer and multiplying by oneDNN does. Measured from 2048 x 384 to 4096 x 4096 on a 2-core Zen 4; no
# second copy of the weights is kept.
CPU_PACKED_ROWS = {"int8": 16, "int4": 256, "nibbles": 16}
INT8PACK_FEATURES = 16  # _weight_int8pack_mm reads so many at a time, past the end of its operands for another K
_SIGN_BIT, _NO_ZERO = torch.tensor(128, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)
CPU_BLOCK_ELEMENTS = 1 << 21  # weights dequantized at a time: 4 MB of bf16, which stays in the cache


def linear(
    x: Operand, weight: PackedWeight, bias: Tensor | None = None, *, partial: bool = False, impl: str = "auto"
) -> Tensor:
    """x [..., K] times weight [N, K] plus bias [N] -> [..., N] in x's dtype.

    partial: where the kernel splits K, return its float32 partials [S, M, N] for a consumer that sums them as it reads
    (`add_rms_norm`, `silu_mul`, `rope_write`), which saves a pass and a launch; elsewhere it changes nothing.

    impl "torch": any floating x; "aten" and "triton": bfloat16 x. For w8a8, fp8 and w4a8 weights x may come in 8 bits;
    if not, `codes_for` says by the number of rows whether it is rounded here. For int4 x may come with the sums
    of its groups. `operands` makes x in the form that is best for a weight. ValueError for shapes, dtypes or
    devices that do not fit.
    """
    n, k = weight.shape
    if x.shape[-1] != k:
        raise ValueError(f"linear: x has {x.shape[-1]} features, the weight [{n}, {k}] takes {k}")
    if x.device != weight.device:
        raise ValueError(f"linear: x is on {x.device}, the weight on {weight.device}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"linear: bias must be [{n}], not {list(bias.shape)}")
    run = choose("linear", LINEAR, impl, x.device)
    if run is not _torch and x.dtype != torch.bfloat16:
        raise ValueError(f"linear: impl {impl!r} computes in bfloat16, x is {x.dtype}; use impl='torch'")
    y: Tensor = run(_rows(x, weight, impl, reference=run is _torch), weight, bias, partial)
    return y if y.dim() == 3 else y.view(*x.shape[:-1], n)


def _rows(x: Operand, weight: PackedWeight, impl: str, *, reference: bool) -> Operand:
    """x as [M, K], in the codes that the weight's format wants for M rows."""
    if isinstance(x, SummedRows):
        if weight.group_size is None or x.sums.shape != (x.shape[1] // weight.group_size, x.shape[0]):
            raise ValueError(f"linear: sums {tuple(x.sums.shape)} are not those of groups of {weight.group_size}")
        wide = codes_for(weight, x.shape[0]) is None
        if weight.layout == "planes" and weight.order is None and wide and not reference:
            return x
        x = x.x
    if isinstance(x, Activations):
        if x.codes.dtype != weight_format(weight.format).activations:
            raise ValueError(f"linear: activations of {x.codes.dtype} do not go with weights of {weight.format}")
        eight = x.rows()
        if weight.order is not None and not reference:
            eight = replace(eight, codes=eight.codes.index_select(1, weight.order))
        return eight
    rows = x.reshape(-1, x.shape[-1])
    if weight.order is not None and not reference:  # the reference puts the weight's columns back instead
        rows = rows.index_select(1, weight.order)
    codes = codes_for(weight, rows.shape[0])
    return rows if codes is None else quantize_rows(rows, codes, impl=impl)


def _torch(x: Operand, weight: PackedWeight, bias: Tensor | None, partial: bool) -> Tensor:
    plain = weight.to_plain()
    if isinstance(x, Activations):
        x, plain = x.dequantize(), plain.requantized() if weight_format(weight.format).grouped else plain
    x = x.x if isinstance(x, SummedRows) else x
    return F.linear(x, plain.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))


def _aten(x: Operand, weight: PackedWeight, bias: Tensor | None, partial: bool) -> Tensor:
    operators, key = (_ATEN_8_BIT, weight.format) if isinstance(x, Activations) else (_ATEN, weight.layout)
    run = operators.get(key)
    if run is None:
        raise ValueError(f"linear: impl 'aten' has no operator for the layout {weight.layout!r}")
    y = run(x.contiguous() if isinstance(x, Tensor) else x, weight)
    return y if bias is None else y.add_(bias)


def _mkldnn(x: Tensor, weight: PackedWeight) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight.data, None, "none", [], "")


def _plain(x: Tensor, weight: PackedWeight) -> Tensor:
    return _e4m3(x, weight) if weight.format == "fp8" else F.linear(x, weight.data)


def _e4m3(x: Tensor, weight: PackedWeight) -> Tensor:
    """ATen's own fp8 product takes ten times as long on a CPU: codes become bf16 in blocks, exactly, and oneDNN
    multiplies. The conversion costs more than the bytes save: on a CPU fp8 saves memory, not time."""
    assert weight.scale is not None
    n, k = weight.shape
    rows = max(64, CPU_BLOCK_ELEMENTS // k)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    for block in range(0, n, rows):
        codes = widen_e4m3(weight.data[block : block + rows])
        torch.mul(F.linear(x, codes), weight.scale[block : block + rows], out=y[:, block : block + rows])
    return y


def widen_e4m3(codes: Tensor) -> Tensor:
    """Finite e4m3 as bf16, exactly, by moving bits: sign to sign, exponent and mantissa under an exponent bias that is
    120 larger, which the product makes up for. Many times as fast as ATen's conversion."""
    moved = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(4)  # the sign filled the upper byte
    return moved.bitwise_and_(-0x7810).view(torch.bfloat16).mul_(2.0**120)  # 0x87F0: sign, 4 and 3 bits


def _w8a8_aten(x: Activations, weight: PackedWeight) -> Tensor:
    assert weight.scale is not None
    if weight.layout == "onednn8":
        y = _onednn8(x.codes, weight.data, weight.scale)
    else:
        y = torch._int_mm(x.codes, weight.data.t()).to(torch.float32).mul_(weight.scale)
    return y.mul_(x.scale[:, None]).to(x.dtype)


def _onednn8(codes: Tensor, data: Tensor, scale: Tensor) -> Tensor:
    """float32 [M, N]: int8 codes [M, K] times packed ones, whose output channels are scaled. oneDNN is fast with
    unsigned codes alone: with another sign bit they are those codes under a zero point of 128."""
    unsigned = codes.view(torch.uint8).bitwise_xor(_SIGN_BIT)
    return torch.ops.onednn.qlinear_pointwise(
        unsigned, 1.0, 128, data, scale, _NO_ZERO, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _w4a8_aten(x: Activations, weight: PackedWeight) -> Tensor:
    """Blocks of the weight become int8 as in the reference, so that only the product is another."""
    assert weight.scale is not None
    (m, k), (n, _), rows = x.shape, weight.shape, 2 * nibble_rows()
    tiles = weight.data.view(-1, rows * k // 2)
    step = max(1, CPU_BLOCK_ELEMENTS // (rows * k))
    y = torch.empty(m, len(tiles) * rows, dtype=torch.float32)
    for first in range(0, len(tiles), step):
        count = len(tiles[first : first + step]) * rows
        at = slice(first * rows, first * rows + count)
        block = replace(weight, data=tiles[first : first + step], scale=weight.scale[:, at], shape=(count, k))
        eight = block.to_plain().requantized()
        assert eight.scale is not None
        torch.mul(torch._int_mm(x.codes, eight.codes.t()), eight.scale, out=y[:, at])
    return y[:, :n].mul_(x.scale[:, None]).to(x.dtype)


def _fp8_aten(x: Activations, weight: PackedWeight) -> Tensor:
    return _e4m3(widen_e4m3(x.codes), weight).mul_(x.scale[:, None]).to(x.dtype)


def _int8pack(x: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.scale is not None
    n, k = weight.shape
    if x.shape[0] <= CPU_PACKED_ROWS["int8"] and k % INT8PACK_FEATURES == 0:
        return torch._weight_int8pack_mm(x, weight.data, weight.scale)
    rows = max(64, CPU_BLOCK_ELEMENTS // k)
    y = torch.empty(x.shape[0], n, dtype=x.dtype)
    for block in range(0, n, rows):  # the scale is applied to the product, so a block costs one conversion
        codes = weight.data[block : block + rows].to(x.dtype)
        torch.mul(F.linear(x, codes), weight.scale[block : block + rows], out=y[:, block : block + rows])
    return y


def _nibbles(x: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.group_size is not None and weight.scale is not None and weight.nibble_scale is not None
    (m, k), (n, _), rows = x.shape, weight.shape, nibble_rows()
    if m <= CPU_PACKED_ROWS["nibbles"]:
        twice = torch.cat((x, x), 1)
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            twice, weight.data, weight.group_size, weight.nibble_scale
        )
        return y[:, :n].mul_(weight.scale)
    high, low = weight.data.view(-1, 2 * k, rows).split(k, 1)  # of 2 * rows features, half in each nibble
    step = max(1, CPU_BLOCK_ELEMENTS // (2 * rows * k))
    dense = torch.empty(min(step, len(high)), k, 2 * rows, dtype=x.dtype)
    y = torch.empty(len(high), m, 2 * rows, dtype=x.dtype)
    for first in range(0, len(high), step):
        h, part = high[first : first + step], low[first : first + step]
        w = dense[: len(h)]
        w[..., :rows].copy_(h << 4 | part & 15)  # code + 128
        w[..., rows:].copy_(h & 240 | part >> 4)
        torch.bmm(x.expand(len(h), m, k), w.sub_(128), out=y[first : first + step])
    return y.transpose(0, 1).reshape(m, -1)[:, :n].mul_(weight.scale)


def _int4pack(x: Tensor, weight: PackedWeight) -> Tensor:
    assert weight.group_size is not None and weight.scale is not None
    (m, k), (n, _), rows = x.shape, weight.shape, nibble_rows()
    if m <= CPU_PACKED_ROWS["int4"]:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight.data, weight.group_size, weight.scale)[:, :n]
    tiles = weight.data.view(-1, k, rows)  # a tile is [K, 2 * rows] of the transposed weight, half in each nibble
    scale, offset = weight.scale.view(k // weight.group_size, len(tiles), 1, 2 * rows, 2).transpose(0, 1).unbind(-1)
    step = max(1, CPU_BLOCK_ELEMENTS // (2 * rows * k))
    dense = torch.empty(min(step, len(tiles)), k, 2 * rows, dtype=x.dtype)
    y = torch.empty(len(tiles), m, 2 * rows, dtype=x.dtype)
    for first in range(0, len(tiles), step):
        block = tiles[first : first + step]
        w = dense[: len(block)]
        w[..., :rows].copy_(block & 15)
        w[..., rows:].copy_(block >> 4)
        grouped = w.sub_(8).unflatten(1, (-1, weight.group_size))
        torch.addcmul(offset[first : first + step], grouped, scale[first : first + step], out=grouped)
        torch.bmm(x.expand(len(block), m, k), w, out=y[first : first + step])
    return y.transpose(0, 1).reshape(m, -1)[:, :n]


_ATEN: dict[str, Callable[..., Tensor]] = {
    "plain": _plain,
    "mkldnn": _mkldnn,
    "int8pack": _int8pack,
    "nibbles": _nibbles,
    "int4pack": _int4pack,
}
_ATEN_8_BIT: dict[str, Callable[..., Tensor]] = {"w8a8": _w8a8_aten, "fp8": _fp8_aten, "w4a8": _w4a8_aten}


def _triton(x: Operand, weight: PackedWeight, bias: Tensor | None, partial: bool) -> Tensor:
    from .matmul_triton import linear_triton

    return linear_triton(x, weight, bias, partial)


LINEAR = {"torch": _torch, "aten": _aten, "triton": _triton}
