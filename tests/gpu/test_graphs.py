"""Replayed decode steps against eager ones: every padded batch size, and after a longer batch ran before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.graphs import padded_size, padded_width
from engine.sampling_params import SamplingParams
from engine.step_inputs import StepInputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FIELDS = ("tokens", "positions", "slots", "block_tables", "lengths", "query_starts", "rows")


class Checked:
    """Stands in for the runner's graphs: replays, runs the same step eagerly, and keeps both sets of logits."""

    def __init__(self, engine: Engine) -> None:
        self.runner: Any = engine.runner
        self.graphs = self.runner._graphs
        self.sizes: list[int] = []
        self.errors: list[float] = []

    def __call__(self, arrays: dict[str, Any]) -> tuple[Tensor, Tensor]:
        replayed, tokens = (result.clone() for result in self.graphs(arrays))
        staged = self.runner._staging(arrays)
        step = StepInputs(**{name: staged[name] for name in FIELDS}, num_decodes=len(arrays["tokens"]))
        eager, _ = self.graphs._compute(step)
        self.sizes.append(len(arrays["tokens"]))
        self.errors.append(float((replayed.float() - eager.float()).norm() / eager.float().norm()))
        assert torch.equal(tokens, replayed.argmax(-1))
        return replayed, tokens


@pytest.mark.parametrize("kv", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_replay_equals_eager(weights: str, kv: str) -> None:
    """Requests end one by one, so the batch shrinks through every size, and short tables follow long ones."""
    with Engine(EngineConfig(weights=weights, kv=kv, memory_limit=1 << 30, prefix_caching=False)) as engine:
        engine.runner._graphs = checked = Checked(engine)  # type: ignore[attr-defined]
        prompts = [[(7 * i + j) % 4096 for j in range(5 + 40 * (i % 4))] for i in range(33)]
        params = [SamplingParams(max_tokens=2 + i, ignore_eos=True) for i in range(33)]
        engine.generate(prompts, params)
        engine.generate([[5] * 1500, [6] * 3], SamplingParams(max_tokens=4, ignore_eos=True))
        engine.generate([[5] * 3], SamplingParams(max_tokens=4, ignore_eos=True))
    assert set(checked.sizes) >= set(range(1, 33))
    assert max(checked.errors) < 0.02, "padding rows must not change a row's logits beyond another tile's rounding"


def test_graphs_off_gives_the_same_answers_and_says_so() -> None:
    prompts = ["def fibonacci(n):\n", "class Stack:\n"]
    texts = []
    for graphs in (True, False):
        with Engine(EngineConfig(graphs=graphs, memory_limit=1 << 30)) as engine:
            assert ("CUDA graphs" in engine.description) and ("eager" in engine.description) is not graphs
            texts.append([output.token_ids for output in engine.generate(prompts, SamplingParams(max_tokens=8))])
    assert texts[0] == texts[1]


def test_opening_and_closing_leaves_no_memory_behind() -> None:
    held = []
    for _ in range(10):
        with Engine(EngineConfig(memory_limit=1 << 30)) as engine:
            engine.generate(["x = 1\n"], SamplingParams(max_tokens=4))
        torch.cuda.empty_cache()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] <= held[1]


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 4), (5, 8), (9, 16), (128, 128), (129, 160), (256, 256)])
def test_padded_sizes(batch: int, size: int) -> None:
    assert padded_size(batch) == size
    assert padded_width(batch) >= batch
