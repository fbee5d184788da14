"""The inner loop: steps are launched, their tokens collected, and everybody is answered, whatever breaks off.

vLLM's name for the same part: `EngineCore`, below the engine that callers see.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Sequence

from engine.errors import NonFiniteLogitsError
from engine.launched import LaunchedStep
from engine.model.detokenizer import Detokenizer
from engine.request import Request, RequestOutput, RequestStatus
from engine.running.runner import Done, Runner
from engine.scheduling.batch import ScheduledBatch, StepEvent, StepResult
from engine.scheduling.scheduler import FINISHED, Scheduler

Observer = Callable[[StepEvent], None]


class EngineCore:
    """Knows who is being served (`requests`, by id), which steps are on their way, and what nobody was told yet.

    On a runner that is asynchronous, `step` launches one step and then hands out the tokens of the one before, which
    the device has computed meanwhile: so the host prepares a step while the device computes another. A request that
    turns out to have ended is in one step too many; its token there is dropped. Without `overlap` one step follows the
    other, which gives the same tokens; steps with requests that need values take this plain loop by themselves.

    An interrupt may break off `add`, a step or `abandon` between any two lines: nobody is lost, nothing told twice.
    """

    def __init__(self, runner: Runner, scheduler: Scheduler, *, overlap: bool) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.clock = runner.clock
        self.requests: dict[str, Request] = {}
        self.observers: list[Observer] = []
        self._overlap = overlap
        self._detokenizers: dict[str, Detokenizer] = {}
        self._to_abort: list[str] = []
        self._undelivered: list[RequestOutput] = []
        self._launched: deque[LaunchedStep] = deque()
        self._events: deque[StepEvent] = deque()
        self._num_exacting = 0  # unfinished requests that need values
        self._num_finished = 0  # since the last event
        self._last_end = 0.0
        self._num_steps = 0

    @property
    def overlaps(self) -> bool:
        return self._overlap and self.runner.asynchronous

    def add(self, request: Request, detokenizer: Detokenizer) -> None:
        """Put a request in line; its id must not be among `requests`."""
        name = request.request_id
        try:
            self.requests[name], self._detokenizers[name] = request, detokenizer
            self._num_exacting += request.params.needs_values
            self.scheduler.add(request)
        except BaseException:  # an interrupt: a request stands everywhere or nowhere
            if request in self.scheduler.waiting:
                self.scheduler.waiting.remove(request)
            self.requests.pop(name, None)
            self._detokenizers.pop(name, None)
            raise

    def step(self) -> list[RequestOutput]:
        """One step, and all that is new."""
        self._run_step()
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def step_for(self, names: Container[str]) -> list[RequestOutput]:
        """One step, waited for where there is no work and no output of these requests yet; what is new of them. The
        outputs of others stay for their callers."""
        known = any(output.request_id in names for output in self._undelivered)
        wakeup = None if known else self._next_work()
        if wakeup is not None:
            self.clock.wait_until(wakeup)
        self._run_step()
        others = [output for output in self._undelivered if output.request_id not in names]
        outputs = self._undelivered
        if others:
            outputs = [output for output in outputs if output.request_id in names]
        self._undelivered = others
        return outputs

    def has_unfinished(self) -> bool:
        return bool(self.requests or self._undelivered)

    def next_wakeup(self) -> float | None:
        """When `step` will have work although it has none now; None means now, or never if nothing is unfinished."""
        return None if self._undelivered else self._next_work()

    def abort(self, request_id: str) -> bool:
        """End a request with the current step; False when no such request is being served."""
        if request_id not in self.requests or request_id in self._to_abort:
            return False
        self._to_abort.append(request_id)
        return True

    def abandon(self, names: Sequence[str]) -> None:
        """Abort requests whose caller has left; nobody waits for their outputs."""
        try:
            for name in names:
                self._finish_aborted(name)
        except BaseException:  # interrupted once more: the next step ends the others
            self._recover()
            self._to_abort += names
            raise
        if not self.requests:
            self._launched.clear()
        gone = set(names)
        self._undelivered = [output for output in self._undelivered if output.request_id not in gone]

    def clear(self) -> None:
        """End every request and let the observers go; nobody is told."""
        self._launched.clear()
        for request in list(self.requests.values()):
            self.scheduler.finish(request, RequestStatus.ABORTED, self.clock.now())
        for held in (self.requests, self._detokenizers, self._undelivered, self._to_abort, self.observers):
            held.clear()

    def check_integrity(self) -> None:
        """Raises AssertionError when lists, requests and blocks disagree."""
        self.scheduler.check_integrity()
        listed = {request.request_id for request in [*self.scheduler.waiting, *self.scheduler.running]}
        assert listed == set(self.requests), f"{listed ^ set(self.requests)} stand in one list only"

    def _run_step(self) -> None:
        """What becomes known is queued for the callers and told to the observers."""
        try:
            self._apply_aborts()
            room = self._launch()
            while len(self._launched) > room:
                self._collect()
        except NonFiniteLogitsError as error:
            self._recover()
            self._fail(error)
        except BaseException:
            self._recover()
            raise
        if not self.requests:
            self._launched.clear()  # a step too many: nobody waits for its tokens
        while self._events:
            event = self._events.popleft()
            for observer in list(self.observers):
                observer(event)

    def _next_work(self) -> float | None:
        """As `next_wakeup`, outputs that wait for their caller left out."""
        if self._to_abort or self._launched:
            return None
        return self.scheduler.next_wakeup(self.clock.now())

    def _launch(self) -> int:
        """Schedule and launch a step; returns how many may stay on their way: one, if the next can be built on it."""
        start = self.clock.now()
        batch = self.scheduler.schedule(start)
        if not batch:
            if batch.preempted:
                self._launched.append(LaunchedStep(batch, Done(StepResult([])), start, 0.0, False))
            return 0
        scheduled = self.clock.now()
        overlapped = bool(self._launched)
        pending = self.runner.launch(batch)
        self.scheduler.advance(batch)
        self._launched.append(LaunchedStep(batch, pending, start, scheduled - start, overlapped))
        exacting = self._num_exacting and any(item.request.params.needs_values for item in batch.items)
        return 1 if self.overlaps and not exacting else 0

    def _collect(self) -> None:
        """Wait for the oldest step on its way, and hand out its tokens."""
        step = self._launched[0]
        result = step.pending.result()
        self._launched.popleft()
        known = self.clock.now()
        told = self._complete(step.batch, result, known)
        self._apply_aborts()  # what was asked for while the step ran
        step.host_seconds += result.host_seconds + self.clock.now() - known
        span = max(step.start, self._last_end), known
        if self.observers:
            self._events.append(step.event(self._num_steps, result, span, told, self._num_finished, self.scheduler))
        self._num_steps, self._num_finished, self._last_end = self._num_steps + 1, 0, known

    def _complete(self, batch: ScheduledBatch, result: StepResult, now: float) -> int:
        """Hand out the step's tokens; returns how many found somebody who still waited for them."""
        for item, known in zip(batch.items, result.prompt_logprobs or (), strict=False):
            if known is not None and not item.request.is_finished:
                item.request.prompt_logprobs.extend(known)
        for item, chosen in zip(batch.items, result.logprobs or (), strict=False):
            if chosen is not None and not item.request.is_finished:
                item.request.logprobs.append(chosen)
        told = self.scheduler.complete(batch, result.token_ids, now)
        for request in told:
            status = self._ending(request)
            if status is not None:
                self.scheduler.finish(request, status, now)
            self._deliver(request)
        return len(told)

    def _ending(self, request: Request) -> RequestStatus | None:
        """Why the request ends with its newest token, or None."""
        output = request.output_token_ids
        if not output:
            return None
        if output[-1] in request.ends:
            return RequestStatus.STOPPED
        if request.params.stop:
            self._detokenizers[request.request_id].update(output)
            if self._detokenizers[request.request_id].stopped:
                return RequestStatus.STOPPED
        return RequestStatus.LENGTH if len(output) >= request.max_tokens else None

    def _deliver(self, request: Request) -> None:
        """Queue an output for the caller; it stays queued if the step breaks off before it is handed over."""
        name = request.request_id
        finished = request.status >= FINISHED
        first, stop = request.num_told, len(request.output_token_ids)
        output = RequestOutput(finished, request, self._detokenizers[name], first, stop)
        self._undelivered.append(output)
        output.note()
        if finished:
            self._num_finished += 1
            self._num_exacting -= request.params.needs_values
            del self.requests[name], self._detokenizers[name]

    def _apply_aborts(self) -> None:
        while self._to_abort:
            self._finish_aborted(self._to_abort.pop())

    def _finish_aborted(self, name: str) -> None:
        request = self.requests.get(name)
        if request is not None:
            self.scheduler.finish(request, RequestStatus.ABORTED, self.clock.now())
            self._deliver(request)

    def _fail(self, error: NonFiniteLogitsError) -> None:
        """End the requests the model had no answer for; the others of the batch are computed again without them."""
        for name in error.request_ids:
            request = self.requests.get(name)
            if request is None:  # it was aborted while the step ran
                continue
            request.error = str(error)
            self.scheduler.finish(request, RequestStatus.FAILED, self.clock.now())
            self._deliver(request)

    def _recover(self) -> None:
        """A step broke off, anywhere: forget what is on its way, rebuild the block lists, end what had already met its
        stop condition, and tell what had become known."""
        self._launched.clear()
        for output in self._undelivered:
            output.note()
            if output.finished and output.is_of(self.requests.get(output.request_id)):
                del self.requests[output.request_id]
        for request in self.requests.values():
            if not request.is_finished and (status := self._ending(request)) is not None:
                request.status, request.finish_time = status, self.clock.now()
        self.scheduler.recover()
        self._num_exacting = sum(request.params.needs_values for request in self.requests.values())
        for request in list(self.requests.values()):
            if request.is_finished:
                self._deliver(request)
