"""The serving loop, on the simulated runner: exact times, events, aborts, stops, steps that break off."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from engine.engine import Engine
from engine.errors import NonFiniteLogitsError
from engine.running.runner import Pending
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, StepEvent
from tests.unit.engine.simulated import build


@pytest.fixture
def engine() -> Iterator[Engine]:
    with build() as engine:
        yield engine


def test_a_simulated_run_repeats_exactly() -> None:
    def run() -> list[tuple[object, ...]]:
        with build(batching="dynamic") as engine:
            events: list[StepEvent] = []
            engine.observers.append(events.append)
            outputs = engine.generate([[i] * 30 for i in range(30)], SamplingParams(max_tokens=20))
            return [*events, *[(tuple(o.token_ids), o.timing) for o in outputs]]  # type: ignore[list-item]

    assert run() == run()


def test_times_are_the_cost_model_s(engine: Engine) -> None:
    from engine.request import Request
    from engine.scheduling.batch import ScheduledRequest

    output = engine.generate([list(range(32))], SamplingParams(max_tokens=3))[0]

    def cost(start: int, new: int) -> float:
        request = Request("x", [0] * (start + new), SamplingParams(), 0.0, 0.0)
        return engine.runner.step_seconds(ScheduledBatch(prefills=[ScheduledRequest(request, start, new)]))  # type: ignore[attr-defined]

    assert output.timing.ttft == pytest.approx(cost(0, 32))
    assert output.timing.itl == pytest.approx((cost(32, 1), cost(33, 1)))
    assert output.timing.latency == pytest.approx(cost(0, 32) + cost(32, 1) + cost(33, 1))


def test_latency_counts_from_the_scheduled_arrival(engine: Engine) -> None:
    engine.clock.wait_until(5.0)
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=1), scheduled_arrival=2.0)
    [output] = engine.step()
    assert output.timing.ttft is not None and output.timing.ttft > 3.0


def test_events_account_for_every_token(engine: Engine) -> None:
    events: list[StepEvent] = []
    engine.observers.append(events.append)
    shared = list(range(64))
    outputs = engine.generate([[*shared, i] for i in range(20)], SamplingParams(max_tokens=5))
    assert sum(event.num_new_tokens for event in events) == 100
    assert sum(event.num_finished for event in events) == 20
    assert sum(event.query_tokens for event in events) == 20 * 65
    hits = sum(event.hit_tokens for event in events)
    assert hits == sum(output.num_cached for output in outputs) > 0
    prefilled = sum(event.num_prefill_tokens for event in events)
    assert prefilled == 20 * 65 - hits
    assert all(a.end <= b.start for a, b in pairwise(events))


def test_abort_waiting_running_and_unknown(engine: Engine) -> None:
    names = [engine.add_request([i] * 20, SamplingParams(max_tokens=50)) for i in range(12)]
    engine.step()
    assert engine.abort(names[0]) and engine.abort(names[11])
    assert not engine.abort("nobody")
    ended = [output for output in engine.step() if output.finished]
    assert {output.request_id for output in ended} == {names[0], names[11]}
    assert {output.finish_reason for output in ended} == {"abort"}
    assert not engine.abort(names[0])
    engine.check_integrity()


def test_an_observer_may_abort_in_the_middle_of_a_step(engine: Engine) -> None:
    name = engine.add_request([1] * 20, SamplingParams(max_tokens=50))
    engine.observers.append(lambda event: None if event.step != 3 else engine.abort(name) and None)
    outputs = [output for _ in range(6) for output in engine.step()]
    assert outputs[-1].finish_reason == "abort"
    assert not engine.has_unfinished()
    engine.check_integrity()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_broken_step_loses_nothing(engine: Engine, error: type[BaseException]) -> None:
    want = [o.token_ids for o in engine.generate([[i] * 20 for i in range(4)], SamplingParams(max_tokens=9, seed=1))]
    launch, calls = engine.runner.launch, iter(range(1000))

    def breaks(batch: ScheduledBatch) -> Pending:
        if next(calls) == 4:
            raise error("broken on purpose")
        return launch(batch)

    engine.runner.launch = breaks  # type: ignore[method-assign]
    for i in range(4):
        engine.add_request([i] * 20, SamplingParams(max_tokens=9, seed=1), request_id=str(i))
    done: dict[str, list[int]] = {}
    broken = 0
    while engine.has_unfinished():
        try:
            done |= {o.request_id: o.token_ids for o in engine.step() if o.finished}
        except error:
            broken += 1
            engine.check_integrity()
    assert broken == 1
    assert [done[str(i)] for i in range(4)] == want


def test_a_request_without_an_answer_fails_alone(engine: Engine) -> None:
    launch = engine.runner.launch

    def poisoned(batch: ScheduledBatch) -> Pending:
        if any(item.request.request_id == "bad" and item.start > 20 for item in batch.items):
            raise NonFiniteLogitsError(["bad"])
        return launch(batch)

    engine.runner.launch = poisoned  # type: ignore[method-assign]
    for name in ("good", "bad"):
        engine.add_request([3] * 20, SamplingParams(max_tokens=9), request_id=name)
    done = {}
    while engine.has_unfinished():
        done |= {output.request_id: output for output in engine.step() if output.finished}
        engine.check_integrity()
    assert (done["good"].finish_reason, len(done["good"].token_ids)) == ("length", 9)
    assert done["bad"].finish_reason == "error"
    assert "request bad are not finite" in str(done["bad"].error)


def test_stop_token_and_stop_string_end_a_request(engine: Engine) -> None:
    whole = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3))[0]
    by_id = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3, stop_token_ids=(whole.token_ids[4],)))[0]
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4]) + 1]
    stop = whole.text[5:7]
    by_text = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3, stop=(stop,)))[0]
    assert by_text.finish_reason == "stop"
    assert by_text.text == whole.text[: whole.text.index(stop)]
