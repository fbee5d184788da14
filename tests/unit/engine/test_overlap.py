"""Steps prepared while another runs give the tokens of the plain loop: on a device that is only a memory, with random
traffic, and on the torch runner, whose results are read one step late."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import NonFiniteLogitsError
from engine.loading.loader import LoadedModel, load_model
from engine.request import Request, RequestOutput
from engine.running.runner import Pending
from engine.running.simulated import SimulatedRunner
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import ScheduledBatch, ScheduledRequest, StepEvent, StepResult
from tests.unit.engine.support import Letters, StubModel, tiny_spec

BLOCK = 16
ALPHABET = 5


def next_token(sequence: Sequence[int], seed: int) -> int:
    """A function of the whole sequence, small enough that equal continuations happen."""
    return (seed + sum((i + 1) * token for i, token in enumerate(sequence))) % ALPHABET


def expected(prompt: Sequence[int], seed: int, params: SamplingParams, room: int) -> list[int]:
    """What a request must answer, however it is served."""
    output: list[int] = []
    while len(output) < min(params.max_tokens, room):
        output.append(next_token([*prompt, *output], seed))
        if output[-1] in params.stop_token_ids or any(text in Letters().decode(output) for text in params.stop):
            break
    return output


class Late:
    """A step that was computed at its launch and keeps its answer to itself until it is asked, in order and once."""

    def __init__(self, device: SlotDevice, number: int, result: StepResult | NonFiniteLogitsError) -> None:
        self._device, self._number, self._result = device, number, result

    def result(self) -> StepResult:
        assert self._number > self._device.read, "steps are read in order, each once"
        self._device.read = self._number
        if isinstance(self._result, NonFiniteLogitsError):
            raise self._result
        return self._result


class SlotDevice(SimulatedRunner):
    """Remembers which token lies in which slot, and samples from what it finds there through the block tables.

    A pending token is known here if the launch before sampled it, as on a GPU.
    """

    asynchronous = True  # type: ignore[assignment]

    def __init__(self, runner: SimulatedRunner) -> None:
        self.__dict__.update(runner.__dict__)
        self.slots: dict[tuple[int, int], int] = {}
        self.sampled: dict[Request, int] = {}
        self.launches, self.read = 0, -1
        self.poisoned = ""

    def launch(self, batch: ScheduledBatch) -> Pending:  # type: ignore[override]
        tokens: list[int | None] = []
        sampled: dict[Request, int] = {}
        for item in batch.items:  # a step writes everything before it reads
            new = item.request.token_range(item.start, item.stop)
            if len(new) < item.num_new:
                new = [*new, self.sampled[item.request]]
            self.slots.update(zip(self._places(item)[item.start :], new, strict=True))
        for item in batch.items:
            if not item.samples:
                tokens.append(None)
                continue
            sequence = [self.slots[place] for place in self._places(item)]
            sampled[item.request] = next_token(sequence, item.request.seed)
            tokens.append(sampled[item.request])
        self.sampled = sampled
        self.clock.advance(self.step_seconds(batch))
        bad = [request.request_id for request in sampled if request.request_id == self.poisoned]
        self.launches += 1
        return Late(self, self.launches, NonFiniteLogitsError(bad) if bad else StepResult(tokens))

    def _places(self, item: ScheduledRequest) -> list[tuple[int, int]]:
        blocks, size = item.request.block_ids, self.memory.block_size
        return [(blocks[t // size], t % size) for t in range(item.stop)]


def build(**options: Any) -> Engine:
    defaults = {"runner": "simulated", "memory_limit": 64 << 20, "block_size": BLOCK, "max_batch_size": 6}
    engine = Engine(EngineConfig(**{**defaults, **options}), model=StubModel(tiny_spec()))  # type: ignore[arg-type]
    engine.core.runner = SlotDevice(engine.core.runner)  # type: ignore[arg-type]
    return engine


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        max_tokens=rng.randint(1, 40),
        seed=rng.randrange(4),
        stop_token_ids=(rng.randrange(ALPHABET),) if rng.random() < 0.2 else (),
        stop=(Letters().decode([rng.randrange(ALPHABET) for _ in range(2)]),) if rng.random() < 0.3 else (),
        repetition_penalty=rng.choice([1.0] * 9 + [1.1]),
        logprobs=rng.choice([None] * 9 + [1]),
    )


def tight(blocks: int, **options: Any) -> dict[str, Any]:
    """A memory limit at which the pool has `blocks` blocks."""
    with build(**options) as engine:
        plan = engine.memory
    fixed = plan.limit - plan.free - plan.kv
    return {**options, "cache_ratio": 0.5, "memory_limit": fixed + 2 * blocks * plan.block_bytes + 64}


CASES: list[dict[str, Any]] = [
    {},
    {"batching": "static"},
    {"batching": "dynamic", "batch_window": 0.0},
    {"max_batched_tokens": 24},
    {"prefix_caching": False},
    {"chunked_prefill": False, "max_batched_tokens": 24},
]


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("blocks", [7, 64])
@pytest.mark.parametrize("overlap", [True, False])
def test_random_traffic_with_aborts(case: int, blocks: int, overlap: bool) -> None:
    """Each answer is what the sequence alone implies; an aborted one is a beginning of it."""
    rng = random.Random(100 * case + blocks)
    options = tight(blocks, **CASES[case])
    with build(overlap=overlap, **options) as engine:
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        sent: dict[str, tuple[list[int], SamplingParams]] = {}
        done: dict[str, RequestOutput] = {}
        told: dict[str, list[int]] = {}
        while len(sent) < 60 or engine.has_unfinished():
            while len(sent) < 60 and rng.random() < 0.5:
                room = engine.session_len - 1
                prompt = [rng.randrange(2) for _ in range(rng.randint(1, min(room, 50)))]
                params = random_params(rng)
                sent[engine.add_request(prompt, params)] = prompt, params
            if sent and rng.random() < 0.1:
                engine.abort(rng.choice(list(sent)))
            for output in engine.step():
                told.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finished:
                    assert output.request_id not in done, "an end is told once"
                    done[output.request_id] = output
            engine.check_integrity()
        assert done.keys() == sent.keys()
        for name, (prompt, params) in sent.items():
            answer = done[name].token_ids
            assert told[name] == answer, "what came bit by bit is what came"
            whole = expected(prompt, params.seed or 0, params, engine.session_len - len(prompt))
            if done[name].finish_reason == "abort":
                assert answer == whole[: len(answer)]
            else:
                assert answer == whole
        assert {"stop", "length", "abort"} == {output.finish_reason for output in done.values()}
        assert engine.scheduler.cache.pool.num_used == 0
        assert any(event.overlapped for event in events) is overlap
        assert all(first.end <= second.start for first, second in pairwise(events))
        if blocks == 7 and engine.config.batching == "continuous":
            assert any(event.num_preempted for event in events)


def test_the_next_step_is_launched_before_the_last_one_is_read() -> None:
    with build() as engine:
        device: Any = engine.runner
        engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
        assert engine.step() == [] and (device.launches, device.read) == (1, -1)
        assert [output.new_token_ids for output in engine.step()] == [[next_token([1, 2, 3], 0)]]
        assert (device.launches, device.read) == (2, 1)
        while engine.has_unfinished():
            engine.step()
        assert device.launches == 4, "how many tokens there will be is known beforehand: no step too many"


@pytest.mark.parametrize("overlap", [True, False])
def test_an_answer_is_a_prefix_that_the_next_turn_finds(overlap: bool) -> None:
    with build(overlap=overlap) as engine:
        first = engine.generate([[1] * 20], SamplingParams(max_tokens=45, seed=1))[0]
        turn = [*first.prompt_token_ids, *first.token_ids, 2, 2]
        second = engine.generate([turn], SamplingParams(max_tokens=5, seed=1))[0]
        assert second.num_cached == (20 + 44) // BLOCK * BLOCK, "all but the last token of the answer were computed"
        assert second.token_ids == expected(turn, 1, SamplingParams(max_tokens=5), 1000)


def test_a_stop_costs_one_step_whose_token_is_dropped() -> None:
    with build() as engine:
        device: Any = engine.runner
        whole = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, seed=1))[0].token_ids
        before, at = device.launches, whole.index(whole[3])
        output = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, seed=1, stop_token_ids=(whole[3],)))[0]
        assert output.token_ids == whole[: at + 1]
        assert device.launches - before == at + 2
        assert engine.next_wakeup() is None and engine.step() == []
        engine.check_integrity()


@pytest.mark.parametrize("params", [{"repetition_penalty": 1.2}, {"logprobs": 0}, {"prompt_logprobs": True}])
def test_requests_that_need_values_make_their_steps_wait(params: dict[str, Any]) -> None:
    with build() as engine:
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        engine.add_request([1] * 9, SamplingParams(max_tokens=40))
        for _ in range(3):
            engine.step()
        assert events[-1].overlapped
        exacting = engine.add_request([1] * 9, SamplingParams(max_tokens=5, **params))
        while exacting in engine.core.requests:
            engine.step()
        together = [event.overlapped for event in events if event.num_running == 2]
        # One step was on its way already; the first with both is prepared while that one runs, and waited for.
        assert together == [True, True, False, False, False]
        for _ in range(3):
            engine.step()
        assert events[-1].overlapped, "and it goes on as before when they have ended"
        assert "except with log-probabilities" in engine.description


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_broken_step_loses_nothing(error: type[BaseException], where: str) -> None:
    prompts = [[i % 2] * 20 for i in range(4)]
    with build() as engine:
        want = [output.token_ids for output in engine.generate(prompts, SamplingParams(max_tokens=9, seed=1))]
        launch, calls = engine.runner.launch, iter(range(1000))

        def breaks(batch: ScheduledBatch) -> Pending:
            number = next(calls)
            if number == 4 and where == "launch":
                raise error("broken on purpose")
            step = launch(batch)
            if number == 4:
                step.result = lambda: (_ for _ in ()).throw(error("broken on purpose"))  # type: ignore[method-assign]
            return step

        engine.runner.launch = breaks  # type: ignore[method-assign]
        for i, prompt in enumerate(prompts):
            engine.add_request(prompt, SamplingParams(max_tokens=9, seed=1), request_id=str(i))
        done: dict[str, list[int]] = {}
        broken = 0
        while engine.has_unfinished():
            try:
                done |= {output.request_id: output.token_ids for output in engine.step() if output.finished}
            except error:
                broken += 1
                engine.check_integrity()
        assert broken == 1
        assert [done[str(i)] for i in range(4)] == want


def test_a_request_without_an_answer_fails_alone_one_step_late() -> None:
    with build() as engine:
        device: Any = engine.runner
        want = engine.generate([[3] * 20], SamplingParams(max_tokens=12, seed=2))[0].token_ids
        for name in ("good", "bad"):
            engine.add_request([3] * 20, SamplingParams(max_tokens=12, seed=2), request_id=name)
        done: dict[str, RequestOutput] = {}
        for number in range(100):
            if number == 4:
                device.poisoned = "bad"
            done |= {output.request_id: output for output in engine.step() if output.finished}
            engine.check_integrity()
        assert (done["good"].finish_reason, done["good"].token_ids) == ("length", want)
        assert done["bad"].finish_reason == "error" and done["bad"].token_ids == want[: len(done["bad"].token_ids)]


def test_an_aborted_request_may_lack_an_answer() -> None:
    with build() as engine:
        device: Any = engine.runner
        names = [engine.add_request([i] * 20, SamplingParams(max_tokens=12)) for i in range(2)]
        device.poisoned = names[0]
        engine.step()
        engine.abort(names[0])
        outputs = [output for _ in range(30) for output in engine.step() if output.finished]
        ends = {output.request_id: output.finish_reason for output in outputs}
        assert ends == {names[0]: "abort", names[1]: "length"}


def test_events_count_the_tokens_that_were_handed_out() -> None:
    with build() as engine:
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        whole = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, seed=1))[0].token_ids
        stopping = SamplingParams(max_tokens=9, seed=1, stop_token_ids=(whole[3],))
        other = SamplingParams(max_tokens=30, seed=2)
        outputs = engine.generate([[1, 2, 3], [2, 2]], [stopping, other])
        assert sum(event.num_new_tokens for event in events) == 9 + sum(len(output.token_ids) for output in outputs)
        assert sum(event.num_finished for event in events) == 3


def test_nothing_overlaps_on_a_device_that_is_done_at_once() -> None:
    with Engine(EngineConfig(runner="simulated"), model=StubModel(tiny_spec())) as engine:  # type: ignore[arg-type]
        engine.add_request([1, 2, 3], SamplingParams(max_tokens=4))
        assert len(engine.step()) == 1
        assert "one step at a time" in engine.description


# --- the torch runner, read late -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(EngineConfig(model="synthetic:tiny")) as model:
        yield model


def serve(model: LoadedModel, params: Sequence[SamplingParams], **options: Any) -> tuple[list[Any], list[StepEvent]]:
    defaults: dict[str, Any] = {"model": "synthetic:tiny", "device": "cpu", "impl": "torch", "memory_limit": 64 << 20}
    with Engine(EngineConfig(**{**defaults, **options}), model=model) as engine:
        engine.runner.asynchronous = True  # type: ignore[misc]
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        prompts = [[(7 * i + j) % 500 for j in range(3 + 17 * (i % 5))] for i in range(len(params))]
        outputs = engine.generate(prompts, params)
        engine.check_integrity()
        chances = [([c.token_id for c in o.logprobs], len(o.prompt_logprobs)) for o in outputs]
        return [(o.token_ids, o.finish_reason, c) for o, c in zip(outputs, chances, strict=True)], events


@pytest.mark.parametrize("options", [{}, {"max_batched_tokens": 16}, {"max_batch_size": 3}])
def test_torch_steps_read_late(model: LoadedModel, options: dict[str, Any]) -> None:
    """Greedy, drawn, penalized and scored requests side by side; one of them ends by a token."""
    options = {"max_batch_size": 8, **options}
    drawn = [SamplingParams(max_tokens=4 + i, temperature=0.9, top_p=0.9, seed=i, ignore_eos=True) for i in range(6)]
    greedy = [SamplingParams(max_tokens=12 - i, ignore_eos=True) for i in range(6)]
    (tokens, *_), *_ = serve(model, greedy, overlap=False)[0]
    exacting = [
        SamplingParams(max_tokens=6, repetition_penalty=1.3),
        SamplingParams(max_tokens=3, logprobs=2, prompt_logprobs=True),
        SamplingParams(max_tokens=12, stop_token_ids=(tokens[5],)),
    ]
    for params in ([*greedy, *drawn], [*greedy, *drawn, *exacting]):
        late, events = serve(model, params, **options)
        plain, plain_events = serve(model, params, overlap=False, **options)
        assert late == plain
        assert any(event.overlapped for event in events) and not any(event.overlapped for event in plain_events)
