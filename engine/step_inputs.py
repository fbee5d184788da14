"""A scheduled batch as arrays: built on the host, sent to the device in one copy whose size follows the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import ScheduledRequest

Arrays = dict[str, NDArray[Any]]
_ALIGN = 16  # bytes: any dtype may begin there


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step on the device: T tokens of B sequences, the first `num_decodes` of them with one token each.

    tokens, positions, slots: int64 [T]; a slot is block * block_size + offset in the KV pool.
    block_tables: int32 [B, max_blocks]. lengths: int32 [B], tokens of each sequence once this step is written.
    query_starts: int32 [B - num_decodes + 1], where each prompt chunk begins, counted from the first chunk's begin.
    rows: int64 [S], the tokens whose hidden state is wanted.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    lengths: Tensor
    query_starts: Tensor
    rows: Tensor
    num_decodes: int


def step_arrays(items: Sequence[ScheduledRequest], num_decodes: int, block_size: int) -> Arrays:
    """The fields of StepInputs as arrays; `rows` holds the last token of each item that samples, in order.

    token_range is read once per item; everything per token is arithmetic on whole arrays.
    """
    tokens: list[int] = []
    for request, start, num_new in items:
        tokens += request.token_range(start, start + num_new)
    counts = np.array([item.num_new for item in items], np.int64)
    starts = np.array([item.start for item in items], np.int64)
    lengths = starts + counts
    ends = counts.cumsum()
    tables = _block_tables(items, lengths, block_size)
    if ends[-1] == len(items):  # one token each: nothing to repeat
        owners, positions = np.arange(len(items)), starts
    else:
        owners = np.arange(len(items)).repeat(counts)
        positions = np.arange(ends[-1]) + (starts - ends + counts).repeat(counts)
    samples = [i for i, item in enumerate(items) if item.samples]
    query_ends = ends[num_decodes - 1 :] if num_decodes else np.concatenate(([0], ends))
    return {
        "tokens": np.array(tokens, np.int64),
        "positions": positions,
        "slots": tables[owners, positions // block_size] * np.int64(block_size) + positions % block_size,
        "block_tables": tables,
        "lengths": lengths.astype(np.int32),
        "query_starts": (query_ends - num_decodes).astype(np.int32),
        "rows": ends[samples] - 1,
    }


def _block_tables(items: Sequence[ScheduledRequest], lengths: NDArray[np.int64], block_size: int) -> NDArray[np.int32]:
    """int32 [B, longest], zero behind each sequence's last block."""
    held = (-(-lengths // block_size)).tolist()
    tables = np.zeros((len(items), max(held)), np.int32)
    for row, item, count in zip(tables, items, held, strict=True):
        row[:count] = item.request.block_ids[:count]
    return tables


class Staging:
    """Host arrays to device tensors, all in one copy.

    On a GPU the arrays are laid side by side in pinned memory and copied without blocking; the buffer is written again
    only after that copy has ended. On a CPU the tensors share the arrays' memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def __call__(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        if self.device.type == "cpu":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        return self.copy(arrays)

    def copy(self, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
        """The arrays side by side in one buffer on the device, each behind a view of its own dtype and shape."""
        offsets, total = lay_out(arrays)
        pinned = self._buffer(total)
        host = pinned.numpy()
        for name, array in arrays.items():
            host[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        moved = pinned[:total].to(self.device, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        return {name: view_as(moved, offsets[name], array) for name, array in arrays.items()}

    def _buffer(self, size: int) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        if self._pinned is None or self._pinned.numel() < size:
            on_gpu = self.device.type == "cuda"
            self._pinned = torch.empty(max(size, 1 << 16) * 2, dtype=torch.uint8, pin_memory=on_gpu)
            self._copied = torch.cuda.Event() if on_gpu else None
        return self._pinned


def lay_out(arrays: Mapping[str, NDArray[Any]]) -> tuple[dict[str, int], int]:
    """Byte offsets of arrays side by side in one buffer, and the buffer's size."""
    offsets, total = {}, 0
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // _ALIGN) * _ALIGN
    return offsets, total


def view_as(moved: Tensor, offset: int, array: NDArray[Any]) -> Tensor:
    """The bytes of `moved` from `offset` on, with dtype and shape of `array`."""
    dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return moved[offset : offset + array.nbytes].view(dtype).view(array.shape)
