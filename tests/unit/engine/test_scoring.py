"""Logits of known texts: those of the engine's own path, whatever the chunks and the company."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ConfigError, RequestError
from engine.sampling_params import SamplingParams
from engine.scoring import prompt_logits

PROMPTS = [[(7 * i * i + j) % 500 + 3 for i in range(n)] for j, n in enumerate((37, 1, 64, 20))]


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": "synthetic:tiny", "impl": "torch", "memory_limit": 30_000_000, **changes})


@pytest.fixture(scope="module", params=["bf16", "int4"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(config(kv=request.param)) as engine:
        yield engine


def gathered(engine: Engine, prompts: list[list[int]], chunk: int) -> list[Tensor]:
    parts: list[list[Tensor]] = [[] for _ in prompts]
    for prompt, start, logits in prompt_logits(engine, prompts, chunk=chunk):
        assert start == sum(map(len, parts[prompt]))
        parts[prompt].append(logits)
    return [torch.cat(rows) for rows in parts]


def test_chunks_and_company_change_nothing(engine: Engine) -> None:
    together = gathered(engine, PROMPTS, 16)
    alone = [gathered(engine, [prompt], 128)[0] for prompt in PROMPTS]
    for a, b, prompt in zip(together, alone, PROMPTS, strict=True):
        assert a.shape == (len(prompt), 512)
        assert torch.allclose(a, b, atol=2e-3)


def test_they_are_what_the_engine_scores_and_answers(engine: Engine) -> None:
    params = SamplingParams(prompt_logprobs=True, max_tokens=1, ignore_eos=True)
    outputs = engine.generate(PROMPTS, params)
    for output, logits, prompt in zip(outputs, gathered(engine, PROMPTS, 16), PROMPTS, strict=True):
        chances = logits.log_softmax(-1)
        known = [float(chances[i, token]) for i, token in enumerate(prompt[1:])]
        assert list(output.prompt_logprobs) == pytest.approx(known, abs=2e-3)
        assert output.token_ids == [int(logits[-1].argmax())]


def test_the_kv_format_matters() -> None:
    found = []
    for kv in ("bf16", "int4"):
        with Engine(config(kv=kv)) as engine:
            found.append(gathered(engine, PROMPTS, 16)[2])
    assert (found[0][0] - found[1][0]).abs().max() < (found[0][-1] - found[1][-1]).abs().max()
    assert not torch.allclose(found[0][-1], found[1][-1], atol=1e-2)


def test_cached_prefixes_are_forgotten(engine: Engine) -> None:
    prompt = PROMPTS[2]
    before = engine.generate([prompt], SamplingParams(max_tokens=4))[0].token_ids
    gathered(engine, [[5] * 100] * 8, 32)
    engine.check_integrity()
    assert engine.generate([prompt], SamplingParams(max_tokens=4))[0].token_ids == before


def test_refusals(engine: Engine) -> None:
    with pytest.raises(RequestError, match=r"has 0 tokens; it must have 1 to"):
        list(prompt_logits(engine, [[]]))
    with pytest.raises(RequestError, match=r"has 3,000 tokens; it must have 1 to"):
        list(prompt_logits(engine, [[5] * 3000]))
    name = engine.add_request([1, 2, 3])
    with pytest.raises(RequestError, match="idle"):
        list(prompt_logits(engine, [[5]]))
    engine.abort(name)
    while engine.has_unfinished():
        engine.step()
    with Engine(config(runner="simulated", impl="auto")) as simulated, pytest.raises(ConfigError, match="'simulated'"):
        list(prompt_logits(simulated, [[5]]))
