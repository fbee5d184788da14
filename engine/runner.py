"""The seam between policy and device: everything above it is the same for a CPU, a GPU and a simulated GPU."""

from __future__ import annotations

from typing import Protocol

from engine.batch import ScheduledBatch, StepResult
from engine.clock import Clock
from engine.memory import MemoryPlan
from engine.model_spec import ModelSpec


class Runner(Protocol):
    """Turns a scheduled batch into tokens.

    Ownership: the runner owns weights, KV tensors and device state, sized once by `memory`; the scheduler above it
    owns which block belongs to whom. `execute` writes keys and values of every scheduled token into the blocks listed
    in `request.block_ids` (token t lives in block `block_ids[t // block_size]`) and changes nothing else: calling it
    again with the same batch after an interrupt is safe. `close` gives all memory back and may be called twice.
    """

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def memory(self) -> MemoryPlan: ...

    @property
    def description(self) -> str:
        """Device, formats and the code paths in use, in one line; says so where a fast path is not taken."""
        ...

    def execute(self, batch: ScheduledBatch) -> StepResult: ...

    def measured_memory(self) -> dict[str, int]:
        """Bytes in use now by part ("weights", "kv", ...); a part that cannot be measured is left out."""
        ...

    def close(self) -> None: ...
