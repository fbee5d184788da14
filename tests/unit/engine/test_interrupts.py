"""An interrupt may arrive between any two lines of the loop: whatever it breaks off, everybody is answered in full and
once, and every list agrees."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import pytest

from engine import core, engine, request
from engine.engine import Engine
from engine.request import RequestOutput, TokenLogprobs
from engine.running.runner import Pending
from engine.sampling_params import SamplingParams
from engine.scheduling import batch, blocks, cache, scheduler
from engine.scheduling.batch import ScheduledBatch, StepResult
from tests.unit.engine.test_overlap import Late, SlotDevice, build, expected, tight

WATCHED = {module.__file__ for module in (batch, blocks, cache, core, engine, request, scheduler)}
SPARED = ("return outputs", "return name", "self.core.abandon(names)", "try:")
"""What was given away is its caller's to lose, and before a clean-up begins nothing can be cleaned up."""
STRIDE = 37  # every line takes about a minute; it was run so, too

PARAMS = [
    SamplingParams(max_tokens=6, seed=0),
    SamplingParams(max_tokens=9, seed=1, stop_token_ids=(2,), logprobs=0),
    SamplingParams(max_tokens=12, seed=2, prompt_logprobs=True),
    SamplingParams(max_tokens=1, seed=3, prompt_logprobs=True, logprobs=1),
]
PROMPTS = [[i % 2] * (10 + 9 * i) for i in range(len(PARAMS))]


class ValuedDevice(SlotDevice):
    """Also returns log-probabilities that tell which token or position they belong to."""

    def launch(self, batch: ScheduledBatch) -> Pending:
        late = super().launch(batch)
        assert isinstance(late, Late) and isinstance(late._result, StepResult)
        result, items = late._result, batch.items
        asked = [item.request.params for item in items]
        result.logprobs = [
            TokenLogprobs(token, 0.0) if token is not None and params.logprobs is not None else None
            for token, params in zip(result.token_ids, asked, strict=True)
        ]
        result.prompt_logprobs = [
            [-float(at) for at in range(item.start + 1, min(item.stop, item.request.num_prompt - 1) + 1)]
            if params.prompt_logprobs
            else None
            for item, params in zip(items, asked, strict=True)
        ]
        return late


class Interrupt:
    """Raises KeyboardInterrupt before the n-th line of the loop that is run inside."""

    def __init__(self, at: int) -> None:
        self.at, self.lines, self.where = at, 0, ""

    @contextmanager
    def armed(self) -> Iterator[None]:
        sys.settrace(self._enter)
        try:
            yield
        finally:
            sys.settrace(None)

    def _enter(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename in WATCHED else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            line = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
            self.lines += line not in SPARED
            if self.lines == self.at and not self.where:
                self.where = f"{frame.f_code.co_name}: {line}"
                raise KeyboardInterrupt
        return self._line


def serve(served: Engine, interrupt: Interrupt) -> dict[str, tuple[list[int], RequestOutput]]:
    """Each request's tokens as they were told, and its last output."""
    told: dict[str, list[int]] = {}
    done: dict[str, tuple[list[int], RequestOutput]] = {}
    for _ in range(200):
        if not served.has_unfinished():
            return done
        outputs = []
        try:
            with interrupt.armed():
                outputs = served.step()
        except KeyboardInterrupt:
            served.check_integrity()
        for output in outputs:
            assert output.request_id not in done, "an end is told once"
            told.setdefault(output.request_id, []).extend(output.new_token_ids)
            if output.finished:
                done[output.request_id] = told[output.request_id], output
    raise AssertionError("somebody is never answered")


def run(options: dict[str, Any], interrupt: Interrupt) -> None:
    with build(**options) as served:
        served.core.runner = ValuedDevice(served.core.runner)  # type: ignore[arg-type]
        names = [served.add_request(prompt, params) for prompt, params in zip(PROMPTS, PARAMS, strict=True)]
        done = serve(served, interrupt)
        served.check_integrity()
        assert served.scheduler.cache.pool.num_used == 0
    for name, prompt, params in zip(names, PROMPTS, PARAMS, strict=True):
        told, output = done[name]
        assert told == output.token_ids == expected(prompt, params.seed or 0, params, 1000)
        assert len(output.timing.token_times) == len(told)
        assert [chosen.token_id for chosen in output.logprobs] == (told if params.logprobs is not None else [])
        known = range(1, len(prompt)) if params.prompt_logprobs else ()
        assert output.prompt_logprobs == [-float(at) for at in known]


@pytest.mark.parametrize("overlap", [True, False])
def test_a_step_may_break_off_at_any_line(overlap: bool) -> None:
    options = tight(7, overlap=overlap, max_batch_size=3, max_batched_tokens=24)
    whole = Interrupt(0)
    run(options, whole)
    assert whole.lines > 1000
    for at in range(1, whole.lines, STRIDE):
        interrupt = Interrupt(at)
        try:
            run(options, interrupt)
        except Exception as error:
            raise AssertionError(f"interrupted in {interrupt.where}") from error


def test_an_interrupted_request_stands_nowhere() -> None:
    """Whatever line of adding it breaks off: its name is free again."""
    at, broken = 0, True
    while broken:
        at += 1
        interrupt = Interrupt(at)
        with build() as served:
            with suppress(KeyboardInterrupt), interrupt.armed():
                served.add_request(PROMPTS[0], PARAMS[0], request_id="a")
            served.check_integrity()
            broken = bool(interrupt.where)
            if broken:
                served.add_request(PROMPTS[0], PARAMS[0], request_id="a")
            assert serve(served, Interrupt(0)).keys() == {"a"}, interrupt.where
    assert at > 10


def generate(served: Engine) -> None:
    served.generate([[0] * 12, [1, 0] * 8], SamplingParams(max_tokens=4, seed=1))


def leave_a_stream(served: Engine) -> None:
    outputs = served.stream([0] * 12, SamplingParams(max_tokens=6, seed=1))
    next(outputs)
    outputs.close()  # type: ignore[attr-defined]


def call(options: dict[str, Any], use: Callable[[Engine], None], interrupt: Interrupt) -> None:
    """Beside another request, which is answered in full and is the only one that goes on."""
    with build(**options) as served:
        other = served.add_request([1] * 20, SamplingParams(max_tokens=12, seed=5))
        outputs = served.step()
        with suppress(KeyboardInterrupt), interrupt.armed():
            use(served)
        served.check_integrity()
        outputs += served.step()
        assert set(served.core.requests) <= {other}
        while served.has_unfinished():
            outputs += served.step()
        served.check_integrity()
        [last] = [output for output in outputs if output.finished and output.request_id == other]
        assert last.token_ids == expected([1] * 20, 5, SamplingParams(max_tokens=12), 1000)
        told = [token for output in outputs if output.request_id == other for token in output.new_token_ids]
        assert told == last.token_ids, "its outputs stay for its caller"


@pytest.mark.parametrize("use", [generate, leave_a_stream])
def test_a_call_may_break_off_at_any_line(use: Callable[[Engine], None]) -> None:
    options = tight(7, max_batch_size=3, max_batched_tokens=24)
    whole = Interrupt(0)
    call(options, use, whole)
    for at in range(1, whole.lines, STRIDE // 3):
        interrupt = Interrupt(at)
        try:
            call(options, use, interrupt)
        except Exception as error:
            raise AssertionError(f"interrupted in {interrupt.where}") from error
