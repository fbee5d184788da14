"""Device layouts of a weight: what `linear` reads.

plain     [N, K] as it is (bf16, w8a8 and fp8 on CUDA, fp8 on CPU), scale [N]: float32 for fp8, else bf16
planes    int4 and w4a8 on CUDA, see `pack_planes`
pairs     int8 on CUDA, see `pack_pairs`
mkldnn    bf16 on CPU, oneDNN's own blocking
int8pack  int8 and w8a8 on CPU, [N, K] int8 and bf16 scale [N], for torch._weight_int8pack_mm
nibbles   int8 on CPU where that operator is slow, see `_pack_nibbles`
int4pack  int4 and w4a8 on CPU, [N/64, K, 32] uint8 and bf16 (scale, zero) [K/G, N, 2], for torch's
          _weight_int4pack_mm_for_cpu
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from .weights import QuantizedWeight, channel_scales, check_groups, quantize_weight, weight_format

PLANE_ROWS = 64  # output features in one contiguous tile of planes: the kernels' smallest BN
PAIR_GROUP = 128  # columns of int8 codes, the first half of which shares words with the second
NIBBLES_ABOVE = 8 << 20  # int8 elements: a weight with short rows that comes from memory, not from a cache
_CPU_ROWS = 64  # the same for ATen's CPU int4 packing


@dataclass(frozen=True)
class PackedWeight:
    """A weight [N, K] in the layout of its device. `data` and `scale` are read by kernels; everything else goes through
    `to_plain`. `order` is that of `QuantizedWeight`: `linear` gathers x by it before a kernel runs. `channel` float32
    [N] (padded as the codes) is the scale of w4a8's int8 form."""

    format: str
    layout: str
    shape: tuple[int, int]
    data: Tensor
    scale: Tensor | None = None
    group_size: int | None = None
    nibble_scale: Tensor | None = None  # of the layout "nibbles"
    order: Tensor | None = None
    channel: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes held, padding and scales included."""
        held = self.data.numel() * self.data.element_size()  # not .nbytes: an mkldnn tensor has no strides to tell it
        beside = (self.scale, self.nibble_scale, self.order, self.channel)
        return held + sum(part.nbytes for part in beside if part is not None)

    def to_plain(self) -> QuantizedWeight:
        """The canonical codes, scales and zeros."""
        return replace(_UNPACK[self.layout](self), order=self.order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as a dense matrix."""
        return self.to_plain().dequantize(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `index` int64 [T] as a dense [T, K]: an embedding looked up in the table that also serves as lm_head.

        ValueError for layouts that do not keep a row together.
        """
        if self.layout not in _ROWS:
            raise ValueError(f"rows: layout {self.layout!r} does not keep rows together; {', '.join(_ROWS)} do")
        found = _ROWS[self.layout](self, index).to(dtype)
        return found if self.scale is None else found * self.scale[index, None].to(dtype)


def _pad_rows(x: Tensor, multiple: int) -> Tensor:
    rows = -x.shape[0] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, rows)) if rows else x


# planes: 4 bits on CUDA


def pack_planes(weight: QuantizedWeight) -> PackedWeight:
    """4-bit codes as int16 words whose tile has the shape and width of a bf16 operand of the tensor core.

        word[n, g, i] = code[k0+i] | code[k0+G/4+i] << 4 | code[k0+2G/4+i] << 8 | code[k0+3G/4+i] << 12
        with k0 = g*G and i < G/4

    Tiles of 64 output features are contiguous: [N/64, K/G, 64, G/4] int16, N padded with zero scales. The scale [K/G,
    N] int32 holds the float32 scale in its upper 24 bits (16 significant bits: exact for any bf16 or fp16 scale) and
    the zero point in the lower 8.
    """
    assert weight.scale is not None and weight.zero is not None and weight.group_size is not None
    n, k = weight.shape
    g = weight.group_size
    codes = _pad_rows(weight.codes, PLANE_ROWS)
    c = codes.view(-1, k // g, 4, g // 4).to(torch.int16)
    words = c[:, :, 0] | c[:, :, 1] << 4 | c[:, :, 2] << 8 | c[:, :, 3] << 12
    words = words.view(-1, PLANE_ROWS, k // g, g // 4).transpose(1, 2).contiguous()
    bits = (weight.scale.float().view(torch.int32) + 0x80) & ~0xFF
    scale = _pad_rows(bits | weight.zero.to(torch.int32), PLANE_ROWS).t().contiguous()
    return PackedWeight(weight.format, "planes", (n, k), words, scale, g)


def unpack_planes(packed: PackedWeight) -> QuantizedWeight:
    assert packed.group_size is not None
    n, k = packed.shape
    words = packed.data.transpose(1, 2).reshape(-1, k // packed.group_size, 1, packed.group_size // 4)[:n]
    shifts = torch.arange(0, 16, 4, device=words.device, dtype=torch.int16).view(1, 1, 4, 1)
    codes = ((words >> shifts) & 15).to(torch.uint8).reshape(n, k)
    scale, zero = _planes_grid(packed)
    return QuantizedWeight(packed.format, codes, scale[:n], zero[:n], packed.group_size)


def _planes_grid(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero uint8 [N padded, K/G]."""
    assert packed.scale is not None
    words = packed.scale.t().contiguous()
    return (words & ~0xFF).view(torch.float32), (words & 0xFF).to(torch.uint8)


# pairs: int8 on CUDA


def pack_pairs(weight: QuantizedWeight) -> PackedWeight:
    """int8 codes as int16 words [N, K/2] whose tile has the shape and width of a bf16 operand of the tensor core.

        word[n, g, i] = (code[k0+i] & 255) | code[k0+64+i] << 8       with k0 = 128 g and i < 64

    K is padded with zeros to whole groups of 128. A row is as long and as contiguous as in plain codes, and its groups
    are the lines of 128 bytes that kernels read. The scale [N] is bf16.
    """
    assert weight.scale is not None
    codes, columns = weight.codes, -weight.shape[1] % PAIR_GROUP
    codes = torch.nn.functional.pad(codes, (0, columns)) if columns else codes
    pairs = codes.view(len(codes), -1, 2, PAIR_GROUP // 2).transpose(2, 3).contiguous()
    words = pairs.view(torch.int16).view(len(codes), -1)  # the first byte is the low one
    return PackedWeight(weight.format, "pairs", weight.shape, words, weight.scale.bfloat16())


def _pair_rows(packed: PackedWeight, index: Tensor) -> Tensor:
    """int8 codes [T, K] of rows `index`."""
    return _codes_of_pairs(packed.data[index], packed.shape[1])


def _codes_of_pairs(words: Tensor, k: int) -> Tensor:
    pairs = words.view(torch.int8).view(len(words), -1, PAIR_GROUP // 2, 2)
    return pairs.transpose(2, 3).reshape(len(words), -1)[:, :k]


def _unpack_pairs(packed: PackedWeight) -> QuantizedWeight:
    assert packed.scale is not None
    codes = _codes_of_pairs(packed.data, packed.shape[1]).contiguous()
    return QuantizedWeight(packed.format, codes, packed.scale.float())


# CPU: ATen's packings


@lru_cache(maxsize=1)
def has_mkldnn_linear() -> bool:
    """Whether this build of torch has oneDNN's prepacked bf16 linear."""
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


@lru_cache(maxsize=1)
def nibble_rows() -> int:
    """ATen's int4 tile holds row r in the low and row r + rows in the high nibble; `rows` depends on the vector unit,
    so look once."""
    codes = (torch.arange(_CPU_ROWS * 32, dtype=torch.int32).view(_CPU_ROWS, 32) * 7 + 3) % 16
    tile = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    for rows in (32, 16, 8, 1):
        if torch.equal(_unpack_tiles(tile.view(-1), 32, rows), codes.to(torch.uint8)):
            return rows
    raise RuntimeError("this build of torch packs int4 weights for CPU in an unknown order; use impl='torch'")


def _unpack_tiles(data: Tensor, k: int, rows: int) -> Tensor:
    tiles = data.view(-1, k, rows)  # [N/(2*rows), K, rows]
    return torch.stack((tiles & 15, tiles >> 4), 1).permute(0, 1, 3, 2).reshape(-1, k)


def _pack_nibbles(weight: QuantizedWeight) -> PackedWeight:
    """int8 codes as two int4 planes side by side, [N, 2K]: code = 16 * high + low, high in -8..7, low in 0..15.

    ATen's int4 operator streams its tiles in the order it reads them, its int8 operator takes four short rows at once:
    from memory, at K = 896 and one row of x, the first needs half the time at N = 151,936 and three quarters of it at
    N = 9,728, for the same bytes (2-core Zen 4). Both planes are exact in
    bf16 and summed in float32, so the product is that of the int8 codes.
    """
    assert weight.scale is not None
    n, k = weight.shape
    g = _nibble_group(k)
    codes = _pad_rows(weight.codes.to(torch.int32), _CPU_ROWS)
    data = torch._convert_weight_to_int4pack_for_cpu(torch.cat(((codes >> 4) + 8, codes & 15), 1), 2)
    high, low = torch.tensor([16.0, 0.0]), torch.tensor([1.0, 8.0])  # ATen: w = (code - 8) * scale + offset
    planes = torch.stack((high, low)).repeat_interleave(k // g, 0)
    scale = planes[:, None].expand(-1, len(codes), -1).bfloat16().contiguous()
    return PackedWeight("int8", "nibbles", (n, k), data, weight.scale.bfloat16(), g, scale)


def _nibble_group(k: int) -> int:
    """The largest group ATen takes that divides K, 0 where none does."""
    return next((g for g in (256, 128, 64, 32) if k % g == 0), 0)


def _nibble_rows(packed: PackedWeight, index: Tensor) -> Tensor:
    """int8 codes [T, K] of rows `index`."""
    k, rows = packed.shape[1], nibble_rows()
    tiles = packed.data.view(-1, 2 * k, rows)
    pair = tiles[index // (2 * rows), :, index % rows]
    upper = (index % (2 * rows) >= rows)[:, None]
    high, low = torch.where(upper, pair >> 4, pair & 15).to(torch.int16).split(k, 1)
    return ((high - 8) * 16 + low).to(torch.int8)


def _unpack_nibbles(packed: PackedWeight) -> QuantizedWeight:
    assert packed.scale is not None
    n, k = packed.shape
    high, low = _unpack_tiles(packed.data.view(-1), 2 * k, nibble_rows())[:n].to(torch.int16).split(k, 1)
    return QuantizedWeight("int8", ((high - 8) * 16 + low).to(torch.int8), packed.scale.float())


def _pack_int4_cpu(weight: QuantizedWeight) -> PackedWeight:
    assert weight.scale is not None and weight.zero is not None and weight.group_size is not None
    codes = _pad_rows(weight.codes, _CPU_ROWS).to(torch.int32)
    data = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    scale = _pad_rows(weight.scale, _CPU_ROWS)
    offset = (8 - _pad_rows(weight.zero, _CPU_ROWS).float()) * scale  # ATen: w = (code - 8) * scale + offset
    return PackedWeight(
        weight.format,
        "int4pack",
        weight.shape,
        data,
        torch.stack((scale.t(), offset.t()), -1).bfloat16().contiguous(),
        weight.group_size,
    )


def _unpack_int4_cpu(packed: PackedWeight) -> QuantizedWeight:
    n, k = packed.shape
    scale, zero = int4pack_grid(packed)
    return QuantizedWeight(
        packed.format, _unpack_tiles(packed.data.view(-1), k, nibble_rows())[:n], scale[:n], zero[:n], packed.group_size
    )


def int4pack_grid(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero uint8 [N padded, K/G]."""
    assert packed.scale is not None
    scale, offset = packed.scale.float().permute(2, 1, 0).contiguous()
    zero = torch.where(scale == 0, 0.0, 8 - offset / scale)  # a row of the padding has no scale
    return scale, zero.round_().to(torch.uint8)


# choosing


def _plain(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(
        weight.format, "plain", weight.shape, weight.codes.contiguous(),
        None if weight.scale is None else weight.scale.to(weight_format(weight.format).scale_dtype),
    )


def _pack_mkldnn(weight: QuantizedWeight) -> PackedWeight:
    return PackedWeight(
        "bf16", "mkldnn", weight.shape, torch.ops.mkldnn._reorder_linear_weight(weight.codes.contiguous())
    )


def _unpack_plain(packed: PackedWeight) -> QuantizedWeight:
    return QuantizedWeight(packed.format, packed.data, None if packed.scale is None else packed.scale.float())


_PACK = {
    "plain": _plain,
    "planes": pack_planes,
    "pairs": pack_pairs,
    "mkldnn": _pack_mkldnn,
    "int8pack": lambda w: _relabel(_plain(w)),
    "nibbles": _pack_nibbles,
    "int4pack": _pack_int4_cpu,
}
_UNPACK = {
    "plain": _unpack_plain,
    "planes": unpack_planes,
    "pairs": _unpack_pairs,
    "mkldnn": lambda p: QuantizedWeight("bf16", p.data.to_dense()),
    "int8pack": _unpack_plain,
    "nibbles": _unpack_nibbles,
    "int4pack": _unpack_int4_cpu,
}
_ROWS: dict[str, Callable[[PackedWeight, Tensor], Tensor]] = {
    "plain": lambda p, index: p.data[index],
    "pairs": _pair_rows,
    "int8pack": lambda p, index: p.data[index],
    "nibbles": _nibble_rows,
}
_GRID: dict[str, Callable[[PackedWeight], tuple[Tensor, Tensor]]] = {"planes": _planes_grid, "int4pack": int4pack_grid}


def _relabel(packed: PackedWeight) -> PackedWeight:
    return PackedWeight(packed.format, "int8pack", packed.shape, packed.data, packed.scale)


def device_layout(format: str, device: torch.device, shape: tuple[int, int]) -> str:
    """The layout that the fast path of a device reads for a weight of that shape."""
    n, k = shape
    if device.type == "cpu":
        if format == "int8" and n * k > NIBBLES_ABOVE and k < 2048 and _nibble_group(k):
            return "nibbles"
        layouts = {"int8": "int8pack", "int4": "int4pack", "w8a8": "int8pack", "fp8": "plain", "w4a8": "int4pack"}
        return layouts.get(format) or ("mkldnn" if has_mkldnn_linear() else "plain")
    return "planes" if weight_format(format).grouped else "pairs" if format == "int8" else "plain"


def pack_weight(
    weight: Tensor | QuantizedWeight, format: str, *, group_size: int = 128, device: torch.device | str,
    layout: str | None = None,
) -> PackedWeight:
    """Quantize (a floating [N, K] tensor) and lay out a weight for `linear` on `device`.

    layout: one of the names above instead of the device's own (tests pack planes on the CPU for the interpreter).
    ValueError: as `quantize_weight`; a QuantizedWeight of another format; fp8 for a GPU that has no fp8.
    """
    device = torch.device(device)
    weight_format(format)
    if format == "fp8" and device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"fp8 needs a GPU of compute capability 8.9 or later, this one has {found[0]}.{found[1]}; w8a8 takes the "
            "same bytes"
        )
    if isinstance(weight, Tensor):
        weight = quantize_weight(weight.to(device), format, group_size)
    elif weight.format != format:
        raise ValueError(f"the weight is quantized as {weight.format!r}, not {format!r}")
    if weight.group_size is not None:
        check_groups(weight.shape[1], weight.group_size)
    moved = [None if t is None else t.to(device) for t in (weight.codes, weight.scale, weight.zero)]
    assert moved[0] is not None
    packed = _PACK[layout or device_layout(format, device, weight.shape)](
        QuantizedWeight(format, moved[0], moved[1], moved[2], weight.group_size)
    )
    if format == "w4a8":
        packed = replace(packed, channel=channel_scales(*_GRID[packed.layout](packed)))
    return packed if weight.order is None else replace(packed, order=weight.order.to(device))


def random_weight(n: int, k: int, std: float, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """A Gaussian [n, k] bfloat16 weight drawn on `device`, for synthetic models; `generator` must live there too."""
    return torch.empty(n, k, dtype=torch.bfloat16, device=device).normal_(0.0, std, generator=generator)
