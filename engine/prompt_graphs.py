"""Short prompts as CUDA graphs: launching a layer's kernels one by one takes the host longer than the device computes.

At 512 tokens of a 7B on an H200 the host needs 13 ms for about 300 launches, the device 11. So a step of one prompt of
up to `MOST_TOKENS` new tokens is replayed where a graph of its padded size was captured ahead (`warm_up`); nothing is
captured inside a request. Padding tokens are inert: slot -1 writes nothing, and no query row is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.decoder import Decoder
from engine.step_inputs import Arrays, StepInputs, inert_prompts, lay_out, view_as
from kernels import KVLayer

STEP = 64
LEAST_TOKENS, MOST_TOKENS = 33, 512
"""Below, products of 8-bit formats treat real and padded rows differently; above, the device is the slower one."""
WIDTH = 16
"""Blocks of a request's table that a graph reads: longer contexts run eagerly."""


@dataclass(slots=True)
class _Graph:
    arrays: Arrays
    step: StepInputs
    nbytes: int
    graph: torch.cuda.CUDAGraph
    logits: Tensor


class PromptGraphs:
    """Replays steps of one prompt of one decoder over one KV pool."""

    def __init__(self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor, block_size: int) -> None:
        self._decoder, self._kv, self._cos_sin, self._block_size = decoder, kv, cos_sin, block_size
        self._graphs: dict[int, _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()
        _, total = lay_out(self._inert(MOST_TOKENS))
        self._pinned = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
        self._moved = torch.zeros(total, dtype=torch.uint8, device=decoder.device)
        self.nbytes = 0
        """Device memory that captured graphs hold."""

    def warm_up(self, num_tokens: int) -> None:
        """Capture every size up to `num_tokens`, largest first."""
        most = min(MOST_TOKENS, len(self._cos_sin), WIDTH * self._block_size, -(-num_tokens // STEP) * STEP)
        for size in range(most // STEP * STEP, 0, -STEP):
            if size not in self._graphs:
                self._capture(size)

    def __call__(self, arrays: Arrays) -> Tensor | None:
        """Logits [1, vocab] after the last token of `step_arrays` of one prompt, valid until the next call; None where
        no graph fits."""
        size = graph_size(arrays)
        graph = self._graphs.get(size or 0)
        if graph is None:
            return None
        self._fill(graph, arrays)
        graph.graph.replay()
        return graph.logits

    def _inert(self, size: int) -> Arrays:
        arrays = inert_prompts(1, size, self._block_size)
        return {**arrays, "block_tables": np.zeros((1, WIDTH), np.int32)}

    def _fill(self, graph: _Graph, arrays: Arrays) -> None:
        self._copied.synchronize()  # the copy of the step before still reads the pinned buffer
        for name, to in graph.arrays.items():
            given = arrays[name]
            if name == "block_tables":
                to[:, : given.shape[1]], to[:, given.shape[1] :] = given, 0
            else:
                to[: len(given)] = given
                to[len(given) :] = -1 if name == "slots" else 0
        self._moved[: graph.nbytes].copy_(self._pinned[: graph.nbytes], non_blocking=True)
        self._copied.record()

    def _capture(self, size: int) -> None:
        inert = self._inert(size)
        offsets, nbytes = lay_out(inert)
        arrays = {name: view_as(self._pinned, offsets[name], array).numpy() for name, array in inert.items()}
        views = {name: view_as(self._moved, offsets[name], array) for name, array in inert.items()}
        step = StepInputs(**views, num_decodes=0)
        graph = _Graph(arrays, step, nbytes, torch.cuda.CUDAGraph(), torch.empty(0))
        torch.cuda.synchronize()
        self._fill(graph, inert)
        self._compute(step)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # capturing does so too, and what it gives back is not the graph's
        before = torch.cuda.memory_reserved()
        with torch.cuda.graph(graph.graph, pool=self._pool):
            graph.logits = self._compute(step)
        self.nbytes += max(torch.cuda.memory_reserved() - before, 0)
        self._graphs[size] = graph

    def _compute(self, step: StepInputs) -> Tensor:
        return self._decoder.logits(self._decoder(step, self._kv, self._cos_sin))


def graph_size(arrays: Arrays) -> int | None:
    """The padded number of tokens of a graph that computes this step; None where none would: several sequences, no
    token to sample, or sizes that are not captured."""
    tokens, (batch, blocks) = len(arrays["tokens"]), arrays["block_tables"].shape
    if batch != 1 or blocks > WIDTH or len(arrays["rows"]) != 1 or not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        return None
    return -(-tokens // STEP) * STEP
