"""Graphs without a GPU: a stand-in for CUDA records what a step computes and computes it again at each replay.

What a graph's inputs are, which graph serves which batch, where sampled tokens stand and what is kept of the logits is
then the real code; tests/gpu has the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel, load_model
from engine.running import torch_runner
from engine.running.captured import CapturedSteps
from engine.running.graphs import DecodeGraphs, GraphKey
from engine.running.prompt_graphs import PromptGraphs
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvent

OPTIONS: dict[str, Any] = {"model": "synthetic:tiny", "device": "cpu", "impl": "torch", "memory_limit": 64 << 20}


class Recorded:
    """A graph that holds the computation itself."""

    def __init__(self) -> None:
        self.compute: Any = None
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.compute()


class Instant:
    def record(self) -> None: ...

    def synchronize(self) -> None: ...


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "graph_pool_handle": lambda: 0,
        "Event": Instant,
        "CUDAGraph": Recorded,
        "graph": lambda graph, pool: nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "memory_reserved": lambda: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **options: zeros(*shape, **options))
    record = CapturedSteps._record

    def kept(self: CapturedSteps, graph: Any, compute: Callable[[], None]) -> None:
        """While it is recorded, nothing is computed: only the run before, which compiles, happens."""
        runs = iter([compute])
        record(self, graph, lambda: next(runs, lambda: None)())
        graph.compute = compute

    monkeypatch.setattr(CapturedSteps, "_record", kept)


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(EngineConfig(model="synthetic:tiny")) as model:
        yield model


def with_graphs(engine: Engine) -> DecodeGraphs:
    runner: Any = engine.runner
    blocks = -(-engine.session_len // engine.block_size)
    with torch.inference_mode():
        runner._graphs = DecodeGraphs(runner._decoder, runner._kv, runner._cos_sin, runner._readback, blocks)
    runner.asynchronous = True
    graphs: DecodeGraphs = runner._graphs
    return graphs


PARAMS = {
    "greedy": [SamplingParams(max_tokens=2 + i, ignore_eos=True) for i in range(11)],
    "drawn": [SamplingParams(max_tokens=2 + i, temperature=0.9, top_p=0.9, seed=i, ignore_eos=True) for i in range(11)],
    "exacting": [SamplingParams(max_tokens=2 + i, temperature=0.5 * (i % 2), seed=i, logprobs=i % 3) for i in range(5)]
    + [SamplingParams(max_tokens=7, repetition_penalty=1.2) for _ in range(2)]
    + [SamplingParams(max_tokens=9, ignore_eos=True) for _ in range(4)],
}


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", PARAMS)
def test_replayed_steps_give_the_tokens_of_eager_ones(
    stand_in: None, model: LoadedModel, kind: str, overlap: bool
) -> None:
    prompts = [[(13 * i + j) % 500 for j in range(3 + 30 * (i % 4))] for i in range(11)]
    prompts[0] = [5] * 300  # a wider block table than the others need
    with Engine(EngineConfig(**OPTIONS, overlap=False), model=model) as engine:
        plain = engine.generate(prompts, PARAMS[kind])
    with Engine(EngineConfig(**OPTIONS, overlap=overlap, max_batch_size=11), model=model) as engine:
        graphs = with_graphs(engine)
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        replayed = engine.generate(prompts, PARAMS[kind])
        assert [output.token_ids for output in replayed] == [output.token_ids for output in plain]
        assert [output.logprobs for output in replayed] == [output.logprobs for output in plain]
        decodes = sum(event.num_prefills == 0 for event in events)
        assert sum(graph.graph.replays for graph in graphs._graphs.values()) == decodes > 5  # type: ignore[attr-defined]
        assert any(event.overlapped for event in events) is overlap
        kinds = {key.logits for key in graphs.captured}
        assert kinds == {False} if kind == "greedy" else True in kinds, "logits are kept where they are drawn from"
        assert {key.width for key in graphs.captured} == {16, 32}


def test_warm_up_makes_every_size_and_disturbs_nobody(stand_in: None, model: LoadedModel) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with Engine(EngineConfig(**OPTIONS, max_batch_size=20), model=model) as engine:
        want = engine.generate([[4, 5, 6]], params)[0].token_ids
        graphs = with_graphs(engine)
        engine.add_request([4, 5, 6], params)
        engine.step()
        engine.step()
        engine.warm_up(300)
        assert graphs.captured == [GraphKey(s, w, False) for s in (1, 2, 4, 8, 16, 24) for w in (16, 32)]
        last = [output for _ in range(20) for output in engine.step()][-1]
        assert last.token_ids == want
        assert len(graphs.captured) == 12


@pytest.mark.parametrize(
    "temperatures, kinds", [([0.0], [False]), ([0.7, 1.0], [True]), ([0.0, 0.7], [False, True])], ids=str
)
def test_warm_up_makes_what_such_requests_need(
    stand_in: None, model: LoadedModel, temperatures: list[float], kinds: list[bool]
) -> None:
    """Nothing is captured while they are served."""
    params = [SamplingParams(max_tokens=5, temperature=t, seed=1, ignore_eos=True) for t in temperatures]
    with Engine(EngineConfig(**OPTIONS, max_batch_size=4), model=model) as engine:
        graphs = with_graphs(engine)
        engine.warm_up(100, params)
        assert graphs.captured == sorted(GraphKey(size, 16, kind) for size in (1, 2, 4) for kind in kinds)
        engine.generate([[4, 5, 6]] * len(params), params)
        assert len(graphs.captured) == 3 * len(kinds)


def test_warm_up_asks_for_no_more_than_a_session_may_hold(stand_in: None, model: LoadedModel) -> None:
    """Also where a workload's prompts and answers together are longer: the answers will be cut."""
    with Engine(EngineConfig(**OPTIONS, max_batch_size=2, session_len=100), model=model) as engine:
        graphs = with_graphs(engine)
        engine.warm_up(100_000)
        assert {key.width for key in graphs.captured} == {16}


def with_prompt_graphs(engine: Engine, warm: int = 256) -> PromptGraphs:
    runner: Any = engine.runner
    with torch.inference_mode():
        graphs = PromptGraphs(runner._decoder, runner._kv, runner._cos_sin, runner._readback, engine.block_size)
        graphs.warm_up(warm)
    runner._prompt_graphs = graphs
    return graphs


@pytest.mark.parametrize(("chunked", "sizes"), [(True, [64, 128]), (False, [64, 128, 192, 256])])
def test_prompts_are_captured_up_to_the_tokens_of_a_step(
    stand_in: None, model: LoadedModel, chunked: bool, sizes: list[int]
) -> None:
    options = {"max_batch_size": 2, "max_batched_tokens": 100, "session_len": 300, "chunked_prefill": chunked}
    with Engine(EngineConfig(**OPTIONS, **options), model=model) as engine:
        graphs = with_prompt_graphs(engine, warm=0)
        engine.warm_up(300)
        assert sorted(graphs._graphs) == sizes


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=3, ignore_eos=True),
        SamplingParams(max_tokens=3, temperature=0.9, top_p=0.9, seed=1, ignore_eos=True),
        SamplingParams(max_tokens=3, repetition_penalty=1.3, ignore_eos=True),
        SamplingParams(max_tokens=3, logprobs=2, ignore_eos=True),
    ],
    ids=["greedy", "drawn", "penalized", "logprobs"],
)
def test_replayed_prompts_give_the_tokens_of_eager_ones(
    stand_in: None, model: LoadedModel, params: SamplingParams
) -> None:
    """With and without padding, the longer ones first: what they leave in the inputs must not count. A prompt that
    finds a prefix, one that is too short and one that is too long are among them."""
    prompts = [[(7 * i + 3 * length) % 500 for i in range(length)] for length in (256, 200, 33, 64, 65, 100, 20, 270)]
    prompts.append(prompts[1] + prompts[2] + [9] * 7)
    options = {**OPTIONS, "block_size": 16}
    with Engine(EngineConfig(**options), model=model) as engine:
        plain = [engine.generate([prompt], params)[0] for prompt in prompts]
    with Engine(EngineConfig(**options), model=model) as engine:
        graphs = with_prompt_graphs(engine)
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        replayed = [engine.generate([prompt], params)[0] for prompt in prompts]
        assert [output.token_ids for output in replayed] == [output.token_ids for output in plain]
        assert [output.logprobs for output in replayed] == [output.logprobs for output in plain]
        replays = sum(graph.graph.replays for graph in graphs._graphs.values())  # type: ignore[attr-defined]
        prefills = [event.num_prefill_tokens for event in events if event.num_prefills]
        assert prefills == [256, 200, 33, 64, 65, 100, 20, 270, 48] and replays == 7


def test_a_replayed_greedy_prompt_leaves_nothing_to_launch(
    stand_in: None, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    with Engine(EngineConfig(**OPTIONS), model=model) as engine:
        want = engine.generate([[3] * 90], params)[0].token_ids
        engine.reset_prefix_cache()
        with_prompt_graphs(engine)
        monkeypatch.setattr(torch_runner, "sample", None)
        assert engine.generate([[3] * 90], params)[0].token_ids == want


def test_capturing_prompts_keeps_tokens_that_are_pending(stand_in: None, model: LoadedModel) -> None:
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    with Engine(EngineConfig(**OPTIONS), model=model) as engine:
        want = engine.generate([[4, 5, 6]], params)[0].token_ids
        with_graphs(engine)
        engine.add_request([4, 5, 6], params)
        engine.step()
        engine.step()
        with_prompt_graphs(engine)
        last = [output for _ in range(20) for output in engine.step()][-1]
        assert last.token_ids == want
