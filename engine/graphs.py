"""Decode steps as CUDA graphs: one launch for the whole network instead of hundreds.

A graph replays fixed kernels on fixed addresses. So every pair of padded batch size and block-table width has a graph
of its own, with inputs that never move: one pinned buffer on the host and one on the device serve all graphs, and one
copy fills them per step. Padding rows are inert: slot -1 writes nothing, length 0 attends to nothing. Kernels read
lengths on the device, so these two numbers are all that the choice of launches depends on.

Tokens that the step before sampled never leave the device: a graph begins by gathering them, and ends by putting the
most likely tokens where the next step finds them. A second graph of the same size is captured where the logits
themselves are wanted, to draw from or to return probabilities of: it copies them out, which the others are spared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.readback import Readback
from engine.sampler import highest_logits
from engine.step_inputs import Arrays, StepInputs, lay_out, view_as
from kernels import KVLayer

INERT = {"feed": 0, "tokens": 0, "positions": 0, "slots": -1, "block_tables": 0, "lengths": 0}
PLAN_BYTES = 64
"""Per row, for the arrays of a sampling plan, which travel with the inputs: six of eight bytes and their alignment."""


def padded_size(batch: int) -> int:
    """1, 2, 4, then multiples of 8 up to 128, of 32 beyond: at most an eighth of a larger batch is padding."""
    for size in (1, 2, 4):
        if batch <= size:
            return size
    step = 8 if batch <= 128 else 32
    return -(-batch // step) * step


def padded_width(blocks: int) -> int:
    """Block-table widths in powers of two from 16: kernels choose their splits by the longest context that fits."""
    return max(16, 1 << (blocks - 1).bit_length())


class GraphKey(NamedTuple):
    """Padded batch size, block-table width, and whether the logits are kept."""

    size: int
    width: int
    logits: bool


@dataclass(slots=True)
class _Graph:
    """One captured step. `arrays` view the pinned buffer, `step` the device's; `nbytes` of both are its inputs."""

    arrays: Arrays
    step: StepInputs
    feed: Tensor
    nbytes: int
    graph: torch.cuda.CUDAGraph


class DecodeGraphs:
    """Replays decode steps of one decoder over one KV pool. The eager decoder stays the oracle and the other switch."""

    def __init__(
        self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor, readback: Readback, max_blocks: int
    ) -> None:
        """readback: where sampled tokens stand, with rows for the largest padded batch; max_blocks: of one request."""
        self._decoder, self._kv, self._cos_sin = decoder, kv, cos_sin
        self._readback = readback
        self._graphs: dict[GraphKey, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()
        rows = len(readback.ids)
        _, total = lay_out(_inert(rows, padded_width(max_blocks)))
        total += PLAN_BYTES * rows + 1024
        self._pinned = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
        self._moved = torch.zeros(total, dtype=torch.uint8, device=decoder.device)
        self._logits: Tensor | None = None
        self.nbytes = 0
        """Device memory that captured graphs hold: their intermediate results and, where kept, the logits."""

    @property
    def captured(self) -> list[GraphKey]:
        return sorted(self._graphs)

    def warm_up(self, max_batch: int, max_blocks: int) -> None:
        """Capture every padded batch size up to `max_batch`, largest first, for tables of up to `max_blocks`."""
        sizes = sorted({padded_size(batch) for batch in range(1, max_batch + 1)}, reverse=True)
        widths = sorted({padded_width(blocks) for blocks in range(1, max_blocks + 1)})
        for key in (GraphKey(size, width, False) for width in widths for size in sizes):
            if key not in self._graphs:
                self.capture(key)

    def __call__(
        self, arrays: Arrays, extra: Arrays, *, logits: bool
    ) -> tuple[Tensor | None, Mapping[str, Tensor]]:
        """Replay a step of decodes; the most likely tokens are then in the readback.

        arrays: of `step_arrays`, and "feed" of `feed_rows` where tokens are pending. extra: arrays of a sampling plan
        without penalties. Returns the logits [batch, vocab] if asked for, valid until the next call, and `extra` on the
        device.
        """
        batch, blocks = arrays["block_tables"].shape
        key = GraphKey(padded_size(batch), padded_width(blocks), logits)
        graph = self._graphs.get(key) or self.capture(key)
        staged = self._fill(graph, arrays, extra)
        graph.graph.replay()
        return self._logits[:batch] if logits and self._logits is not None else None, staged

    def _fill(self, graph: _Graph, arrays: Arrays, extra: Arrays) -> dict[str, Tensor]:
        self._copied.synchronize()  # the copy of the step before still reads the pinned buffer
        batch, blocks = arrays["block_tables"].shape
        for name, to in graph.arrays.items():
            if name == "block_tables":
                to[:batch, :blocks] = arrays[name]
                to[:batch, blocks:] = 0
            elif name in arrays:
                to[:batch] = arrays[name]
            else:  # no feed: every token is the host's own
                to[:batch] = np.arange(batch) + len(self._readback.ids)
            if batch < len(to):
                to[batch:] = INERT[name]
        offsets, total = lay_out(extra, graph.nbytes)
        for name, array in extra.items():
            view_as(self._pinned, offsets[name], array).numpy()[:] = array
        self._moved[:total].copy_(self._pinned[:total], non_blocking=True)
        self._copied.record()
        return {name: view_as(self._moved, offsets[name], array) for name, array in extra.items()}

    def capture(self, key: GraphKey) -> _Graph:
        """Run an inert step once, which compiles what is missing, then record it.

        Takes tens of milliseconds, and seconds where kernels must be compiled. A step on its way is waited for, and the
        tokens that it sampled stay.
        """
        torch.cuda.synchronize()
        if key.logits and self._logits is None:
            shape = len(self._readback.ids), self._decoder.spec.vocab_size
            self._logits = torch.empty(shape, dtype=self._decoder.dtype, device=self._decoder.device)
            self.nbytes += self._logits.nbytes
        graph = self._buffers(key)
        self._fill(graph, {name: array[:0] for name, array in graph.arrays.items()}, {})
        kept = self._readback.buffer.clone()
        self._compute(graph, key)
        self._readback.buffer.copy_(kept)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # capturing does so too, and what it gives back is not the graph's
        before = torch.cuda.memory_reserved()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            self._compute(graph, key)
        self.nbytes += max(torch.cuda.memory_reserved() - before, 0)
        self._graphs[key] = graph
        return graph

    def _compute(self, graph: _Graph, key: GraphKey) -> None:
        """One step from staged inputs to the readback. Holds no result, so that graphs share their memory."""
        readback = self._readback
        step = replace(graph.step, tokens=readback.feed(graph.step.tokens, graph.feed))
        logits = self._decoder.logits(self._decoder(step, self._kv, self._cos_sin))
        highest, tokens = highest_logits(logits)
        readback.store(tokens, highest)
        if key.logits:
            assert self._logits is not None
            self._logits[: key.size].copy_(logits)

    def _buffers(self, key: GraphKey) -> _Graph:
        like = _inert(key.size, key.width)
        offsets, total = lay_out(like)
        arrays = {name: view_as(self._pinned, offsets[name], array).numpy() for name, array in like.items()}
        views = {name: view_as(self._moved, offsets[name], array) for name, array in like.items()}
        none = torch.zeros(0, dtype=torch.int64, device=self._moved.device)
        feed = views.pop("feed")
        step = StepInputs(**views, query_starts=none, rows=none, num_decodes=key.size)
        return _Graph(arrays, step, feed, total, torch.cuda.CUDAGraph())


def _inert(size: int, width: int) -> Arrays:
    """A step of `size` padding rows."""
    shapes = {"block_tables": (size, width)}
    kinds = {"block_tables": np.int32, "lengths": np.int32}
    return {name: np.full(shapes.get(name, size), INERT[name], kinds.get(name, np.int64)) for name in INERT}
