"""The ways back from each layout to codes, scales and zeros: what the reference reads, and rows that are looked up."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .weights import QuantizedWeight

PLANE_ROWS = 64  # output features in one contiguous tile of planes: the kernels' smallest BN
PAIR_GROUP = 128  # columns of int8 codes, the first half of which shares words with the second
CPU_ROWS = 64  # output features in one tile of ATen's int4 packing


class Held(Protocol):
    """What is read here of a `packed.PackedWeight`, which has these ways back as methods."""

    @property
    def format(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def data(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor | None: ...
    @property
    def group_size(self) -> int | None: ...


def unpack_plain(packed: Held) -> QuantizedWeight:
    return QuantizedWeight(packed.format, packed.data, None if packed.scale is None else packed.scale.float())


def unpack_planes(packed: Held) -> QuantizedWeight:
    assert packed.group_size is not None
    n, k = packed.shape
    words = packed.data.transpose(1, 2).reshape(-1, k // packed.group_size, 1, packed.group_size // 4)[:n]
    shifts = torch.arange(0, 16, 4, device=words.device, dtype=torch.int16).view(1, 1, 4, 1)
    codes = ((words >> shifts) & 15).to(torch.uint8).reshape(n, k)
    scale, zero = planes_grid(packed)
    return QuantizedWeight(packed.format, codes, scale[:n], zero[:n], packed.group_size)


def planes_grid(packed: Held) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero uint8 [N padded, K/G]."""
    assert packed.scale is not None
    words = packed.scale.t().contiguous()
    return (words & ~0xFF).view(torch.float32), (words & 0xFF).to(torch.uint8)


def unpack_pairs(packed: Held) -> QuantizedWeight:
    assert packed.scale is not None
    codes = _codes_of_pairs(packed.data, packed.shape[1]).contiguous()
    return QuantizedWeight(packed.format, codes, packed.scale.float())


def rows_of_pairs(packed: Held, index: Tensor) -> Tensor:
    """int8 codes [T, K] of rows `index`."""
    return _codes_of_pairs(packed.data[index], packed.shape[1])


def _codes_of_pairs(words: Tensor, k: int) -> Tensor:
    pairs = words.view(torch.int8).view(len(words), -1, PAIR_GROUP // 2, 2)
    return pairs.transpose(2, 3).reshape(len(words), -1)[:, :k]


@lru_cache(maxsize=1)
def nibble_rows() -> int:
    """ATen's int4 tile holds row r in the low and row r + rows in the high nibble; `rows` depends on the vector unit,
    so look once."""
    codes = (torch.arange(CPU_ROWS * 32, dtype=torch.int32).view(CPU_ROWS, 32) * 7 + 3) % 16
    tile = torch._convert_weight_to_int4pack_for_cpu(codes, 2)
    for rows in (32, 16, 8, 1):
        if torch.equal(_unpack_tiles(tile.view(-1), 32, rows), codes.to(torch.uint8)):
            return rows
    raise RuntimeError("this build of torch packs int4 weights for CPU in an unknown order; use impl='torch'")


def _unpack_tiles(data: Tensor, k: int, rows: int) -> Tensor:
    tiles = data.view(-1, k, rows)  # [N/(2*rows), K, rows]
    return torch.stack((tiles & 15, tiles >> 4), 1).permute(0, 1, 3, 2).reshape(-1, k)


def unpack_nibbles(packed: Held) -> QuantizedWeight:
    assert packed.scale is not None
    n, k = packed.shape
    high, low = _unpack_tiles(packed.data.view(-1), 2 * k, nibble_rows())[:n].to(torch.int16).split(k, 1)
    return QuantizedWeight("int8", ((high - 8) * 16 + low).to(torch.int8), packed.scale.float())


def rows_of_nibbles(packed: Held, index: Tensor) -> Tensor:
    """int8 codes [T, K] of rows `index`."""
    k, rows = packed.shape[1], nibble_rows()
    tiles = packed.data.view(-1, 2 * k, rows)
    pair = tiles[index // (2 * rows), :, index % rows]
    upper = (index % (2 * rows) >= rows)[:, None]
    high, low = torch.where(upper, pair >> 4, pair & 15).to(torch.int16).split(k, 1)
    return ((high - 8) * 16 + low).to(torch.int8)


def unpack_int4_cpu(packed: Held) -> QuantizedWeight:
    n, k = packed.shape
    scale, zero = int4pack_grid(packed)
    return QuantizedWeight(
        packed.format, _unpack_tiles(packed.data.view(-1), k, nibble_rows())[:n], scale[:n], zero[:n], packed.group_size
    )


def int4pack_grid(packed: Held) -> tuple[Tensor, Tensor]:
    """Scale float32 and zero uint8 [N padded, K/G]."""
    assert packed.scale is not None
    scale, offset = packed.scale.float().permute(2, 1, 0).contiguous()
    zero = torch.where(scale == 0, 0.0, 8 - offset / scale)  # a row of the padding has no scale
    return scale, zero.round_().to(torch.uint8)


def unpack_onednn8(packed: Held) -> QuantizedWeight:
    codes = packed.data.to_dense().t().contiguous()  # held as [K, N]
    return QuantizedWeight(packed.format, codes, packed.scale)


UNPACK: dict[str, Callable[[Held], QuantizedWeight]] = {
    "plain": unpack_plain,
    "planes": unpack_planes,
    "pairs": unpack_pairs,
    "mkldnn": lambda p: QuantizedWeight("bf16", p.data.to_dense()),
    "int8pack": unpack_plain,
    "nibbles": unpack_nibbles,
    "int4pack": unpack_int4_cpu,
    "onednn8": unpack_onednn8,
}
ROWS: dict[str, Callable[[Held, Tensor], Tensor]] = {
    "plain": lambda p, index: p.data[index],
    "pairs": rows_of_pairs,
    "int8pack": lambda p, index: p.data[index],
    "nibbles": rows_of_nibbles,
}
GRID: dict[str, Callable[[Held], tuple[Tensor, Tensor]]] = {"planes": planes_grid, "int4pack": int4pack_grid}
