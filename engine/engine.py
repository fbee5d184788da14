"""The engine: requests in, tokens out, one `step()` at a time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from engine.admission import check_prompt, check_session_len, whole_tokens
from engine.batch import ScheduledBatch, StepEvent, StepResult
from engine.cache import KVCache
from engine.config import EngineConfig
from engine.detokenizer import Detokenizer
from engine.errors import ConfigError, NonFiniteLogitsError, RequestError
from engine.launched import LaunchedStep
from engine.loader import LoadedModel, load_model
from engine.request import Request, RequestOutput, RequestStatus
from engine.runner import Done, Runner
from engine.sampling_params import SamplingParams
from engine.scheduler import FINISHED, Scheduler, SchedulerConfig
from engine.simulated import SimulatedRunner
from engine.torch_runner import TorchRunner

Observer = Callable[[StepEvent], None]
Prompt = str | Sequence[int]


def _simulated(config: EngineConfig, model: LoadedModel) -> Runner:
    return SimulatedRunner(config, model.spec)


def _torch(config: EngineConfig, model: LoadedModel) -> Runner:
    return TorchRunner(config, model)


RUNNERS: dict[str, Callable[[EngineConfig, LoadedModel], Runner]] = {"torch": _torch, "simulated": _simulated}


class Engine:
    """Serves one model in this process. A context manager; `close` gives all memory back.

    Synchronous and single-threaded on purpose: whoever calls `step` is the loop. An observer or a caller may `abort`
    at any time, also from inside a step. An exception in a step (an interrupt, a full device) leaves the engine usable:
    unfinished requests go back to the line and are computed again.

    On a runner that is asynchronous, `step` launches one step and then hands out the tokens of the one before, which
    the device has computed meanwhile: so the host prepares a step while the device computes another. A request that
    turns out to have ended is in one step too many; its token there is dropped. `EngineConfig.overlap` switches to the
    plain loop, which gives the same tokens; steps with requests that need values take it by themselves.
    """

    def __init__(self, config: EngineConfig | None = None, *, model: LoadedModel | None = None) -> None:
        """`model` is borrowed, not closed: two engines, or one after another, may share the weights."""
        self.config = config or EngineConfig()
        self._owns_model = model is None
        self.model = model or load_model(self.config)
        try:
            check_session_len(self.config.session_len, self.model.spec.max_positions, "the model has positions for")
            self.runner = RUNNERS[self.config.runner](self.config, self.model)
            try:
                check_session_len(self.config.session_len, self.runner.memory.tokens_that_fit, "the KV pool holds")
            except ConfigError:
                self.runner.close()
                raise
        except BaseException:
            if self._owns_model:
                self.model.close()
            raise
        self.spec = self.runner.spec
        self.tokenizer = self.model.tokenizer
        self.memory = self.runner.memory
        self.clock = self.runner.clock
        self.block_size = self.memory.block_size
        self.session_len = self.config.session_len or min(self.spec.max_positions, self.memory.tokens_that_fit)
        self.observers: list[Observer] = []
        self.scheduler = Scheduler(
            SchedulerConfig(
                batching=self.config.batching,
                max_batch_size=self.config.max_batch_size,
                max_batched_tokens=self.config.max_batched_tokens,
                batch_window=self.config.batch_window,
                chunked_prefill=self.config.chunked_prefill,
            ),
            KVCache(self.memory.num_blocks, self.block_size, prefix_caching=self.config.prefix_caching),
        )
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[str, Detokenizer] = {}
        self._to_abort: list[str] = []
        self._undelivered: list[RequestOutput] = []
        self._launched: deque[LaunchedStep] = deque()
        self._events: deque[StepEvent] = deque()
        self._num_exacting = 0  # unfinished requests that need values
        self._num_finished = 0  # since the last event
        self._last_end = 0.0
        self._closed = False
        self._num_steps = 0
        self._serial = itertools.count()

    @property
    def description(self) -> str:
        beside = "steps are prepared while another runs, except with log-probabilities or repetition penalties"
        return f"{self.runner.description}; {beside if self._overlaps else 'one step at a time'}"

    @property
    def _overlaps(self) -> bool:
        return self.config.overlap and self.runner.asynchronous

    def add_request(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        scheduled_arrival: float | None = None,
    ) -> str:
        """Put a prompt (text or token ids) in line; returns its id. Times are seconds on `clock`.

        Raises RequestError when the prompt is empty, holds what is no id of the vocabulary, or leaves no room for a
        token.
        """
        self._check_open()
        params = params or SamplingParams()
        number = next(self._serial)
        while request_id is None and f"request-{number}" in self._requests:  # somebody was given that name
            number = next(self._serial)
        name = request_id if request_id is not None else f"request-{number}"
        if name in self._requests:
            raise RequestError(f"request id {name!r} is already being served; ids must be unique")
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else whole_tokens(prompt)
        check_prompt(tokens, self.session_len, self.spec, self.memory.tokens_that_fit)
        now = self.clock.now()
        request = Request(
            request_id=name,
            prompt_token_ids=tokens,
            params=params,
            scheduled_arrival=now if scheduled_arrival is None else scheduled_arrival,
            arrival=now,
            seed=params.seed if params.seed is not None else (self.config.seed << 32) + number,
            max_tokens=min(params.max_tokens, self.session_len - len(tokens)),
            ends=frozenset(params.stop_token_ids + (() if params.ignore_eos else tuple(self.spec.eos_token_ids))),
        )
        try:
            self._requests[name], self._detokenizers[name] = request, Detokenizer(self.tokenizer, params.stop)
            self._num_exacting += params.needs_values
            self.scheduler.add(request)
        except BaseException:  # an interrupt: a request stands everywhere or nowhere
            if request in self.scheduler.waiting:
                self.scheduler.waiting.remove(request)
            self._requests.pop(name, None)
            self._detokenizers.pop(name, None)
            raise
        return name

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what is new, finished requests included; [] when nothing new is known.

        Where steps overlap, what is new comes from the step before.
        """
        self._check_open()
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
        if not self._requests:
            self._launched.clear()  # a step too many: nobody waits for its tokens
        while self._events:
            event = self._events.popleft()
            for observer in list(self.observers):
                observer(event)
        outputs, self._undelivered = self._undelivered, []
        return outputs

    def has_unfinished(self) -> bool:
        return bool(self._requests or self._undelivered)

    def next_wakeup(self) -> float | None:
        """When `step` will have work although it has none now; None means now, or never if nothing is unfinished."""
        return None if self._undelivered else self._next_work()

    def abort(self, request_id: str) -> bool:
        """End a request; False when no such request is being served. Its last output comes with the current step."""
        if request_id not in self._requests or request_id in self._to_abort:
            return False
        self._to_abort.append(request_id)
        return True

    def generate(
        self,
        prompts: Sequence[Prompt] | str,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = False,
    ) -> list[RequestOutput]:
        """Serve all prompts and return their final outputs in the order given; those of other requests stay for `step`.

        An interrupt aborts these prompts, and only these, before it is passed on.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts came with {len(each)} sampling params; give one, or one each")
        names: list[str] = []
        try:
            for prompt, p in zip(prompts, each, strict=True):
                names.append(self.add_request(prompt, p))
            last: Iterable[RequestOutput] = self._outputs(names, last_only=True)
            if progress:
                last = tqdm(last, total=len(names), desc="requests", unit="req")
            done = {output.request_id: output for output in last}
        except BaseException:
            self._abandon(names)
            raise
        return [done[name] for name in names]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come; leaving the loop early aborts it."""
        names: list[str] = []
        try:
            names.append(self.add_request(prompt, params))
            yield from self._outputs(names)
        finally:
            self._abandon(names)

    def warm_up(self, num_tokens: int = 1024) -> None:
        """Compile kernels and capture CUDA graphs for every batch size and sequences of up to `num_tokens` tokens.

        Without it each is made when it is first needed, and the requests of that step wait: seconds where a kernel is
        compiled for the first time on a machine, tens of milliseconds after that.
        """
        self._check_open()
        self.runner.warm_up(num_tokens)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request holds."""
        self.scheduler.cache.reset()

    def measured_memory(self) -> dict[str, int]:
        return self.runner.measured_memory()

    def check_integrity(self) -> None:
        """Raises AssertionError when lists, requests and blocks disagree."""
        self.scheduler.check_integrity()
        listed = {request.request_id for request in [*self.scheduler.waiting, *self.scheduler.running]}
        assert listed == set(self._requests), f"{listed ^ set(self._requests)} stand in one list only"

    def close(self) -> None:
        """Abort everything and give all memory back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._launched.clear()
        for request in list(self._requests.values()):
            self.scheduler.finish(request, RequestStatus.ABORTED, self.clock.now())
        for held in (self._requests, self._detokenizers, self._undelivered, self._to_abort, self.observers):
            held.clear()
        try:
            self.runner.close()
        finally:
            if self._owns_model:
                self.model.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("the engine is closed; build a new one")

    def _outputs(self, names: Sequence[str], *, last_only: bool = False) -> Iterator[RequestOutput]:
        """Outputs of these requests as they come, or the last one of each. Those of others stay for their callers."""
        awaited = set(names)
        while awaited:
            outputs = self._step_or_wait(awaited)
            self._undelivered += [output for output in outputs if output.request_id not in awaited]
            for output in outputs:
                if (output.finished or not last_only) and output.request_id in awaited:
                    if output.finished:
                        awaited.remove(output.request_id)
                    yield output

    def _step_or_wait(self, awaited: Container[str]) -> list[RequestOutput]:
        known = any(output.request_id in awaited for output in self._undelivered)
        wakeup = None if known else self._next_work()
        if wakeup is not None:
            self.clock.wait_until(wakeup)
        return self.step()

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
        return 1 if self._overlaps and not exacting else 0

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
            del self._requests[name], self._detokenizers[name]

    def _apply_aborts(self) -> None:
        while self._to_abort:
            self._finish_aborted(self._to_abort.pop())

    def _finish_aborted(self, name: str) -> None:
        request = self._requests.get(name)
        if request is not None:
            self.scheduler.finish(request, RequestStatus.ABORTED, self.clock.now())
            self._deliver(request)

    def _fail(self, error: NonFiniteLogitsError) -> None:
        """End the requests the model had no answer for; the others of the batch are computed again without them."""
        for name in error.request_ids:
            request = self._requests.get(name)
            if request is None:  # it was aborted while the step ran
                continue
            request.error = str(error)
            self.scheduler.finish(request, RequestStatus.FAILED, self.clock.now())
            self._deliver(request)

    def _abandon(self, names: Sequence[str]) -> None:
        """Abort requests whose caller has left; nobody waits for their outputs."""
        try:
            for name in names:
                self._finish_aborted(name)
        except BaseException:  # interrupted once more: the next step ends the others
            self._recover()
            self._to_abort += names
            raise
        if not self._requests:
            self._launched.clear()
        gone = set(names)
        self._undelivered = [output for output in self._undelivered if output.request_id not in gone]

    def _recover(self) -> None:
        """A step broke off, anywhere: forget what is on its way, rebuild the block lists, end what had already met its
        stop condition, and tell what had become known."""
        self._launched.clear()
        for output in self._undelivered:
            output.note()
            if output.finished and output.is_of(self._requests.get(output.request_id)):
                del self._requests[output.request_id]
        for request in self._requests.values():
            if not request.is_finished and (status := self._ending(request)) is not None:
                request.status, request.finish_time = status, self.clock.now()
        self.scheduler.recover()
        self._num_exacting = sum(request.params.needs_values for request in self._requests.values())
        for request in list(self._requests.values()):
            if request.is_finished:
                self._deliver(request)
