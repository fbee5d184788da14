"""The seam between policy and device: everything above it is the same for a CPU, a GPU and a simulated GPU."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from engine.clock import Clock
from engine.model.spec import ModelSpec
from engine.running.memory import MemoryPlan
from engine.scheduling.batch import ScheduledBatch, StepResult


class Pending(Protocol):
    """A step that is on its way."""

    def result(self) -> StepResult:
        """Wait for the device and read what it computed; once. Raises NonFiniteLogitsError, naming the requests, where
        the model answered with NaN."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A step that was computed when it was launched."""

    value: StepResult

    def result(self) -> StepResult:
        return self.value


class Runner(Protocol):
    """Turns a scheduled batch into tokens.

    Ownership: the runner owns weights, KV tensors and device state, sized once by `memory`; the scheduler above it
    owns which block belongs to whom. `launch` writes keys and values of every scheduled token into the blocks listed
    in `request.block_ids` (token t lives in block `block_ids[t // block_size]`) and changes nothing of the requests:
    calling it again with the same batch after an interrupt is safe. Steps are computed in the order of their launches,
    each after the one before, so what a later step reads is there, and a block given back may be used again at once.
    `close` gives all memory back and may be called twice.
    """

    @property
    def asynchronous(self) -> bool:
        """`launch` returns before the step is computed, and takes requests whose newest token is pending if the launch
        before sampled it; except for requests that need values (see SamplingParams.needs_values)."""
        ...

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

    def launch(self, batch: ScheduledBatch) -> Pending: ...

    def warm_up(self, num_tokens: int, logits: Collection[bool]) -> None:
        """Make ready what decode steps of any batch size and sequences of so many tokens will need: with their logits,
        without, or both."""
        ...

    def measured_memory(self) -> dict[str, int]:
        """Bytes in use now by part ("weights", "kv", ...); a part that cannot be measured is left out."""
        ...

    def close(self) -> None: ...
