"""Decode steps as CUDA graphs: one launch for the whole network instead of hundreds.

Every pair of padded batch size and block-table width has a graph of its own. Padding rows are inert: slot -1 writes
nothing, length 0 attends to nothing. Kernels read lengths on the device, so these two numbers are all that the choice
of launches depends on.

Tokens that the step before sampled never leave the device: a graph begins by gathering them, and ends by putting the
most likely tokens where the next step finds them. A second graph of the same size is captured where the logits
themselves are wanted, to draw from or to return probabilities of: it copies them out, which the others are spared.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.step_inputs import StepInputs
from engine.running.captured import Captured, CapturedSteps
from engine.running.readback import Readback
from engine.running.step_arrays import Arrays
from kernels import KVLayer


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


class DecodeGraphs(CapturedSteps):
    """Replays decode steps, and captures what is missing when it is first needed."""

    def __init__(
        self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor, readback: Readback, max_blocks: int
    ) -> None:
        """readback: where sampled tokens stand, with rows for the largest padded batch; max_blocks: of one request."""
        super().__init__(decoder, kv, cos_sin, readback, _inert(len(readback.ids), padded_width(max_blocks)))
        self._graphs: dict[GraphKey, Captured] = {}
        self._logits: Tensor | None = None

    @property
    def captured(self) -> list[GraphKey]:
        return sorted(self._graphs)

    def warm_up(self, max_batch: int, max_blocks: int, logits: Collection[bool]) -> None:
        """Capture every padded batch size up to `max_batch`, largest first, for tables of up to `max_blocks`; logits:
        whether they are kept."""
        sizes = sorted({padded_size(batch) for batch in range(1, max_batch + 1)}, reverse=True)
        widths = sorted({padded_width(blocks) for blocks in range(1, max_blocks + 1)})
        for key in (GraphKey(size, width, keep) for keep in sorted(logits) for width in widths for size in sizes):
            if key not in self._graphs:
                self.capture(key)

    def __call__(self, arrays: Arrays, extra: Arrays, *, logits: bool) -> tuple[Tensor | None, Mapping[str, Tensor]]:
        """Replay a step of decodes; the most likely tokens are then in the readback.

        arrays: of `step_arrays`, and "feed" of `feed_rows` where tokens are pending. extra: arrays of a sampling plan
        without penalties. Returns the logits [batch, vocab] if asked for, valid until the next call, and `extra` on the
        device.
        """
        batch, blocks = arrays["block_tables"].shape
        key = GraphKey(padded_size(batch), padded_width(blocks), logits)
        graph = self._graphs.get(key) or self.capture(key)
        if "feed" not in arrays:  # every token is the host's own
            arrays = {**arrays, "feed": np.arange(batch) + len(self._readback.ids)}
        staged = self._send(graph, arrays, extra)
        graph.graph.replay()
        return None if graph.logits is None else graph.logits[:batch], staged

    def capture(self, key: GraphKey) -> Captured:
        """The graph of this size; see `CapturedSteps._record` for what it takes."""
        inert = _inert(key.size, key.width)
        graph = self._buffers(inert)
        if key.logits:
            graph.logits = self._room_for_logits()[: key.size]
        none = torch.zeros(0, dtype=torch.int64, device=self._moved.device)
        inputs = {name: view for name, view in graph.inputs.items() if name != "feed"}

        def compute() -> None:
            """From staged inputs to the readback. Holds no result, so that graphs share their memory."""
            tokens = self._readback.feed(inputs["tokens"], graph.inputs["feed"])
            step = StepInputs(**{**inputs, "tokens": tokens}, query_starts=none, rows=none, num_decodes=key.size)
            logits = self._compute(step)
            if graph.logits is not None:
                graph.logits.copy_(logits)

        self._send(graph, inert, {})
        self._record(graph.graph, compute)
        self._graphs[key] = graph
        return graph

    def _room_for_logits(self) -> Tensor:
        """One place for all graphs that keep them, made when the first one is captured."""
        if self._logits is None:
            shape = len(self._readback.ids), self._decoder.spec.vocab_size
            self._logits = torch.empty(shape, dtype=self._decoder.dtype, device=self._decoder.device)
            self.nbytes += self._logits.nbytes
        return self._logits


def _inert(size: int, width: int) -> Arrays:
    """A step of `size` padding rows."""
    kinds = {"feed": np.int64, "tokens": np.int64, "positions": np.int64, "slots": np.int64}
    arrays: Arrays = {name: np.zeros(size, kind) for name, kind in kinds.items()}
    arrays["slots"][:] = -1
    return {**arrays, "block_tables": np.zeros((size, width), np.int32), "lengths": np.zeros(size, np.int32)}
