"""Quality on a GPU: the kernels of every format find the distributions of its float32 reference, and meet the bars."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.loading.loader import LoadedModel, load_model
from kernels import KV_FORMATS, WEIGHT_FORMATS
from workbench.crossover import measure
from workbench.quality import small_pool
from workbench.quality.divergence import Baseline
from workbench.quality.formats import candidates, compare

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = small_pool(EngineConfig(memory_limit=2 << 30))
FORMATS = [(name, "bf16") for name in WEIGHT_FORMATS] + [("bf16", name) for name in KV_FORMATS if name != "bf16"]
ARITHMETIC = 2e-3
FLIPS = {"w8a8": 4e-3, "fp8": 1e-2, "w4a8": 4e-3, "KV int4": 4e-2, "KV fp8": 5e-3, "KV k8v4": 8e-3}
"""Nats per token between two ways to compute one format. bf16 arithmetic alone moves the bundled model by 1.4e-4; where
activations, keys or values are quantized, it moves some across a rounding boundary besides, each by a whole step: on a
CPU by 1.2e-3, 3.6e-3, 1.3e-3, 1.6e-2, 1.8e-3 and 2.8e-3. A kernel that reads wrong numbers is nats away."""


@pytest.fixture(scope="module")
def model() -> Iterator[LoadedModel]:
    with load_model(CONFIG) as model:
        yield model


@pytest.mark.parametrize(("weights", "kv"), FORMATS)
def test_kernels_find_the_distributions_of_the_reference(model: LoadedModel, weights: str, kv: str) -> None:
    config = replace(CONFIG, weights=weights, kv=kv)
    with Engine(replace(config, impl="torch"), model=model) as engine:
        baseline = Baseline.record(engine, max_tokens=2048)
    with Engine(config, model=model) as engine:
        bound = FLIPS.get(weights if kv == "bf16" else f"KV {kv}", ARITHMETIC)
        assert baseline.compare(engine).kl_mean.value < bound


def test_formats_meet_their_bars(model: LoadedModel) -> None:
    found = compare(candidates(CONFIG), prompts=8, answer=32, progress=False)
    assert not [row.error for row in found.rows if row.error]
    assert all(bar["met"] for bar in found.bars().values()), found.bars()


def test_decode_steps_are_timed_in_every_format() -> None:
    found = measure(replace(CONFIG, model="synthetic:tiny"), batches=(1, 8), rounds=1, steps=4, progress=False)
    assert found.batches == [1, 8] and not found.interrupted
