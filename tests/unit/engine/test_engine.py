"""What callers see, on the simulated runner: order, progress, streams, interrupts, bad input, closing."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from tqdm import tqdm

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.request import RequestOutput
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvent
from tests.unit.engine.simulated import build
from tests.unit.engine.support import StubModel, tiny_spec


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


@pytest.mark.parametrize("tokens", [np.arange(1, 40), torch.arange(1, 40)])
def test_a_prompt_out_of_an_array_is_the_prompt(engine: Engine, tokens: Any) -> None:
    params = SamplingParams(max_tokens=3, seed=1)
    plain = engine.generate([list(range(1, 40))], params)[0]
    output = engine.generate([tokens], params)[0]
    assert output.token_ids == plain.token_ids and output.prompt_token_ids == plain.prompt_token_ids
    assert output.num_cached == 32, "equal tokens are found in the prefix cache whatever held them"
    assert {type(token) for token in output.prompt_token_ids} == {int}
