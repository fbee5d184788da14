"""A step between its launch and the moment its tokens are known, and what observers are told of it then."""

from __future__ import annotations

from dataclasses import dataclass

from engine.running.runner import Pending
from engine.scheduling.batch import ScheduledBatch, StepEvent, StepResult
from engine.scheduling.scheduler import Scheduler


@dataclass(slots=True)
class LaunchedStep:
    """start: when it was scheduled. host_seconds: spent on it so far. overlapped: another was on its way then."""

    batch: ScheduledBatch
    pending: Pending
    start: float
    host_seconds: float
    overlapped: bool

    def event(
        self, number: int, result: StepResult, span: tuple[float, float], told: int, ended: int, scheduler: Scheduler
    ) -> StepEvent:
        """span: begin and end of the step; told: tokens handed out, ended: requests since the event before."""
        batch, pool = self.batch, scheduler.cache.pool
        return StepEvent(
            step=number,
            start=span[0],
            end=span[1],
            device_seconds=result.device_seconds,
            num_decodes=len(batch.decodes),
            num_prefills=len(batch.prefills),
            num_prefill_tokens=batch.num_tokens - len(batch.decodes),
            num_new_tokens=told,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_slots=batch.num_slots,
            padding_tokens=batch.padding_tokens,
            num_finished=ended,
            num_preempted=len(batch.preempted),
            num_recomputed=batch.num_recomputed,
            query_tokens=sum(request.num_prompt for request in batch.admitted),
            hit_tokens=sum(request.num_cached for request in batch.admitted),
            blocks_total=pool.num_blocks,
            blocks_used=pool.num_used,
            blocks_shared=pool.num_shared,
            blocks_cached=pool.num_cached,
            blocked_by=batch.blocked_by,
            host_seconds=self.host_seconds,
            overlapped=self.overlapped,
        )
