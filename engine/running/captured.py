"""What captured steps have in common: inputs that never move, memory for what they compute, and the way they end.

A graph replays fixed kernels on fixed addresses. So one pinned buffer on the host and one on the device serve all
graphs of a kind, and one copy fills them per step. A graph ends by putting the most likely tokens where the host and
the next step find them: for greedy requests nothing is left to launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.decoder import Decoder
from engine.model.step_inputs import StepInputs
from engine.running.readback import Readback
from engine.running.step_arrays import Arrays, lay_out, view_as, write
from kernels import KVLayer, highest

PLAN_BYTES = 64
"""Per row, for the arrays of a sampling plan, which travel with the inputs: six of eight bytes and their alignment."""


@dataclass(slots=True)
class Captured:
    """One captured step. `arrays` view the pinned buffer, `inputs` the device's; `nbytes` of both are its inputs.

    bytes: those of the device and of the host, to be copied.
    logits: what the graph computes, valid until another one is replayed; None where it keeps none.
    """

    arrays: Arrays
    inputs: dict[str, Tensor]
    nbytes: int
    bytes: tuple[Tensor, Tensor]
    graph: torch.cuda.CUDAGraph
    logits: Tensor | None = None


class CapturedSteps:
    """Steps of one decoder over one KV pool. The eager decoder stays the oracle and the other switch."""

    def __init__(
        self, decoder: Decoder, kv: Sequence[KVLayer], cos_sin: Tensor, readback: Readback, largest: Arrays
    ) -> None:
        """readback: where sampled tokens stand, with rows for the largest step; largest: the inputs of such a step."""
        self._decoder, self._kv, self._cos_sin = decoder, kv, cos_sin
        self._readback = readback
        self._pool = torch.cuda.graph_pool_handle()
        self._copied = torch.cuda.Event()
        room = lay_out(largest)[1] + PLAN_BYTES * len(readback.ids) + 1024
        self._pinned = torch.zeros(room, dtype=torch.uint8, pin_memory=True)
        self._host = self._pinned.numpy()
        self._moved = torch.zeros(room, dtype=torch.uint8, device=decoder.device)
        self.nbytes = 0
        """Device memory that captured graphs hold: their intermediate results and, where kept, the logits."""

    def _buffers(self, like: Arrays) -> Captured:
        """A step with inputs of these shapes and dtypes, not captured yet."""
        offsets, nbytes = lay_out(like)
        arrays = {name: view_as(self._pinned, offsets[name], array).numpy() for name, array in like.items()}
        inputs = {name: view_as(self._moved, offsets[name], array) for name, array in like.items()}
        return Captured(arrays, inputs, nbytes, self._bytes(nbytes), torch.cuda.CUDAGraph())

    def _bytes(self, count: int) -> tuple[Tensor, Tensor]:
        return self._moved[:count], self._pinned[:count]

    def _send(self, step: Captured, arrays: Arrays, extra: Arrays) -> dict[str, Tensor]:
        """Fill the inputs: `arrays` in front, padding that is inert behind. Returns `extra` on the device."""
        self._copied.synchronize()  # the copy of the step before still reads the pinned buffer
        for name, to in step.arrays.items():
            given = arrays[name]
            rows = len(given)
            if to.ndim == 1:
                to[:rows] = given
            else:
                to[:rows, : given.shape[1]], to[:rows, given.shape[1] :] = given, 0
            if rows < len(to):
                to[rows:] = -1 if name == "slots" else 0
        offsets, total = lay_out(extra, step.nbytes)
        write(self._host, offsets, extra)
        moved, pinned = self._bytes(total) if extra else step.bytes
        moved.copy_(pinned, non_blocking=True)
        self._copied.record()
        return {name: view_as(self._moved, offsets[name], array) for name, array in extra.items()}

    def _record(self, graph: torch.cuda.CUDAGraph, compute: Callable[[], None]) -> None:
        """Run a step whose inputs are inert once, which compiles what is missing, then capture it.

        Takes tens of milliseconds, and seconds where kernels must be compiled. A step on its way is waited for, and the
        tokens that it sampled stay.
        """
        torch.cuda.synchronize()
        kept = self._readback.buffer.clone()
        compute()
        self._readback.buffer.copy_(kept)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # capturing does so too, and what it gives back is not the graph's
        before = torch.cuda.memory_reserved()
        with torch.cuda.graph(graph, pool=self._pool):
            compute()
        self.nbytes += max(torch.cuda.memory_reserved() - before, 0)

    def _compute(self, step: StepInputs) -> Tensor:
        """The logits of a step whose most likely tokens are then in the readback."""
        logits = self._decoder.logits(self._decoder(step, self._kv, self._cos_sin))
        highest(logits, self._readback.rows(len(logits)), impl=self._decoder.impl)
        return logits
