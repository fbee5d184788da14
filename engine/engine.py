"""The engine that callers see: requests in, tokens out, one `step()` at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm

from engine.admission import check_prompt, check_session_len, whole_tokens
from engine.config import EngineConfig
from engine.core import EngineCore, Observer
from engine.errors import ConfigError, RequestError
from engine.loading.loader import LoadedModel, load_model
from engine.model.detokenizer import Detokenizer
from engine.request import Request, RequestOutput
from engine.running.runner import Runner
from engine.running.simulated import SimulatedRunner
from engine.running.torch_runner import TorchRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.cache import KVCache
from engine.scheduling.scheduler import Scheduler, SchedulerConfig

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

    On a runner that is asynchronous, steps overlap: `step` hands out the tokens of the one before (see `EngineCore`).
    `EngineConfig.overlap` switches to the plain loop, which gives the same tokens.
    """

    def __init__(self, config: EngineConfig | None = None, *, model: LoadedModel | None = None) -> None:
        """`model` is borrowed, not closed: two engines, or one after another, may share the weights."""
        self.config = config or EngineConfig()
        self._owns_model = model is None
        self.model = model or load_model(self.config)
        try:
            check_session_len(self.config.session_len, self.model.spec.max_positions, "the model has positions for")
            runner = RUNNERS[self.config.runner](self.config, self.model)
            try:
                check_session_len(self.config.session_len, runner.memory.tokens_that_fit, "the KV pool holds")
            except ConfigError:
                runner.close()
                raise
        except BaseException:
            if self._owns_model:
                self.model.close()
            raise
        self.spec = runner.spec
        self.tokenizer = self.model.tokenizer
        self.memory = runner.memory
        self.clock = runner.clock
        self.block_size = self.memory.block_size
        self.session_len = self.config.session_len or min(self.spec.max_positions, self.memory.tokens_that_fit)
        scheduler = Scheduler(
            SchedulerConfig(
                batching=self.config.batching,
                max_batch_size=self.config.max_batch_size,
                max_batched_tokens=self.config.max_batched_tokens,
                batch_window=self.config.batch_window,
                chunked_prefill=self.config.chunked_prefill,
            ),
            KVCache(self.memory.num_blocks, self.block_size, prefix_caching=self.config.prefix_caching),
        )
        self.core = EngineCore(runner, scheduler, overlap=self.config.overlap)
        self._closed = False
        self._serial = itertools.count()

    @property
    def runner(self) -> Runner:
        return self.core.runner

    @property
    def scheduler(self) -> Scheduler:
        return self.core.scheduler

    @property
    def observers(self) -> list[Observer]:
        """Whom every step's event is told, in this order; append to it and remove from it."""
        return self.core.observers

    @property
    def description(self) -> str:
        beside = "steps are prepared while another runs, except with log-probabilities or repetition penalties"
        return f"{self.runner.description}; {beside if self.core.overlaps else 'one step at a time'}"

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
        while request_id is None and f"request-{number}" in self.core.requests:  # somebody was given that name
            number = next(self._serial)
        name = request_id if request_id is not None else f"request-{number}"
        if name in self.core.requests:
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
        self.core.add(request, Detokenizer(self.tokenizer, params.stop))
        return name

    def step(self) -> list[RequestOutput]:
        """Compute one step and return what is new, finished requests included; [] when nothing new is known.

        Where steps overlap, what is new comes from the step before.
        """
        self._check_open()
        return self.core.step()

    def has_unfinished(self) -> bool:
        return self.core.has_unfinished()

    def next_wakeup(self) -> float | None:
        """When `step` will have work although it has none now; None means now, or never if nothing is unfinished."""
        return self.core.next_wakeup()

    def abort(self, request_id: str) -> bool:
        """End a request; False when no such request is being served. Its last output comes with the current step."""
        return self.core.abort(request_id)

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
            self.core.abandon(names)
            raise
        return [done[name] for name in names]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Outputs of one prompt as they come; leaving the loop early aborts it."""
        names: list[str] = []
        try:
            names.append(self.add_request(prompt, params))
            yield from self._outputs(names)
        finally:
            self.core.abandon(names)

    def warm_up(self, num_tokens: int = 1024, params: Sequence[SamplingParams] = (SamplingParams(),)) -> None:
        """Compile kernels and capture CUDA graphs for every batch size, sequences of up to `num_tokens` tokens, and
        requests like those of `params`: whether they are greedy counts, or need more than the most likely token.

        Without it each is made when it is first needed, and the requests of that step wait: seconds where a kernel is
        compiled for the first time on a machine, tens of milliseconds after that.
        """
        self._check_open()
        self.runner.warm_up(num_tokens, {not p.greedy or p.needs_values for p in params})

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix that no running request holds."""
        self.scheduler.cache.reset()

    def measured_memory(self) -> dict[str, int]:
        return self.runner.measured_memory()

    def check_integrity(self) -> None:
        """Raises AssertionError when lists, requests and blocks disagree."""
        self.core.check_integrity()

    def close(self) -> None:
        """Abort everything and give all memory back; a second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self.core.clear()
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
            self._check_open()
            for output in self.core.step_for(awaited):
                if (output.finished or not last_only) and output.request_id in awaited:
                    if output.finished:
                        awaited.remove(output.request_id)
                    yield output
