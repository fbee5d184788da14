"""A scheduled batch as arrays: built on the host, sent to the device in one copy whose size follows the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.request import Request
from engine.scheduling.batch import ScheduledRequest

Arrays = dict[str, NDArray[Any]]
_ALIGN = 16  # bytes: any dtype may begin there
_DTYPES = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32, np.float64: torch.float64}


def step_arrays(
    items: Sequence[ScheduledRequest], num_decodes: int, block_size: int, tables: BlockTables | None = None
) -> Arrays:
    """The fields of StepInputs as arrays; `rows` holds the last token of each item that samples, in order.

    token_range is read once per item; everything per token is arithmetic on whole arrays. A pending token is 0: see
    `feed_rows`. `tables` remembers block tables from step to step, with the same result.
    """
    tokens: list[int] = []
    for request, start, num_new in items:
        tokens += request.token_range(start, start + num_new) if not request.num_pending else (0,)
    counts = np.array([item.num_new for item in items], np.int64)
    starts = np.array([item.start for item in items], np.int64)
    lengths = starts + counts
    ends = counts.cumsum()
    held = -(-lengths // block_size)
    table = block_tables(items, held) if tables is None else tables(items, held)
    if ends[-1] == len(items):  # one token each: nothing to repeat
        owners, positions = np.arange(len(items)), starts
    else:
        owners = np.arange(len(items)).repeat(counts)
        positions = np.arange(ends[-1]) + (starts - ends + counts).repeat(counts)
    samples = [*range(num_decodes), *(i for i in range(num_decodes, len(items)) if items[i].samples)]
    query_ends = ends[num_decodes - 1 :] if num_decodes else np.concatenate(([0], ends))
    return {
        "tokens": np.array(tokens, np.int64),
        "positions": positions,
        "slots": table[owners, positions // block_size] * np.int64(block_size) + positions % block_size,
        "block_tables": table,
        "lengths": lengths.astype(np.int32),
        "query_starts": (query_ends - num_decodes).astype(np.int32),
        "rows": ends[samples] - 1,
    }


def prompt_arrays(item: ScheduledRequest, block_size: int) -> Arrays:
    """`step_arrays` of a single prompt chunk, whose first token waits for this: nothing is looked up token by token."""
    request, start, num_new = item
    stop = start + num_new
    table = np.array([request.block_ids[: -(-stop // block_size)]], np.int32)
    first = start // block_size
    slots = table[0, first:, None] * np.int64(block_size) + np.arange(block_size)
    return {
        "tokens": np.array(request.token_range(start, stop), np.int64),
        "positions": np.arange(start, stop),
        "slots": slots.ravel()[start - first * block_size : stop - first * block_size],
        "block_tables": table,
        "lengths": np.array([stop], np.int32),
        "query_starts": np.array([0, num_new], np.int32),
        "rows": np.array([num_new - 1] if item.samples else [], np.int64),
    }


def inert_prompts(count: int, length: int, block_size: int) -> Arrays:
    """A step of `count` prompts of `length` tokens that writes nothing: every slot is -1. It reads block 0."""
    return {
        "tokens": np.zeros(count * length, np.int64),
        "positions": np.tile(np.arange(length), count),
        "slots": np.full(count * length, -1, np.int64),
        "block_tables": np.zeros((count, -(-length // block_size)), np.int32),
        "lengths": np.full(count, length, np.int32),
        "query_starts": np.arange(0, (count + 1) * length, length, dtype=np.int32),
        "rows": np.arange(1, count + 1) * length - 1,
    }


def feed_rows(
    decodes: Sequence[ScheduledRequest], num_tokens: int, sampled: Sequence[Request], room: int
) -> NDArray[np.int64] | None:
    """Where each of the step's tokens comes from, int64 [num_tokens], or None where the host knows them all.

    Only decodes can have pending tokens, and they come first. `sampled` are the requests that the step before sampled
    for, in order. An entry below `room` is the row of such a
    pending token on the device; entry room + i stands for token i of this step's own arrays.
    """
    requests = [item[0] for item in decodes]
    pending = [request.num_pending for request in requests]
    if not any(pending):
        return None
    feed = np.arange(room, room + num_tokens)
    if requests == sampled and all(pending):
        feed[: len(requests)] = np.arange(len(requests))
        return feed
    at = {request: row for row, request in enumerate(sampled)}
    for i, waits in enumerate(pending):
        if waits:
            feed[i] = at[requests[i]]
    return feed


def block_tables(items: Sequence[ScheduledRequest], held: NDArray[np.int64]) -> NDArray[np.int32]:
    """int32 [B, longest], zero behind the held[b] blocks of each sequence."""
    counts = held.tolist()
    tables = np.zeros((len(items), max(counts)), np.int32)
    for row, item, count in zip(tables, items, counts, strict=True):
        row[:count] = item.request.block_ids[:count]
    return tables


class BlockTables:
    """What `block_tables` gives, from rows that are kept while a request runs: a step writes only what is new.

    A row belongs to one request between two preemptions, which is how long its blocks stay the same ones.
    """

    def __init__(self) -> None:
        self._table = np.zeros((64, 16), np.int32)
        self._written = np.zeros(64, np.int64)  # blocks per row
        self._lives = [-1] * 64  # num_preemptions of the request that a row was written for
        self._row_of: dict[Request, int] = {}
        self._requests: list[Request] = []
        self._preemptions: list[int] = []
        self._rows = np.zeros(0, np.int64)

    def __call__(self, items: Sequence[ScheduledRequest], held: NDArray[np.int64]) -> NDArray[np.int32]:
        requests = [item[0] for item in items]
        preemptions = [request.num_preemptions for request in requests]
        if requests != self._requests or preemptions != self._preemptions:
            self._rows = self._assign(requests, preemptions)
            self._requests, self._preemptions = requests, preemptions
        width = int(held.max())
        if width > self._table.shape[1]:
            self._table = np.pad(self._table, ((0, 0), (0, 2 * width - self._table.shape[1])))
        for i in (self._written[self._rows] < held).nonzero()[0].tolist():
            row, first, stop = self._rows[i], self._written[self._rows[i]], held[i]
            self._table[row, first:stop] = requests[i].block_ids[first:stop]
            self._written[row] = stop
        return self._table[:, :width].take(self._rows, 0)

    def _assign(self, requests: Sequence[Request], preemptions: Sequence[int]) -> NDArray[np.int64]:
        kept = set(requests)
        for gone in [request for request in self._row_of if request not in kept]:
            self._lives[self._row_of.pop(gone)] = -1
        free = iter([row for row, life in enumerate(self._lives) if life < 0])
        for request, life in zip(requests, preemptions, strict=True):
            row = self._row_of.get(request)
            if row is None:
                row = self._row_of[request] = next(free, len(self._lives))
                if row == len(self._lives):
                    free = self._grow()
            if self._lives[row] != life:
                self._lives[row] = life
                self._written[row] = 0
                self._table[row] = 0
        return np.array([self._row_of[request] for request in requests])

    def _grow(self) -> Iterator[int]:
        """Double the rows; those behind the first new one, which is taken already."""
        count = len(self._lives)
        self._table = np.pad(self._table, ((0, count), (0, 0)))
        self._written = np.pad(self._written, (0, count))
        self._lives += [-1] * count
        return iter(range(count + 1, 2 * count))


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
        write(pinned.numpy(), offsets, arrays)
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


def lay_out(arrays: Mapping[str, NDArray[Any]], start: int = 0) -> tuple[dict[str, int], int]:
    """Byte offsets of arrays side by side in one buffer from `start` on, and where the last one ends."""
    offsets, total = {}, start
    for name, array in arrays.items():
        offsets[name] = total
        total += -(-array.nbytes // _ALIGN) * _ALIGN
    return offsets, total


def write(host: NDArray[np.uint8], offsets: Mapping[str, int], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Lay arrays side by side."""
    for name, array in arrays.items():
        host[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def view_as(moved: Tensor, offset: int, array: NDArray[Any]) -> Tensor:
    """The bytes of `moved` from `offset` on, with dtype and shape of `array`."""
    return moved[offset : offset + array.nbytes].view(_DTYPES[array.dtype.type]).view(array.shape)
