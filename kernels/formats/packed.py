"""A weight in the layout of its device. `packing` makes it, `unpacking` has the ways back."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .unpacking import ROWS, UNPACK
from .weights import QuantizedWeight


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
        held = _nbytes(self.data)
        beside = (self.scale, self.nibble_scale, self.order, self.channel)
        return held + sum(part.nbytes for part in beside if part is not None)

    def to_plain(self) -> QuantizedWeight:
        """The canonical codes, scales and zeros."""
        return replace(UNPACK[self.layout](self), order=self.order)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] as a dense matrix."""
        return self.to_plain().dequantize(dtype)

    def rows(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `index` int64 [T] as a dense [T, K]: an embedding looked up in the table that also serves as lm_head.

        ValueError for layouts that do not keep a row together.
        """
        if self.layout not in ROWS:
            raise ValueError(f"rows: layout {self.layout!r} does not keep rows together; {', '.join(ROWS)} do")
        found = ROWS[self.layout](self, index).to(dtype)
        return found if self.scale is None else found * self.scale[index, None].to(dtype)


def _nbytes(data: Tensor) -> int:
    """Of a packing by oneDNN what is really held: blocks filled up with zeros, and what int8 products add to sums."""
    return torch.ops.mkldnn._nbytes(data) if data.is_mkldnn else data.nbytes


def pad_rows(x: Tensor, multiple: int) -> Tensor:
    rows = -x.shape[0] % multiple
    return torch.nn.functional.pad(x, (0, 0, 0, rows)) if rows else x
