"""What the scheduler hands the runner for one step, and what it gets back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from engine.request import Request, TokenLogprobs


class ScheduledRequest(NamedTuple):
    """Tokens [start, start + num_new) of `request` are to be computed in this step; their blocks are allocated."""

    request: Request
    start: int
    num_new: int

    @property
    def stop(self) -> int:
        """Length of the sequence once this step is computed."""
        return self.start + self.num_new

    @property
    def samples(self) -> bool:
        """True when the step reaches the sequence's end, so that its last position yields a new token.

        Holds until the step is on its way (`Scheduler.advance`), when the new token joins the sequence.
        """
        return self.stop == self.request.num_tokens


@dataclass(slots=True)
class ScheduledBatch:
    """One step's work: decodes (one token each) come first, then prefill chunks.

    num_slots: rows a padded implementation of the same policy would hold (finished members of a static batch count).
    padding_tokens: tokens such an implementation would compute for nothing in this step.
    preempted: requests that lost their blocks in this step and went back to the waiting line.
    num_recomputed: the tokens they will have to compute again.
    blocked_by: why more requests were not admitted: "blocks", "batch size", "token budget", "batch policy", or None
        when nobody was left waiting.
    """

    decodes: list[ScheduledRequest] = field(default_factory=list)
    prefills: list[ScheduledRequest] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    num_recomputed: int = 0
    num_slots: int = 0
    padding_tokens: int = 0
    blocked_by: str | None = None

    @property
    def items(self) -> list[ScheduledRequest]:
        return self.decodes + self.prefills

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(item.num_new for item in self.prefills)

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


@dataclass(slots=True)
class StepResult:
    """The runner's answer, aligned with `ScheduledBatch.items`.

    token_ids: the new token of each item that samples, None for prompt chunks that do not reach the end.
    logprobs: as token_ids; None where the request did not ask.
    prompt_logprobs: for an item whose request asks, log-probabilities of the known tokens start+1 up to
        min(stop, num_prompt-1), each given all before it; None otherwise.
    device_seconds: time the device (or the cost model) spent; None when the runner cannot tell it from host time.
    host_seconds: time the runner spent preparing the step, its computing and its waiting left out.
    """

    token_ids: Sequence[int | None]
    logprobs: Sequence[TokenLogprobs | None] | None = None
    prompt_logprobs: Sequence[Sequence[float] | None] | None = None
    device_seconds: float | None = None
    host_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step as observers see it. Dashboards, metrics and tests read these and nothing else.

    Times are seconds on the engine's clock. A step lasts from its scheduling, or from the end of the step before where
    it was prepared while that one ran (`overlapped`), until its tokens are known: steps never overlap in time.
    host_seconds: scheduling, preparing and handing out, which an overlapped step hides behind the device.
    blocks: used = held by requests (shared = by more than one), cached = held by nobody but still findable by prefix,
    free = the rest; hit/query tokens count prompts admitted in this step.
    """

    step: int
    start: float
    end: float
    device_seconds: float | None
    num_decodes: int
    num_prefills: int
    num_prefill_tokens: int
    num_new_tokens: int
    num_running: int
    num_waiting: int
    num_slots: int
    padding_tokens: int
    num_finished: int
    num_preempted: int
    num_recomputed: int
    query_tokens: int
    hit_tokens: int
    blocks_total: int
    blocks_used: int
    blocks_shared: int
    blocks_cached: int
    blocked_by: str | None
    host_seconds: float = 0.0
    overlapped: bool = False
