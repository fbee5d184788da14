"""What is saved: the exact codes, in the layouts of other tools, as their own packers would have written them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError
from engine.loading.loader import LoadedModel, load_model
from engine.model.weight_plan import WeightPlan
from engine.quantize import quantize
from engine.quantize.write import leaves_of, pack
from engine.sampling_params import SamplingParams
from kernels import QuantizedWeight
from tests.unit.engine import quantized_checkpoints as others
from tests.unit.engine.checkpoints import random_model, save, tiny_config
from tests.unit.engine.test_decoder import random_ids, whole

CPU = torch.device("cpu")
TEXT = " ".join(random.Random(0).choices("def return import class self for in if else not value".split(), k=600))


@pytest.fixture(autouse=True)
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.quantize.rescale.SEARCH_SEQUENCES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Biases on q, k and v, which AWQ folds into as well."""
    return save(random_model(tiny_config("qwen2"), torch.bfloat16), tmp_path_factory.mktemp("model"))


def quick(model: Path, method: str, **options: Any) -> LoadedModel:
    return quantize(str(model), method, calibration=TEXT, **{"budget": 2048, "bar": None, "device": "cpu", **options})




def mixed(eight: str) -> WeightPlan:
    return WeightPlan.of({"default": "int4", "layers.0.down": eight, "layers.1.o": "bf16"})


CASES: dict[str, dict[str, Any]] = {
    "awq": {"method": "awq"},
    "awq, group 64": {"method": "rtn", "group_size": 64, "layout": "awq"},
    "gptq": {"method": "gptq", "layout": "gptq"},
    "gptq, activation order": {"method": "gptq", "order": "group", "group_size": 64},
    "compressed int4": {"method": "gptq", "layout": "compressed-tensors"},
    "compressed int8": {"method": "rtn", "weights": "int8"},
    "compressed w8a8": {"method": "smoothquant", "weights": "w8a8"},
    "compressed fp8": {"method": "rtn", "weights": "fp8"},
    "compressed w4a8": {"method": "gptq", "weights": "w4a8"},
    "w4a8, group 64": {"method": "awq", "weights": "w4a8", "group_size": 64},
    "mixed w4a8": {"method": "hqq", "weights": WeightPlan.of({"default": "w4a8", "layers.0.down": "w8a8"})},
    "mixed int8": {"method": "gptq", "weights": mixed("int8")},
    "mixed fp8": {"method": "rtn", "weights": mixed("fp8")},
    "plain": {"method": "smoothquant", "weights": "bf16"},
}
SAID = {
    "awq": ("awq", None), "awq, group 64": ("awq", None), "gptq": ("gptq", None),
    "gptq, activation order": ("gptq", None), "compressed int4": ("compressed-tensors", "pack-quantized"),
    "compressed int8": ("compressed-tensors", "pack-quantized"),
    "compressed w8a8": ("compressed-tensors", "int-quantized"),
    "compressed fp8": ("compressed-tensors", "float-quantized"),
    "compressed w4a8": ("compressed-tensors", "pack-quantized"),
    "w4a8, group 64": ("compressed-tensors", "pack-quantized"),
    "mixed w4a8": ("compressed-tensors", "mixed-precision"),
    "mixed int8": ("compressed-tensors", "pack-quantized"), "mixed fp8": ("compressed-tensors", "mixed-precision"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_loads_to_the_last_code(name: str, folder: Path, tmp_path: Path) -> None:
    result = quick(folder, out=tmp_path / "out", **CASES[name])
    held = result.decoder(weights="bf16", group_size=128, device=CPU, impl="torch")
    with load_model(EngineConfig(model=str(tmp_path / "out"))) as model:
        loaded = model.decoder(weights="bf16", group_size=128, device=CPU, impl="torch")
        if "mixed" not in name:  # of several formats the plan of memory takes the first
            assert model.spec.weight_bytes("bf16", 128) == result.spec.weight_bytes("bf16", 128)
    for matrix, there in held.matrices().items():
        here = loaded.matrices()[matrix].to_plain()
        there = there.to_plain()
        for tensor in ("codes", "scale", "zero", "order"):
            a, b = getattr(here, tensor), getattr(there, tensor)
            assert (a is None) == (b is None), (matrix, tensor)
            assert a is None or torch.equal(a.float(), b.float()), (matrix, tensor)
    ids = random_ids(30)
    assert torch.equal(whole(loaded, ids), whole(held, ids))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = written.get("quantization_config")
    assert written["dtype"] == "bfloat16"
    said = quantization and (quantization["quant_method"], quantization.get("format"))
    assert said == SAID.get(name)


def test_the_folder_is_complete_and_says_how_it_was_made(folder: Path, tmp_path: Path) -> None:
    quick(folder, "gptq", out=tmp_path / "out")
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(files)
    recipe = json.loads(files["quantize.json"].read_text())
    assert recipe["method"] == "gptq" and recipe["calibration_tokens"] == 2048 and recipe["order"] == "static"
    assert files["model.safetensors"].stat().st_mode == files["config.json"].stat().st_mode
    with Engine(EngineConfig(model=str(tmp_path / "out"), device="cpu", memory_limit=64 << 20)) as engine:
        assert "as in the awq checkpoint: 8 matrices int4 group 128" in engine.description
        assert engine.generate(["abc"], SamplingParams(max_tokens=3))[0].finish_reason


def test_large_models_are_cut_into_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick(folder, "rtn", out=tmp_path / "one")
    monkeypatch.setattr("engine.quantize.save.SHARD_BYTES", 100_000)
    quick(folder, "rtn", out=tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    whole_file = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert parts.keys() == whole_file.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in whole_file.items())
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in parts.values())
    load_model(EngineConfig(model=str(tmp_path / "many"))).close()


# --- against packers that share nothing with the writer ---------------------------------------------------------------


def known(name: str) -> tuple[others.Known, others.Case]:
    case = others.CASES[name]
    rng = np.random.default_rng(0)
    group = 256 if case.group == -1 else case.group
    g_idx = (rng.permutation(256) if case.act_order else np.arange(256)) // group
    return others.known(case, 40, 256, g_idx, rng), case


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("awq", "awq"),
        ("awq, group 64", "awq"),
        ("gptq v2", "gptq"),
        ("gptq, activation order", "gptq"),
        ("packed, zero points", "compressed-tensors"),
        ("packed, 8 bits", "compressed-tensors"),
        ("int8", "compressed-tensors"),
    ],
)
def test_the_tensors_are_those_of_the_formats_own_packers(name: str, layout: str) -> None:
    held, case = known(name)
    scale = held.scale.bfloat16()
    order = torch.from_numpy(held.g_idx).argsort(stable=True)
    codes = torch.from_numpy(held.codes)
    if case.signed:
        weight = QuantizedWeight("w8a8" if name == "int8" else "int8", codes, scale[:, 0].float())
    else:
        zero = torch.from_numpy(held.zero).to(torch.uint8)
        ordered = order if case.act_order else None
        weight = QuantizedWeight("int4", codes[:, order], scale.float(), zero, case.group, ordered)
    packers = {"gptq, activation order": others.gptq_v2}
    expected = packers.get(name, case.pack)(others.Known(held.codes, scale, held.zero, held.g_idx))
    expected.pop("input_scale", None)
    found = leaves_of(weight, layout)
    assert found.keys() == expected.keys()
    for leaf, tensor in found.items():
        assert torch.equal(tensor.double(), expected[leaf].double()), leaf
        assert "scale" in leaf or tensor.dtype == expected[leaf].dtype or leaf == "weight_shape", leaf


def test_scales_too_small_for_float16_stay_bfloat16() -> None:
    codes = torch.zeros(8, 64, dtype=torch.uint8)
    for size, dtype in ((2.0**-10 * 1.25, torch.float16), (2.0**-24 * 1.25, torch.bfloat16)):
        weight = QuantizedWeight("int4", codes, torch.full((8, 1), size), codes[:, :1], 64)
        assert leaves_of(weight, "awq")["scales"].dtype == dtype


def test_words_are_filled_with_zeros_and_odd_sizes_refused() -> None:
    assert pack(torch.tensor([[1, 2, 15]], dtype=torch.uint8), 4).tolist() == [[0xF21]]
    codes = torch.zeros(9, 64, dtype=torch.uint8)
    weight = QuantizedWeight("int4", codes, torch.ones(9, 1), codes[:, :1], 64)
    with pytest.raises(CheckpointError, match="9 out features cannot be packed by eight"):
        leaves_of(weight, "awq")


# --- as the library of the format reads it ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # other people's
@pytest.mark.parametrize("name", ["compressed int4", "compressed int8", "compressed w8a8", "compressed fp8"])
def test_transformers_reads_the_same_weights(name: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    result = quick(folder, out=tmp_path / "out", **CASES[name])
    held = result.decoder(weights="bf16", group_size=128, device=CPU, impl="torch").matrices()
    oracle = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    for i, layer in enumerate(oracle.model.layers):
        parts = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
        assert torch.allclose(torch.cat([x.weight for x in parts]), held[f"layers.{i}.qkv"].dequantize(), rtol=2**-8)
        assert torch.allclose(layer.mlp.down_proj.weight, held[f"layers.{i}.down"].dequantize(), rtol=2**-8)
