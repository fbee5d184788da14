"""The loop, on the simulated runner: exact times, order, abort, interrupts, observers, bad input."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from engine.batch import ScheduledBatch, StepEvent
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, NonFiniteLogitsError, RequestError
from engine.request import RequestOutput
from engine.runner import Pending
from engine.sampling_params import SamplingParams
from tests.unit.engine.support import StubModel, tiny_spec


def build(**options: object) -> Engine:
    defaults = {"runner": "simulated", "memory_limit": 64 << 20, "block_size": 16, "max_batch_size": 8}
    return Engine(EngineConfig(**{**defaults, **options}), model=StubModel(tiny_spec()))  # type: ignore[arg-type]


@pytest.fixture
def engine() -> Iterator[Engine]:
    with build() as engine:
        yield engine


def test_outputs_come_in_the_order_of_the_prompts(engine: Engine) -> None:
    params = [SamplingParams(max_tokens=1 + i) for i in range(20)]
    outputs = engine.generate([[i] * (40 - i) for i in range(20)], params)
    assert [len(output.token_ids) for output in outputs] == list(range(1, 21))
    assert [output.prompt_token_ids[0] for output in outputs] == list(range(20))
    assert {output.finish_reason for output in outputs} == {"length"}
    engine.check_integrity()


def test_progress_counts_requests_and_is_not_made_for_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[tqdm[RequestOutput]] = []

    def kept(outputs: Iterator[RequestOutput], **options: Any) -> tqdm[RequestOutput]:
        bars.append(tqdm(outputs, file=io.StringIO(), **options))
        return bars[-1]

    monkeypatch.setattr("engine.engine.tqdm", kept)
    params = [SamplingParams(max_tokens=1 + i) for i in range(5)]
    engine.generate([[1, 2]] * 5, params)
    assert not bars
    engine.generate([[1, 2]] * 5, params, progress=True)
    assert [(bar.n, bar.total) for bar in bars] == [(5, 5)]


def test_a_simulated_run_repeats_exactly() -> None:
    def run() -> list[tuple[object, ...]]:
        with build(batching="dynamic") as engine:
            events: list[StepEvent] = []
            engine.observers.append(events.append)
            outputs = engine.generate([[i] * 30 for i in range(30)], SamplingParams(max_tokens=20))
            return [*events, *[(tuple(o.token_ids), o.timing) for o in outputs]]  # type: ignore[list-item]

    assert run() == run()


def test_times_are_the_cost_model_s(engine: Engine) -> None:
    from engine.batch import ScheduledRequest
    from engine.request import Request

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


def test_an_interrupted_generate_aborts_its_own_prompts_only(engine: Engine) -> None:
    other = engine.add_request([7] * 10, SamplingParams(max_tokens=30))

    def interrupt(event: StepEvent) -> None:
        if event.step == 5:
            raise KeyboardInterrupt

    engine.observers.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([[1] * 10, [2] * 10], SamplingParams(max_tokens=30))
    engine.check_integrity()
    left = []
    while engine.has_unfinished():
        left += [output for output in engine.step() if output.finished]
    assert [output.request_id for output in left] == [other]
    assert left[0].finish_reason == "length"


def test_leaving_a_stream_aborts_it(engine: Engine) -> None:
    for output in engine.stream([1, 2, 3], SamplingParams(max_tokens=100)):
        if len(output.token_ids) == 4:
            break
    assert not engine.has_unfinished()
    engine.check_integrity()


def test_streams_side_by_side_get_all_of_their_own(engine: Engine) -> None:
    prompts, lengths = ([1, 2, 3], [4, 5]), (5, 9)
    params = [SamplingParams(max_tokens=length, seed=1) for length in lengths]
    alone = [engine.generate([prompt], each)[0].token_ids for prompt, each in zip(prompts, params, strict=True)]
    told: list[list[int]] = [[], []]
    for outputs in zip_longest(*map(engine.stream, prompts, params)):
        for tokens, output in zip(told, outputs, strict=True):
            tokens += output.new_token_ids if output else []
    assert told == alone
    assert not engine.has_unfinished()


def test_generate_leaves_the_outputs_of_others_to_them(engine: Engine) -> None:
    name = engine.add_request([7] * 10, SamplingParams(max_tokens=3, seed=1))
    whole = engine.generate([[7] * 10, [1] * 10], SamplingParams(max_tokens=20, seed=1))[0]
    assert engine.has_unfinished(), "its end was not told yet"
    told = engine.step()
    assert {output.request_id for output in told} == {name} and told[-1].finished
    assert [token for output in told for token in output.new_token_ids] == whole.token_ids[:3]
    assert not engine.has_unfinished()


def test_outputs_of_others_do_not_stop_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that forms in a window of time is waited for, also while somebody has not fetched what is theirs."""
    with build(batching="dynamic", batch_window=1.0) as engine:
        engine.add_request([1, 2, 3], SamplingParams(max_tokens=1))
        engine.generate([[4, 5, 6]], SamplingParams(max_tokens=1))
        assert engine.has_unfinished() and engine.next_wakeup() is None
        step_for, calls = engine.core.step_for, iter(range(10))
        monkeypatch.setattr(engine.core, "step_for", lambda names: [next(calls), step_for(names)][1])
        before = engine.clock.now()
        assert engine.generate([[7, 8, 9]], SamplingParams(max_tokens=1))[0].finish_reason == "length"
        assert engine.clock.now() > before + 1.0


def test_stop_token_and_stop_string_end_a_request(engine: Engine) -> None:
    whole = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3))[0]
    by_id = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3, stop_token_ids=(whole.token_ids[4],)))[0]
    assert by_id.token_ids == whole.token_ids[: whole.token_ids.index(whole.token_ids[4]) + 1]
    stop = whole.text[5:7]
    by_text = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=12, seed=3, stop=(stop,)))[0]
    assert by_text.finish_reason == "stop"
    assert by_text.text == whole.text[: whole.text.index(stop)]


def test_a_request_is_cut_to_what_the_session_holds() -> None:
    with build(session_len=32) as engine:
        output = engine.generate([[1] * 20], SamplingParams(max_tokens=1000))[0]
        assert len(output.token_ids) == 12
        assert output.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "prompt is empty"),
        ("", "prompt is empty"),
        ([1] * 5000, "the prompt has 5,000 tokens"),
        ([1, 999_999], "token id 999999 is outside the vocabulary"),
        ([-1], "token id -1 is outside"),
        ([1, 2.5], "prompt holds 2.5; token ids are whole numbers"),
        (torch.tensor([1.0, 2.5]), r"prompt holds tensor\(1.\); token ids are whole numbers"),
        (["a", "b"], "prompt holds 'a'; token ids are whole numbers"),
        (7, "prompt is 7; it must be text or token ids"),
    ],
)
def test_a_bad_prompt_is_refused_and_the_others_are_served(engine: Engine, prompt: object, words: str) -> None:
    good = engine.add_request([1, 2, 3], SamplingParams(max_tokens=2))
    with pytest.raises(RequestError, match=words):
        engine.add_request(prompt)  # type: ignore[arg-type]
    engine.check_integrity()
    outputs = [*engine.step(), *engine.step()]
    assert outputs[-1].request_id == good and outputs[-1].finished


def test_equal_request_ids_are_refused(engine: Engine) -> None:
    engine.add_request([1], request_id="a")
    with pytest.raises(RequestError, match="'a' is already being served"):
        engine.add_request([1], request_id="a")


def test_a_pool_without_room_is_refused_with_the_bytes_needed() -> None:
    with pytest.raises(ConfigError, match=r"memory_limit is 1.1 MB; weights .*at least [\d,.]+ MB"):
        build(memory_limit=1 << 20)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"session_len": 5000}, "session_len is 5,000; the model has positions for 4,096 tokens"),
        ({"session_len": 4000, "memory_limit": 12 << 20}, r"session_len is 4,000; the KV pool holds [\d,]+ tokens"),
    ],
)
def test_a_session_longer_than_model_or_pool_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_closed_twice_and_used_after(engine: Engine) -> None:
    engine.add_request([1, 2])
    engine.close()
    engine.close()
    for use in (engine.step, lambda: engine.add_request([1])):
        with pytest.raises(RequestError, match="engine is closed"):
            use()


def test_a_closed_engine_has_nothing_left_and_says_so(engine: Engine) -> None:
    engine.add_request([1] * 5, SamplingParams(max_tokens=1))
    engine.generate([[2] * 5], SamplingParams(max_tokens=1))
    assert engine.has_unfinished(), "an output that nobody has fetched"
    engine.close()
    assert not engine.has_unfinished() and engine.next_wakeup() is None and not engine.abort("request-0")
    with pytest.raises(RequestError, match="engine is closed"):
        engine.warm_up()


def test_a_device_that_fails_in_closing_does_not_keep_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    monkeypatch.setattr("engine.engine.load_model", lambda config: StubModel(tiny_spec()))
    monkeypatch.setattr(StubModel, "close", lambda self: closed.append("model"))

    def lost() -> None:
        raise RuntimeError("the device is lost")

    engine = Engine(EngineConfig(runner="simulated", memory_limit=64 << 20))
    engine.runner.close = lost  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="device is lost"):
        engine.close()
    assert closed == ["model"]


def test_a_name_that_was_given_is_not_given_again(engine: Engine) -> None:
    engine.add_request([1], request_id="request-1")
    names = [engine.add_request([2]) for _ in range(3)]
    assert len({*names, "request-1"}) == 4


def test_two_engines_side_by_side_do_not_meet() -> None:
    with build() as one, build(batching="static") as two:
        a = one.add_request([1] * 10, SamplingParams(max_tokens=3, seed=1), request_id="x")
        two.add_request([2] * 10, SamplingParams(max_tokens=3, seed=1), request_id="x")
        one.step()
        assert one.abort(a) and two.has_unfinished()
        two.check_integrity()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cache_ratio": -0.5}, "cache_ratio is -0.5"),
        ({"cache_ratio": float("nan")}, "cache_ratio is nan"),
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"weights": "int3"}, "weights is 'int3'; it must be one of bf16"),
        ({"kv": "int5"}, "kv is 'int5'"),
        ({"batching": "magic"}, "must be one of static, dynamic, continuous"),
        ({"gpu": "abacus"}, "gpu is 'abacus'; it must be one of h200"),
        ({"max_batched_tokens": 16, "max_batch_size": 32}, "at least max_batch_size"),
        ({"group_size": 100}, "group_size is 100"),
        ({"block_size": 7}, "block_size is 7"),
        ({"batch_window": -1.0}, "batch_window is -1.0 s"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": np.int64(3)}, "seed is .*3.*; it must be a whole number"),
    ],
)
def test_bad_configuration_names_value_and_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)


def test_an_unknown_keyword_is_an_error() -> None:
    with pytest.raises(TypeError, match="cache_fraction"):
        EngineConfig(cache_fraction=0.5)  # type: ignore[call-arg]


def test_lmdeploy_names_are_understood() -> None:
    config = EngineConfig.from_lmdeploy(
        "bundled", cache_max_entry_count=0.5, quant_policy=8, enable_prefix_caching=False, session_len=128
    )
    assert (config.cache_ratio, config.kv, config.prefix_caching, config.session_len) == (0.5, "int8", False, 128)
    with pytest.raises(ConfigError, match="quant_policy is 5"):
        EngineConfig.from_lmdeploy("bundled", quant_policy=5)
    with pytest.raises(ConfigError, match="unknown LMDeploy option 'enable_prefix_optimization'"):
        EngineConfig.from_lmdeploy("bundled", enable_prefix_optimization=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop": ("",)}, "must not be empty"),
        ({"logprobs": 50}, "logprobs is 50"),
        ({"temperature": None}, "temperature is None; it must be a number"),
        ({"top_p": "0.9"}, "top_p is '0.9'; it must be a number"),
        ({"max_tokens": float("nan")}, "max_tokens is nan; it must be a whole number"),
        ({"max_tokens": None}, "max_tokens is None; it must be a whole number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be a whole number"),
        ({"logprobs": 1.5}, "logprobs is 1.5; it must be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it must be a whole number"),
        ({"seed": "a"}, "seed is 'a'; it must be a whole number"),
        ({"stop": (5,)}, "must be text"),
        ({"stop": None}, "must be text"),
        ({"stop_token_ids": (1.5,)}, "stop_token_ids is 1.5; it must be a whole number"),
        ({"stop_token_ids": 7}, "must be token ids"),
    ],
)
def test_bad_sampling_options_name_value_and_range(options: dict[str, object], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        SamplingParams(**options)  # type: ignore[arg-type]


def test_whole_numbers_of_other_libraries_are_taken() -> None:
    """A seed drawn by NumPy, ids out of an array: a step would fail on them, for everybody in it."""
    params = SamplingParams(
        seed=np.int64(-3),  # type: ignore[arg-type]
        top_k=np.int32(4),  # type: ignore[arg-type]
        max_tokens=np.uint8(3),  # type: ignore[arg-type]
        stop=["a", "b"],  # type: ignore[arg-type]
        stop_token_ids=np.array([7, 8]),  # type: ignore[arg-type]
    )
    assert params == SamplingParams(seed=-3, top_k=4, max_tokens=3, stop=("a", "b"), stop_token_ids=(7, 8))
    assert {type(params.seed), type(params.top_k), type(params.max_tokens)} == {int} and hash(params)


@pytest.mark.parametrize("tokens", [np.arange(1, 40), torch.arange(1, 40)])
def test_a_prompt_out_of_an_array_is_the_prompt(engine: Engine, tokens: Any) -> None:
    params = SamplingParams(max_tokens=3, seed=1)
    plain = engine.generate([list(range(1, 40))], params)[0]
    output = engine.generate([tokens], params)[0]
    assert output.token_ids == plain.token_ids and output.prompt_token_ids == plain.prompt_token_ids
    assert output.num_cached == 32, "equal tokens are found in the prefix cache whatever held them"
    assert {type(token) for token in output.prompt_token_ids} == {int}
