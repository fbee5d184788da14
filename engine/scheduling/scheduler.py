"""Who computes what in the next step.

One rule: under a budget of tokens per step, each request's `num_computed` chases its `num_tokens`. Running requests
come first, new ones are admitted as the batching policy, the batch size, the budget and the pool allow. When a running
request finds no block, the youngest one gives its blocks back and is recomputed later.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from engine.request import Request, RequestStatus
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest
from engine.scheduling.cache import KVCache, PrefixMatch

CONTEXT = attrgetter("start")
FINISHED = RequestStatus.STOPPED
"""Statuses from this one on; the loops that touch every request at every step compare with it themselves."""


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The knobs of EngineConfig that the scheduler knows; see there for their meaning and range."""

    batching: str = "continuous"
    max_batch_size: int = 64
    max_batched_tokens: int = 2048
    batch_window: float = 0.05
    chunked_prefill: bool = True


class Scheduler:
    """Owns the waiting line and the running list (oldest admission first); the cache owns the blocks."""

    def __init__(self, config: SchedulerConfig, cache: KVCache) -> None:
        self.config = config
        self.cache = cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.group: list[Request] = []
        self._form_group = POLICIES[config.batching]

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting) + len(self.running)

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def schedule(self, now: float) -> ScheduledBatch:
        """Choose the next step's work and allocate its blocks. Nothing counts as computed until `advance`."""
        batch = ScheduledBatch()
        budget = self._schedule_running(batch)
        if batch.preempted:
            batch.blocked_by = "blocks"
        else:
            self._admit(batch, budget, now)
        # A GPU takes up rows in this order: a long context that begins last is computed alone. Decode attention over
        # 256 contexts of 100 to 1,200 tokens took 6 % (bf16) to 30 % (int4) less time this way on an H200; now see
        # `python -m kernels.bench --op ragged`.
        batch.decodes.sort(key=CONTEXT, reverse=True)
        self._count_padding(batch)
        return batch

    def advance(self, batch: ScheduledBatch) -> None:
        """The step is on its way: its tokens count as computed, and each item that samples has a token pending."""
        for request, start, _ in batch.decodes:
            request.num_computed = start + 1
            request.num_pending += 1
        for item in batch.prefills:
            samples = item.samples
            item.request.num_computed = item.stop
            item.request.num_pending += samples

    def complete(self, batch: ScheduledBatch, tokens: Sequence[int | None], now: float) -> list[Request]:
        """The step is computed: pending tokens become known ones, and the blocks they fill can be found.

        A request may have ended meanwhile: then the token is nobody's. Or it has lost its blocks: the token stays.
        Returns the requests that have a new token, in the order of the batch.
        """
        size, told = self.cache.block_size, []
        for (request, start, num_new), token in zip(batch.items, tokens, strict=True):
            if request.status >= FINISHED:
                continue
            if token is not None:
                request.num_pending -= 1
                request.token_times.append(now)
                request.output_token_ids.append(token)
                told.append(request)
            if (start + num_new) // size > request.num_published:
                self.cache.publish(request, start + num_new)
        return told

    def finish(self, request: Request, status: RequestStatus, now: float) -> None:
        """Take a request out, wherever it stands, and give its blocks back."""
        if request.is_finished:
            return
        request.status, request.finish_time = status, now  # first: if this breaks off, `recover` does the rest
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self.cache.release(request)
        request.num_pending = 0

    def next_wakeup(self, now: float) -> float | None:
        """When a policy that waits will have work, if it has none now."""
        if self.running or not self.waiting or self.config.batching != "dynamic":
            return None
        moment = self.waiting[0].arrival + self.config.batch_window
        return moment if moment > now and len(self.waiting) < self.config.max_batch_size else None

    def recover(self) -> None:
        """After a step that broke off, anywhere: everything running goes back to the line and will be computed again,
        what has ended is let go, and what was noted of a token that did not become known is crossed out."""
        everyone = list(dict.fromkeys([*self.running, *self.waiting]))
        old = self.cache
        self.cache = KVCache(old.pool.num_blocks, old.block_size, prefix_caching=old.prefix_caching)
        for request in everyone:
            if request.status == RequestStatus.RUNNING:
                self._count_preemption(request)
            request.block_ids.clear()
            request.num_pending = 0
            self.cache.release(request)
            del request.token_times[request.num_output :], request.logprobs[request.num_output :]
        self.running.clear()
        self.waiting = deque(request for request in everyone if not request.is_finished)

    def check_integrity(self) -> None:
        """Raises AssertionError when the two lists, the requests and the blocks disagree."""
        everyone = [*self.waiting, *self.running]
        assert len({id(request) for request in everyone}) == len(everyone), "a request stands in line twice"
        assert len(self.running) <= self.config.max_batch_size, f"{len(self.running)} requests run"
        for request in self.running:
            assert request.status == RequestStatus.RUNNING, f"{request.request_id} runs as {request.status.name}"
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), f"{request.status.name} waits"
            assert not request.block_ids, f"{request.request_id} waits and holds blocks"
        for request in everyone:
            assert 0 <= request.num_pending <= 1, f"{request.request_id}: {request.num_pending} tokens pending"
        self.cache.check_integrity(everyone)

    def _schedule_running(self, batch: ScheduledBatch) -> int:
        """Give every running request its tokens, oldest first; returns what is left of the budget, which prompts share:
        who decodes rides along, whatever they take."""
        budget, size = self.config.max_batched_tokens, self.cache.block_size
        running, decodes = self.running, batch.decodes
        index = 0
        while index < len(running):
            request = running[index]
            index += 1
            start = request.num_computed
            uncomputed = num_new = request.num_tokens - start
            decoding = uncomputed == 1 and start >= len(request.prompt_token_ids)  # is_decoding, without its price
            if uncomputed > budget and not decoding:
                num_new = self._chunk(uncomputed, budget, alone=not batch)
            if num_new == 0 or (request.num_pending and request.awaits_last):
                continue
            if start + num_new > len(request.block_ids) * size and not self._extend(request, start + num_new, batch):
                break
            if decoding:
                decodes.append(ScheduledRequest(request, start, 1))
            else:
                self._place(request, num_new, batch)
                budget = max(0, budget - num_new)
        return budget

    def _extend(self, request: Request, num_tokens: int, batch: ScheduledBatch) -> bool:
        """Take the blocks that a running request needs, from the youngest if need be; False if it lost its own."""
        while not self.cache.can_extend(request, num_tokens):
            victim = self.running[-1]
            self._preempt(victim, batch)
            if victim is request:
                return False
        self.cache.extend(request, num_tokens)
        return True

    def _admit(self, batch: ScheduledBatch, budget: int, now: float) -> None:
        if not self.waiting:
            return
        candidates, blocked_by = self._form_group(self, now)
        for request in candidates:
            if len(self.running) >= self.config.max_batch_size:
                blocked_by = "batch size"
                break
            match = self.cache.match(request)
            num_new = self._chunk(request.num_tokens - match.num_tokens, budget, alone=not batch)
            if num_new == 0:
                blocked_by = "token budget"
                break
            # The whole sequence must fit, not only its first chunk: admitting what cannot finish only preempts others.
            if not self.cache.can_admit(request, match, request.num_tokens):
                blocked_by = "blocks"
                break
            self._start(request, match, batch)
            self._place(request, num_new, batch)
            budget = max(0, budget - num_new)
        batch.blocked_by = blocked_by if self.waiting else None

    def _chunk(self, num_uncomputed: int, budget: int, *, alone: bool) -> int:
        """Tokens to compute now: as many as the budget holds, or all or none without chunked prefill."""
        if num_uncomputed <= budget:
            return num_uncomputed
        if self.config.chunked_prefill:
            return budget
        return num_uncomputed if alone else 0

    def _place(self, request: Request, num_new: int, batch: ScheduledBatch) -> None:
        """Into the batch, with its blocks. Those that prompt tokens fill can be found at once: whoever finds them is
        computed in this step, which writes keys and values of all its tokens before it reads any, or later."""
        start = request.num_computed
        self.cache.extend(request, start + num_new)
        item = ScheduledRequest(request, start, num_new)
        (batch.decodes if request.is_decoding else batch.prefills).append(item)
        if not request.num_pending:
            self.cache.publish(request, start + num_new)

    def _start(self, request: Request, match: PrefixMatch, batch: ScheduledBatch) -> None:
        self.running.append(request)  # listed before it is unlisted: an interrupt in between loses nobody
        self.waiting.remove(request)
        self.cache.adopt(request, match)
        if request.status == RequestStatus.WAITING:
            request.num_cached = match.num_tokens
            batch.admitted.append(request)
        request.status = RequestStatus.RUNNING

    def _preempt(self, request: Request, batch: ScheduledBatch) -> None:
        batch.preempted.append(request)
        batch.num_recomputed += request.num_computed
        self._count_preemption(request)
        self.waiting.appendleft(request)
        self.running.remove(request)
        self.cache.release(request)

    def _count_preemption(self, request: Request) -> None:
        request.num_preemptions += 1
        request.num_recomputed += request.num_computed
        request.prompt_logprobs.clear()
        request.status = RequestStatus.PREEMPTED

    def _count_padding(self, batch: ScheduledBatch) -> None:
        """What the same policy costs where rows are padded to the longest and finished ones keep their place."""
        if self.config.batching == "continuous" or not batch:
            batch.num_slots = len(batch.decodes) + len(batch.prefills)
            return
        items = batch.items
        batch.num_slots = max(len(self.group), len(items))
        batch.padding_tokens = batch.num_slots * max(item.num_new for item in items) - batch.num_tokens


def _continuous(scheduler: Scheduler, now: float) -> tuple[list[Request], str | None]:
    """Anybody may join at any step, in order of arrival."""
    room = scheduler.config.max_batch_size - len(scheduler.running)
    line = scheduler.waiting
    return [line[i] for i in range(min(len(line), room + 1))], None


def _static(scheduler: Scheduler, now: float) -> tuple[list[Request], str | None]:
    """The first max_batch_size in line form a batch; the next batch forms when its last member has ended."""
    if not _group_alive(scheduler):
        scheduler.group = [scheduler.waiting[i] for i in range(min(len(scheduler.waiting), _room(scheduler)))]
    return _members_waiting(scheduler), "batch policy"


def _dynamic(scheduler: Scheduler, now: float) -> tuple[list[Request], str | None]:
    """As static, but the batch may form for batch_window seconds and takes the lengths nearest to the oldest one's."""
    if not _group_alive(scheduler):
        if scheduler.next_wakeup(now) is not None:
            return [], "batch policy"
        oldest = scheduler.waiting[0]
        near = sorted(scheduler.waiting, key=lambda request: abs(request.num_tokens - oldest.num_tokens))
        scheduler.group = near[: _room(scheduler)]
    return _members_waiting(scheduler), "batch policy"


def _room(scheduler: Scheduler) -> int:
    return scheduler.config.max_batch_size


def _group_alive(scheduler: Scheduler) -> bool:
    return any(not request.is_finished for request in scheduler.group)


def _members_waiting(scheduler: Scheduler) -> list[Request]:
    running = {id(request) for request in scheduler.running}
    return [request for request in scheduler.group if not request.is_finished and id(request) not in running]


Policy = Callable[[Scheduler, float], tuple[list[Request], str | None]]
POLICIES: dict[str, Policy] = {"static": _static, "dynamic": _dynamic, "continuous": _continuous}
