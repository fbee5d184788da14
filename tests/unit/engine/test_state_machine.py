"""20,000 random operations over pool and scheduler; after each, every list, count and slot agrees."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.request import RequestStatus
from engine.scheduling.scheduler import POLICIES
from tests.unit.engine.support import SlotMemory, make_request, make_scheduler, run_step

BLOCK = 4


class SchedulerMachine(RuleBasedStateMachine):
    """Tokens come from a tiny alphabet, so that shared prefixes, equal prompts and evictions happen all the time."""

    @initialize(
        batching=st.sampled_from(sorted(POLICIES)),
        num_blocks=st.integers(6, 16),
        budget=st.integers(4, 24),
        prefix_caching=st.booleans(),
        chunked=st.booleans(),
    )
    def build(self, batching: str, num_blocks: int, budget: int, prefix_caching: bool, chunked: bool) -> None:
        self.scheduler = make_scheduler(
            num_blocks,
            BLOCK,
            prefix_caching=prefix_caching,
            batching=batching,
            max_batch_size=4,
            max_batched_tokens=budget,
            chunked_prefill=chunked,
        )
        self.memory = SlotMemory(BLOCK)
        self.longest = num_blocks * BLOCK
        self.requests: list = []
        self.now = 0.0

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20), max_tokens=st.integers(1, 12))
    def add(self, prompt: list[int], max_tokens: int) -> None:
        if len(prompt) >= self.longest or self.scheduler.num_unfinished > 12:
            return
        name = str(len(self.requests))
        room = min(max_tokens, self.longest - len(prompt))
        self.requests.append(make_request(name, prompt, max_tokens=room, arrival=self.now))
        self.scheduler.add(self.requests[-1])

    @rule(seconds=st.sampled_from([0.0, 0.01, 0.1]))
    def step(self, seconds: float) -> None:
        self.now += seconds
        run_step(self.scheduler, self.memory, self.now)

    @precondition(lambda self: getattr(self, "requests", None))
    @rule(index=st.integers(0, 1 << 20))
    def abort(self, index: int) -> None:
        self.scheduler.finish(self.requests[index % len(self.requests)], RequestStatus.ABORTED, self.now)

    @precondition(lambda self: hasattr(self, "scheduler") and self.scheduler.running)
    @rule()
    def preempt(self) -> None:
        from engine.scheduling.batch import ScheduledBatch

        self.scheduler._preempt(self.scheduler.running[-1], ScheduledBatch())

    @rule()
    def break_off(self) -> None:
        """A step that is scheduled and never completed, as after an interrupt."""
        self.scheduler.schedule(self.now)
        self.scheduler.recover()
        self.memory.slots.clear()

    @rule()
    def forget_prefixes(self) -> None:
        self.scheduler.cache.reset()

    @invariant()
    def everything_agrees(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()

    def teardown(self) -> None:
        """Whatever happened, everybody left can still be served."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5000):
            if not self.scheduler.num_unfinished:
                break
            self.now += 0.1
            run_step(self.scheduler, self.memory, self.now)
        assert not self.scheduler.num_unfinished
        assert self.scheduler.cache.pool.num_used == 0
        assert all(request.is_finished for request in self.requests)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(
    max_examples=300, stateful_step_count=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
