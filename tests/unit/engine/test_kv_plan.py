"""KV formats chosen layer by layer: the plan's forms and refusals, exact bytes, and the engine that runs it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig
from engine.errors import ConfigError
from engine.loading.loader import LoadedModel, load_model
from engine.loading.shapes import synthetic_spec
from engine.model.kv_plan import KVPlan, layer_names
from engine.running.simulated import SimulatedRunner
from engine.sampling_params import SamplingParams
from kernels import KV_FORMATS

MEGABYTE = 1 << 20
GREEDY = SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0)
SCORE = SamplingParams(max_tokens=1, ignore_eos=True, prompt_logprobs=True)


@pytest.fixture(scope="module")
def model() -> Any:
    with load_model(EngineConfig(model="synthetic:tiny")) as loaded:
        yield loaded


def config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"model": "synthetic:tiny", "device": "cpu", "memory_limit": 64 * MEGABYTE, **options})


def test_one_plan_has_one_value_in_every_form() -> None:
    by_name = EngineConfig(kv={"default": "int4", "layers.3": "int8", "layers.0": "bf16"})  # type: ignore[arg-type]
    by_number = EngineConfig(kv=KVPlan.of({0: "bf16", "default": "int4", 3: "int8"}))
    assert by_name == by_number and hash(by_name) == hash(by_number)
    assert KVPlan.of(by_name.kv.as_json()) == by_name.kv  # type: ignore[union-attr]
    assert EngineConfig(kv={"default": "int8"}).kv == "int8"  # type: ignore[arg-type]
    assert str(by_name.kv) == "int4 but layer 0 bf16, layer 3 int8"
    assert str(KVPlan.of({0: "bf16"})) == "bf16"
    assert KVPlan.of(by_name.kv).formats(5) == ("bf16", "int4", "int4", "int8", "int4")


@pytest.mark.parametrize(
    "layers, words",
    [
        ([3], "layer 3"), ([3, 0], "layers 0 and 3"), ([0, 1, 2], "layers 0 to 2"),
        ([9, 0, 2, 3, 4], "layers 0, 2 to 4 and 9"),
    ],
)
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert layer_names(layers) == words


@pytest.mark.parametrize(
    "kv, words",
    [
        ("int3", "kv is 'int3'; it must be one of bf16, int8, int4, fp8, k8v4"),
        ({"default": "int3"}, "kv is 'int3'"),
        ({"default": "int8", 2: "fp16"}, "kv of layer 2 is 'fp16'; it must be one of bf16"),
        ({2: None}, "kv of layer 2 is None"),
        ({"layer.2": "int8"}, "kv names 'layer.2'; a layer is called layers.<number>"),
        ({-1: "int8"}, "kv names -1"),
        ({True: "int8"}, "kv names True"),
        ({"layers.1": "int8", 1: "int4"}, "kv names layer 1 more than once"),
        (None, "kv is None"),
    ],
)
def test_refusals(kv: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(kv=kv)


def test_a_layer_that_is_not_there_is_refused(model: LoadedModel) -> None:
    last = model.spec.num_layers - 1
    for run in (lambda c: Engine(c, model=model), load_model, lambda c: SimulatedRunner(c, model.spec)):
        with pytest.raises(ConfigError, match=f"kv names layer {last + 1}; the layers are 0 to {last}"):
            run(config(kv={last + 1: "int8"}))


def test_bytes_are_the_sum_of_the_layers() -> None:
    spec = synthetic_spec("7b")
    eight, four = 128 + 4, 64 + 4
    per_head = {"bf16": 512, "int8": 2 * eight, "fp8": 2 * eight, "int4": 2 * four, "k8v4": eight + four}
    for name in KV_FORMATS:
        assert spec.kv_bytes_per_token(name) == spec.num_layers * spec.num_kv_heads * per_head[name]
    chosen = KVPlan.of({"default": "int4", 0: "bf16", 5: "k8v4"})
    want = spec.num_kv_heads * (512 + 200 + (spec.num_layers - 2) * 136)
    assert spec.kv_bytes_per_token(chosen) == want
    runner = SimulatedRunner(EngineConfig(model="synthetic:7b", runner="simulated", kv=chosen), spec)
    assert runner.memory.block_bytes == 64 * want


PLANS: list[Any] = [*KV_FORMATS, {"default": "int4", 0: "bf16"}, {"default": "fp8", 1: "k8v4"}]


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("kv", PLANS, ids=str)
def test_what_is_held_is_what_was_planned(kv: Any, impl: str, model: LoadedModel) -> None:
    """And decode steps give tokens the chances that a prompt that holds them gives."""
    prompts = [[5, 6, 7, *range(40)], [9, 10], list(range(100, 170))]
    options = config(kv=kv, impl=impl, max_batched_tokens=64, max_batch_size=4)
    with Engine(options, model=model) as engine:
        memory = engine.memory
        assert engine.runner.measured_memory()["kv"] == memory.kv
        assert memory.block_bytes == memory.block_size * engine.spec.kv_bytes_per_token(options.kv)
        assert f"KV {options.kv}, block" in engine.description
        outputs = engine.generate(prompts, GREEDY)
        whole = [[*prompt, *output.token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
        for output, scored in zip(outputs, engine.generate(whole, SCORE), strict=True):
            assert len(output.token_ids) == 6
            drawn = torch.tensor([chosen.logprob for chosen in output.logprobs])
            assert torch.allclose(drawn, torch.tensor(scored.prompt_logprobs[-6:]), atol=0.08)


def test_each_layer_has_the_format_of_its_own(model: LoadedModel) -> None:
    with Engine(config(kv={"default": "int4", 0: "fp8"}), model=model) as engine:
        held = [layer.format.name for layer in engine.runner._kv]  # type: ignore[attr-defined]
    assert held == ["fp8"] + ["int4"] * (model.spec.num_layers - 1)


def test_smaller_formats_hold_more_tokens(model: LoadedModel) -> None:
    fit = {}
    for kv in KV_FORMATS:
        with Engine(config(kv=kv), model=model) as engine:
            fit[kv] = engine.memory.tokens_that_fit
    order = ["bf16", "fp8", "k8v4", "int4"]
    assert fit["fp8"] == fit["int8"] and all(fit[a] < fit[b] for a, b in itertools.pairwise(order))
