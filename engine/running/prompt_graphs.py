"""Short prompts as CUDA graphs: launching a layer's kernels one by one takes the host longer than the device computes.

At 512 tokens of a 7B on an H200 the host needs 13 ms for about 300 launches, the device 11. So a step of one prompt of
up to `MOST_TOKENS` new tokens is replayed where a graph of its padded size was captured ahead (`warm_up`); nothing is
captured inside a request. Padding tokens are inert: slot -1 writes nothing, and no query row is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.step_inputs import StepInputs
from engine.running.captured import Captured, CapturedSteps
from engine.running.readback import Readback
from engine.running.step_arrays import Arrays, inert_prompts
from kernels import KVLayer

STEP = 64
LEAST_TOKENS, MOST_TOKENS = 33, 512
"""Below, w8a8 and fp8 would round activations of padded rows that they leave alone in real ones (w4a8 begins where one
size ends); above, the device is the slower one."""
WIDTH = 16
"""Blocks of a request's table that a graph reads: longer contexts run eagerly."""


class PromptGraphs(CapturedSteps):
    """Replays steps of one prompt."""

    def __init__(
        self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor, readback: Readback, block_size: int
    ) -> None:
        """readback: where sampled tokens stand."""
        super().__init__(decoder, kv, cos_sin, readback, _inert(MOST_TOKENS, block_size))
        self._block_size = block_size
        self._graphs: dict[int, Captured] = {}

    def warm_up(self, num_tokens: int) -> None:
        """Capture every size up to `num_tokens`, largest first."""
        most = min(MOST_TOKENS, len(self._cos_sin), WIDTH * self._block_size, -(-num_tokens // STEP) * STEP)
        for size in range(most // STEP * STEP, 0, -STEP):
            if size not in self._graphs:
                self._capture(size)

    def fits(self, arrays: Arrays) -> bool:
        """Whether a graph was captured for the step that these arrays of `step_arrays` describe."""
        return graph_size(arrays) in self._graphs

    def __call__(self, arrays: Arrays, extra: Arrays, *, logits: bool) -> tuple[Tensor | None, Mapping[str, Tensor]]:
        """Replay a step that `fits`; the most likely token is then in the readback. As `DecodeGraphs.__call__`, but the
        logits [1, vocab] are there whether asked for or not."""
        graph = self._graphs[graph_size(arrays) or 0]
        staged = self._send(graph, arrays, extra)
        graph.graph.replay()
        return graph.logits, staged

    def _capture(self, size: int) -> None:
        inert = _inert(size, self._block_size)
        graph = self._buffers(inert)
        step = StepInputs(**graph.inputs, num_decodes=0)

        def compute() -> None:
            graph.logits = self._compute(step)

        self._send(graph, inert, {})
        self._record(graph.graph, compute)
        self._graphs[size] = graph


def _inert(size: int, block_size: int) -> Arrays:
    """A prompt of `size` tokens that writes nothing."""
    return {**inert_prompts(1, size, block_size), "block_tables": np.zeros((1, WIDTH), np.int32)}


def graph_size(arrays: Arrays) -> int | None:
    """The padded number of tokens of a graph that computes this step; None where none would: several sequences, no
    token to sample, or sizes that are not captured."""
    tokens, (batch, blocks) = len(arrays["tokens"]), arrays["block_tables"].shape
    if batch != 1 or blocks > WIDTH or len(arrays["rows"]) != 1 or not LEAST_TOKENS <= tokens <= MOST_TOKENS:
        return None
    return -(-tokens // STEP) * STEP
