"""Mixed weight precision: what a plan says and refuses, the bytes it takes, and that the decoder computes it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.loading.loader import load_model
from engine.loading.shapes import synthetic_spec
from engine.model.spec import StoredFormat
from engine.model.weight_plan import MODULES, WeightPlan
from tests.unit.engine.support import tiny_spec

CPU = torch.device("cpu")
MIXED = {"default": "int4", "layers.0.o": "bf16", "layers.1.down": "int8", "lm_head": "bf16"}


def test_the_json_form_comes_back() -> None:
    plan = WeightPlan.of(MIXED)
    assert WeightPlan.of(json.loads(json.dumps(plan.as_json()))) == plan
    assert (plan["layers.0.o"], plan["layers.0.qkv"], plan.head) == ("bf16", "int4", "bf16")
    assert plan.formats == {"bf16", "int8", "int4"} and plan.simplest is plan
    assert WeightPlan.of("int8").as_json() == WeightPlan.of("int8").simplest == "int8"
    assert str(plan) == "int4 but 1 matrix bf16, 1 matrix int8, lm_head bf16"
    assert plan.label(64) == f"{plan} group 64" and WeightPlan("int8").label(64) == "int8"


def test_equal_choices_are_equal_configs() -> None:
    config = EngineConfig(weights={"default": "int8", "layers.3.o": "int8"})  # type: ignore[arg-type]
    assert config == EngineConfig(weights="int8") and config.weights == "int8"
    one = EngineConfig(weights=WeightPlan("int4", (("layers.1.o", "int8"), ("layers.0.o", "int8"))))
    other = EngineConfig(weights=WeightPlan("int4", (("layers.0.o", "int8"), ("layers.1.o", "int8"))))
    assert one == other and hash(one) == hash(other) and one != EngineConfig(weights="int4")
    assert replace(one, kv="int8").weights == one.weights


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("int3", "weights is 'int3'; it must be one of bf16, int8, int4"),
        ({"default": "int3"}, "weights is 'int3'"),
        ({"layers.0.down": "int3"}, "weights of layers.0.down is 'int3'; it must be one of"),
        ({"layers.0.mlp": "int8"}, r"weights names 'layers.0.mlp'; a matrix is called layers.<number>.<qkv\|o\|"),
        ({"layers.01.o": "int8"}, "weights names 'layers.01.o'"),
        ({"embeddings": "int8"}, "weights names 'embeddings'"),
        ({"lm_head": 8}, "weights of lm_head is 8"),
    ],
)
def test_names_and_formats_that_do_not_exist(weights: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineConfig(weights=weights)


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"names layers.0.o more than once"):
        WeightPlan("bf16", (("layers.0.o", "int8"), ("layers.0.o", "int4")))


def test_the_model_must_have_what_is_named() -> None:
    spec = tiny_spec()
    spec.check_weights(WeightPlan.of({f"layers.{i}.{name}": "int8" for i in (0, 1) for name in MODULES}))
    with pytest.raises(ConfigError, match=r"'layers.2.o'; the layers of tiny are 0 to 1"):
        spec.check_weights(WeightPlan.of({"layers.2.o": "int8"}))
    tied = replace(spec, tie_embeddings=True)
    tied.check_weights(WeightPlan.of({"lm_head": "int8"}))
    with pytest.raises(ConfigError, match="lm_head is 'int4'; tiny looks its embeddings up in the same table"):
        tied.check_weights(WeightPlan.of({"lm_head": "int4"}))
    stored = replace(spec, stored=StoredFormat("awq", "int4", 128))
    with pytest.raises(ConfigError, match="but tiny is quantized already"):
        stored.check_weights(WeightPlan.of({"default": "int4", "layers.0.o": "int8"}))
    with pytest.raises(ConfigError, match=r"'layers.9.o'; the layers of"):
        load_model(EngineConfig(model="synthetic:tiny", weights={"layers.9.o": "int8"}))  # type: ignore[arg-type]


def test_modules_are_those_of_the_spec() -> None:
    assert tuple(synthetic_spec("tiny").linears()) == MODULES


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("head", ["bf16", "int8"])
def test_bytes_are_those_of_each_matrix(tied: bool, head: str) -> None:
    spec = replace(tiny_spec(), tie_embeddings=tied)
    plan = WeightPlan.of({**MIXED, "lm_head": head})
    of = spec.matrix_bytes(plan, 128)
    k, v = spec.hidden_size, spec.vocab_size
    assert of["layers.0.o"] == 2 * k * 256 and of["layers.1.o"] == k * 256 // 2 + k * 2 * 4
    assert of["layers.1.down"] == k * 256 + 2 * k
    assert of["lm_head"] == (2 * v * k if head == "bf16" else v * k + 2 * v)
    parts = spec.weight_bytes(plan, 128)
    outer = parts["embeddings"] + parts["lm_head"]
    assert outer == of["lm_head"] + (0 if tied else 2 * v * k)
    assert sum(parts.values()) == sum(of.values()) - of["lm_head"] + outer + parts["norms"]


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_the_decoder_holds_what_the_plan_says(impl: str) -> None:
    """Each matrix is exactly that of the decoder in its own format, whether it was taken over or made anew."""
    options: dict[str, Any] = {"group_size": 128, "device": CPU, "impl": impl}
    with load_model(EngineConfig(model="synthetic:tiny")) as model:
        uniform = {name: model.decoder(weights=name, **options).matrices() for name in ("bf16", "int8", "int4")}
        plan = WeightPlan.of(MIXED)
        held = model.decoder(weights=plan, **options)
        assert held is model.decoder(weights=WeightPlan.of(MIXED), **options)
        taken_over = [name for name, matrix in held.matrices().items() if matrix is uniform["int4"][name]]
        assert sorted(taken_over) == sorted(f"layers.{i}.{name}" for i in (0, 1) for name in MODULES
                                            if f"layers.{i}.{name}" not in MIXED)  # fmt: skip
        for name, matrix in held.matrices().items():
            expected = uniform[plan.head or "" if name == "lm_head" else plan[name]][name]
            assert matrix.format == expected.format
            assert torch.equal(matrix.dequantize(), expected.dequantize())
        if impl == "auto":
            assert held.weight_bytes() == model.spec.weight_bytes(plan, 128)
        regrouped = model.decoder(weights=plan, **{**options, "group_size": 64})
        assert regrouped.matrices()["layers.0.qkv"].group_size == 64
        assert regrouped.matrices()["layers.1.down"] is held.matrices()["layers.1.down"]


def test_the_engine_runs_a_plan_and_says_so() -> None:
    from engine.engine import Engine

    plan = WeightPlan.of({"default": "int4", "layers.1.down": "int8"})
    config = EngineConfig(model="synthetic:tiny", weights=plan, memory_limit=50_000_000)
    with Engine(config) as engine:
        assert "int4 but 1 matrix int8 group 128" in engine.description
        assert engine.memory.weights == engine.model.spec.weight_bytes(plan, 128)
        assert len(engine.generate([[1, 2, 3]])[0].token_ids) == 128
    with Engine(replace(config, runner="simulated")) as engine:
        assert engine.memory.weights == engine.spec.weight_bytes(plan, 128)
