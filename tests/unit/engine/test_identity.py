"""However requests are batched, chunked, cached or preempted: on the reference path the tokens are those of one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel, load_model
from engine.sampling_params import SamplingParams
from engine.scheduling.batch import StepEvent

HEADER = "import os\nimport sys\n\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n\n"
PROMPTS = [
    HEADER + "    def read(self):\n",
    HEADER + "    def close(self):\n",
    HEADER + "    def read(self):\n",  # equal to the first, in the same batch
    "def fibonacci(n):\n",
    "x",
    "for i in range(10):\n    if i % 2:\n        print(i)\n" * 4,
    "def parse(text):\n    result = []\n    for line in text.splitlines():\n",
    HEADER,
]
GREEDY = SamplingParams(max_tokens=16, ignore_eos=True)
# Keys and values are rounded to bfloat16 in the cache, so a draw that falls right between two tokens could tip with the
# last bit of a sum; with these seeds none does.
SAMPLED = [SamplingParams(max_tokens=16, ignore_eos=True, temperature=0.8, seed=100 + i) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(EngineConfig()) as model:
        yield model


def serve(
    model: LoadedModel, params: SamplingParams | list[SamplingParams], **options: object
) -> tuple[list[list[int]], list[StepEvent]]:
    defaults: dict[str, object] = {"impl": "torch", "device": "cpu", "block_size": 16, "prefix_caching": False}
    with Engine(EngineConfig(**{**defaults, **options}), model=model) as engine:  # type: ignore[arg-type]
        events: list[StepEvent] = []
        engine.observers.append(events.append)
        outputs = engine.generate(PROMPTS, params)
        engine.check_integrity()
        return [output.token_ids for output in outputs], events


@pytest.fixture(scope="module", params=["greedy", "sampled"])
def case(
    request: pytest.FixtureRequest, model: LoadedModel
) -> tuple[SamplingParams | list[SamplingParams], list[list[int]]]:
    params: SamplingParams | list[SamplingParams] = GREEDY if request.param == "greedy" else SAMPLED
    alone, _ = serve(model, params, max_batch_size=1)
    return params, alone


@pytest.mark.parametrize("batching", ["static", "dynamic", "continuous"])
def test_batching(model: LoadedModel, case, batching: str) -> None:
    tokens, events = serve(model, case[0], batching=batching, max_batch_size=4, batch_window=0.0)
    assert tokens == case[1]
    assert max(event.num_decodes for event in events) > 1


def test_chunked_prefill(model: LoadedModel, case) -> None:
    tokens, events = serve(model, case[0], max_batch_size=8, max_batched_tokens=16)
    assert tokens == case[1]
    assert any(event.num_decodes and event.num_prefill_tokens for event in events), "no step mixed both"


def test_prefix_hits(model: LoadedModel, case) -> None:
    tokens, events = serve(model, case[0], max_batch_size=2, prefix_caching=True)
    assert tokens == case[1]
    assert sum(event.hit_tokens for event in events) > 0


def test_preemption(model: LoadedModel, case) -> None:
    """A pool of nine blocks cannot hold everybody to the end."""
    spec = model.spec
    base = sum(spec.weight_bytes("bf16", 128).values())
    with Engine(EngineConfig(impl="torch", device="cpu", block_size=16, max_batch_size=4), model=model) as engine:
        fixed, block = engine.memory.limit - engine.memory.free - engine.memory.kv, engine.memory.block_bytes
    assert fixed >= base
    tokens, events = serve(model, case[0], max_batch_size=4, cache_ratio=0.5, memory_limit=fixed + 2 * 10 * block)
    assert tokens == case[1]
    assert sum(event.num_preempted for event in events) > 0
