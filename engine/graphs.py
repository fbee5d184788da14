"""Decode steps as CUDA graphs: one launch for the whole network instead of hundreds.

A graph replays fixed kernels on fixed addresses. So every pair of padded batch size and block-table width has a graph
of its own, captured when it is first needed, with input buffers that never move: one pinned buffer on the host, one on
the device, one copy per step. Padding rows are inert: slot -1 writes nothing, length 0 attends to nothing. Kernels read
lengths on the device, so these two numbers are all that the choice of launches depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.sampler import SamplingPlan, sample
from engine.step_inputs import Arrays, StepInputs, lay_out, view_as
from kernels import KVLayer

INERT = {"tokens": 0, "positions": 0, "slots": -1, "block_tables": 0, "lengths": 0}


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


@dataclass(slots=True)
class _Graph:
    """One captured step. `arrays` view the pinned buffer, `step` the device's; a replay overwrites the two results."""

    pinned: Tensor
    moved: Tensor
    arrays: Arrays
    step: StepInputs
    graph: torch.cuda.CUDAGraph
    logits: Tensor
    greedy: Tensor


class DecodeGraphs:
    """Replays decode steps of one decoder over one KV pool. The eager decoder stays the oracle and the other switch."""

    def __init__(self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor) -> None:
        self._decoder, self._kv, self._cos_sin = decoder, kv, cos_sin
        self._graphs: dict[tuple[int, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()

    @property
    def captured(self) -> list[tuple[int, int]]:
        """(padded batch size, block-table width) of each graph that exists."""
        return sorted(self._graphs)

    def __call__(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """`arrays` of `step_arrays` for a batch of decodes -> logits [batch, vocab] and the greedy tokens [batch].

        Both are valid until the next call. Greedy choice is part of the graph; any other is made from the logits.
        """
        batch, blocks = arrays["block_tables"].shape
        key = padded_size(batch), padded_width(blocks)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._graphs[key] = self._capture(key, arrays)
        self._fill(graph, arrays)
        graph.graph.replay()
        return graph.logits[:batch], graph.greedy[:batch]

    def _fill(self, graph: _Graph, arrays: Arrays) -> None:
        self._copied.synchronize()  # the copy of the step before still reads the pinned buffer
        batch, blocks = arrays["block_tables"].shape
        for name, inert in INERT.items():
            to = graph.arrays[name]
            to[batch:] = inert
            if name == "block_tables":
                to[:batch, :blocks] = arrays[name]
            else:
                to[:batch] = arrays[name]
        graph.moved.copy_(graph.pinned, non_blocking=True)
        self._copied.record()

    def _capture(self, key: tuple[int, int], arrays: Arrays) -> _Graph:
        """Run the step once, which compiles what is missing, then record it; computing a step twice is harmless."""
        graph = self._buffers(*key)
        self._fill(graph, arrays)
        self._compute(graph.step)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            graph.logits, graph.greedy = self._compute(graph.step)
        return graph

    def _compute(self, step: StepInputs) -> tuple[Tensor, Tensor]:
        logits = self._decoder.logits(self._decoder(step, self._kv, self._cos_sin))
        return logits, sample(logits, SamplingPlan.greedy(), {})

    def _buffers(self, size: int, width: int) -> _Graph:
        like: Arrays = {
            "tokens": np.zeros(size, np.int64),
            "positions": np.zeros(size, np.int64),
            "slots": np.full(size, -1, np.int64),
            "block_tables": np.zeros((size, width), np.int32),
            "lengths": np.zeros(size, np.int32),
        }
        offsets, total = lay_out(like)
        pinned = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
        moved = torch.zeros(total, dtype=torch.uint8, device=self._decoder.device)
        arrays = {name: view_as(pinned, offsets[name], array).numpy() for name, array in like.items()}
        views = {name: view_as(moved, offsets[name], array) for name, array in like.items()}
        none = torch.zeros(0, dtype=torch.int64, device=moved.device)
        step = StepInputs(**views, query_starts=none, rows=none, num_decodes=size)
        return _Graph(pinned, moved, arrays, step, torch.cuda.CUDAGraph(), none, none)
