"""Checkpoints quantized elsewhere: each built here from known codes, by packers that follow the formats' own sources
and share nothing with the reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.loading.loader import load_model
from engine.model.decoder import Decoder
from engine.sampling_params import SamplingParams
from kernels import WEIGHT_FORMATS
from tests.unit.engine.checkpoints import logits_by_transformers, random_model, save, tiny_config
from tests.unit.engine.quantized_checkpoints import (
    CASES,
    FP8,
    FP8_INPUTS,
    INT4,
    INT8,
    WEIGHTS,
    Case,
    compressed,
    configure,
    gptq,
    packed8,
    quantize,
    rewrite,
    write,
)
from tests.unit.engine.test_decoder import BF16, random_ids, relative, whole

CPU = torch.device("cpu")
SIXTEEN_BIT_ROWS = WEIGHT_FORMATS["w8a8"].sixteen_bit_rows
REFERENCE = 1e-3
FAST = 1e-2
ROUNDED = {"w8a8": 0.05, "fp8": 0.1, "packed": 0.05}


def built(folder: Path, impl: str, weights: str = "bf16") -> Decoder:
    with load_model(EngineConfig(model=str(folder))) as model:
        return model.decoder(weights=weights, group_size=128, device=CPU, impl=impl)


def fused(model: Any, layer: int) -> dict[str, Tensor]:
    """The oracle's weights as the engine joins them."""
    held = model.model.layers[layer]
    attention, mlp = held.self_attn, held.mlp
    return {
        "qkv": torch.cat([x.weight for x in (attention.q_proj, attention.k_proj, attention.v_proj)]),
        "o": attention.o_proj.weight,
        "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        "down": mlp.down_proj.weight,
    }


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_codes_are_kept_and_logits_are_those_of_the_dequantized_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = write(tmp_path, case)
    ids = random_ids(case.tokens)
    expected = logits_by_transformers(model, ids)
    reference, fast = built(tmp_path, "torch"), built(tmp_path, "auto")
    for layer in range(2):
        for part, dense in fused(model, layer).items():
            exact, quick = (decoder._layers[layer].matrices()[part] for decoder in (reference, fast))
            assert torch.equal(exact.dequantize(torch.float32), dense), part
            assert torch.equal(exact.to_plain().codes, quick.to_plain().codes)
            assert relative(quick.dequantize(), dense) < 2**-8  # the scale of some layouts is bf16
    assert relative(whole(reference, ids), expected) < REFERENCE
    assert relative(whole(fast, ids), expected) < FAST


@pytest.mark.parametrize("name", CASES)
def test_the_engine_says_what_it_loaded(name: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[name])
    with Engine(EngineConfig(model=str(tmp_path), device="cpu", memory_limit=64 << 20)) as engine:
        assert CASES[name].label in engine.description
        assert ("rounded to bf16" in engine.description) == (CASES[name].dtype != torch.bfloat16)
        assert engine.generate(["abc"], SamplingParams(max_tokens=3))[0].finish_reason


def write_fp8(folder: Path, inputs: dict[str, Any] | None) -> Any:
    """The folder, and transformers' model of the dequantized weights."""
    model = random_model(tiny_config("llama"))
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(parameter.bfloat16())
    save(model, folder)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            scale = module.weight.abs().amax(1, keepdim=True) / 448
            codes = (module.weight / scale).to(torch.float8_e4m3fn)
            module.weight.copy_(codes.float() * scale)
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    save_file(tensors, folder / WEIGHTS)
    configure(folder, compressed("float-quantized", activations=inputs, **FP8))
    return model


@pytest.mark.parametrize(
    ("inputs", "note"),
    [
        (FP8_INPUTS, ""),
        ({**FP8_INPUTS, "strategy": "tensor", "dynamic": False}, "activations scaled per token as they come"),
        (None, f"activations rounded to fp8 too, in steps of more than {SIXTEEN_BIT_ROWS} tokens"),
    ],
)
def test_fp8_keeps_codes_and_scales(inputs: dict[str, Any] | None, note: str, tmp_path: Path) -> None:
    model = write_fp8(tmp_path, inputs)
    ids = random_ids(SIXTEEN_BIT_ROWS)
    expected = logits_by_transformers(model, ids)
    reference, fast = built(tmp_path, "torch"), built(tmp_path, "auto", "fp8")
    for layer in range(2):
        for part, dense in fused(model, layer).items():
            for decoder in (reference, fast):
                assert torch.equal(decoder._layers[layer].matrices()[part].dequantize(), dense)
    assert relative(whole(reference, ids), expected) < REFERENCE
    assert relative(whole(fast, ids), expected) < BF16
    assert fast.weight_bytes() == fast.spec.weight_bytes("bf16", 128)
    with Engine(EngineConfig(model=str(tmp_path), device="cpu", memory_limit=64 << 20)) as engine:
        assert f"8 matrices fp8, lm_head bf16{f' ({note}' if note else ', KV'}" in engine.description
        assert engine.generate(["abc"], SamplingParams(max_tokens=3))[0].finish_reason
    with pytest.raises(ConfigError, match=r"'int8'.*runs as 'fp8'"):
        built(tmp_path, "auto", "int8")


@pytest.mark.parametrize(
    "form", ["w8a8", "fp8", "packed, int8 activations", "packed, int8 activations, activation order"]
)
def test_long_texts_are_computed_with_rounded_activations(form: str, tmp_path: Path) -> None:
    """The fast path strays no further from the dequantized model than the reference, which rounds the same way: where
    bfloat16 moves an activation across the edge of a code, both err as much, but differently."""
    model = write_fp8(tmp_path, FP8_INPUTS) if form == "fp8" else write(tmp_path, CASES[form])
    form = form.partition(",")[0]
    rows = WEIGHT_FORMATS["w4a8" if form == "packed" else form].sixteen_bit_rows
    ids = random_ids(rows + 24)
    expected = logits_by_transformers(model, ids)
    reference, fast = whole(built(tmp_path, "torch"), ids), whole(built(tmp_path, "auto"), ids)
    cost = relative(reference, expected)
    assert REFERENCE < cost < ROUNDED[form]
    assert relative(fast, expected) < 1.2 * cost + FAST


@pytest.mark.parametrize("name", ["awq", "int8"])
def test_layers_may_differ_in_format(name: str, tmp_path: Path) -> None:
    model = write(tmp_path, CASES[name])
    left = {f"model.layers.0.mlp.{module}_proj": module for module in ("gate", "up", "down")}

    def restore(tensors: dict[str, Tensor]) -> None:
        for module in left:
            for full in [full for full in tensors if full.startswith(module + ".")]:
                del tensors[full]
            weight = model.get_submodule(module).weight
            weight.copy_(weight.bfloat16())
            tensors[f"{module}.weight"] = weight.bfloat16()

    rewrite(tmp_path, restore)
    ids = random_ids(40)
    expected = logits_by_transformers(model, ids)
    assert relative(whole(built(tmp_path, "torch"), ids), expected) < REFERENCE
    fast = built(tmp_path, "auto")
    assert relative(whole(fast, ids), expected) < FAST
    quantized = "int8" if name == "int8" else "int4 group 128"
    assert fast.matrix_formats() == {quantized: 6, "bf16": 2}
    assert relative(whole(fast.reference(), ids), expected) < FAST


def test_groups_of_config_may_differ_in_format(tmp_path: Path) -> None:
    model = write(tmp_path, CASES["packed"])
    eight = Case(packed8, {}, -1, signed=True)
    other = random_model(tiny_config("llama"))
    for parameter in other.parameters():
        parameter.requires_grad_(False)
    replacing = {name: tensor for name, tensor in quantize(other, eight, 7).items() if "down_proj" in name}
    rewrite(tmp_path, lambda t: t.update(replacing))
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.down_proj"
        model.get_submodule(name).weight.copy_(other.get_submodule(name).weight)
    config = compressed("pack-quantized", **INT4)
    config["config_groups"]["group_1"] = {"targets": ["re:.*down_proj"], "weights": INT8}
    configure(tmp_path, config)
    ids = random_ids(40)
    decoder = built(tmp_path, "torch")
    assert decoder.matrix_formats() == {"int4 group 128": 6, "int8": 2}
    assert relative(whole(decoder, ids), logits_by_transformers(model, ids)) < REFERENCE


def test_scales_of_wider_groups_are_repeated(tmp_path: Path) -> None:
    case = Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 256}, 256)
    model = write(tmp_path, case, hidden_size=256)
    assert torch.equal(built(tmp_path, "torch")._layers[0].down.dequantize(), fused(model, 0)["down"])


def test_tied_embeddings_and_the_memory_of_the_plan(tmp_path: Path) -> None:
    write(tmp_path, CASES["awq"], tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.pop("lm_head.weight", None))
    with load_model(EngineConfig(model=str(tmp_path))) as model:
        held = model.decoder(weights="bf16", group_size=128, device=CPU, impl="torch").weight_bytes()
        planned = model.spec.weight_bytes("bf16", 128)
        assert model.decoder(weights="int4", group_size=64, device=CPU, impl="torch").weight_bytes() == held
    assert planned["attention"] == held["attention"] and planned["mlp"] == held["mlp"]
    assert planned["embeddings"] * 2 == held["embeddings"]  # the reference keeps float32


# --- what is refused --------------------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(EngineConfig(model=str(folder)))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(("case", "asked", "own"), [("awq", "int8", "int4"), ("int8", "int4", "int8")])
@pytest.mark.parametrize("runner", ["torch", "simulated"])
def test_another_format_is_refused(case: str, asked: str, own: str, runner: str, tmp_path: Path) -> None:
    write(tmp_path, CASES[case])
    for weights in ("bf16", own):
        load_model(EngineConfig(model=str(tmp_path), weights=weights, runner=runner)).close()
    with pytest.raises(ConfigError, match=f"'{asked}'.*quantized already.*'{own}'"):
        load_model(EngineConfig(model=str(tmp_path), weights=asked, runner=runner))
    with load_model(EngineConfig(model=str(tmp_path))) as model, pytest.raises(ConfigError, match=asked):
        model.decoder(weights=asked, group_size=128, device=CPU, impl="auto")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("awq", ["quantization_config is 'awq'"]),
        ({"bits": 4}, ["unnamed", "awq, gptq, compressed-tensors"]),
        ({"quant_method": "bitsandbytes"}, ["bitsandbytes", "awq, gptq, compressed-tensors"]),
        ({**AWQ, "version": "gemv"}, ["'gemv'", "'gemm'"]),
        ({**AWQ, "bits": 3}, ["3 bits", "4 are read"]),
        ({**AWQ, "group_size": 32}, ["group size is 32", "64"]),
        ({**GPTQ, "group_size": 0}, ["group size is 0"]),
        ({**GPTQ, "bits": 8}, ["8 bits"]),
        ({**GPTQ, "checkpoint_format": "marlin"}, ["'marlin'", "gptq_v2"]),
        (compressed("pack-quantized", **{**INT4, "group_size": 32}), ["group size is 32"]),
        (compressed("pack-quantized", **{**INT4, "num_bits": 2}), ["2 bits"]),
        (compressed("pack-quantized", **{**INT8, "strategy": "group", "group_size": 128}), ["'group'", "'channel'"]),
        (compressed("int-quantized", **{**INT8, "symmetric": False}), ["asymmetric channel"]),
        (compressed("float-quantized", **{**FP8, "strategy": "block"}), ["'block'", "'channel'"]),
        (compressed("float-quantized", **INT8), ["type 'int'", "float-quantized"]),
        (compressed("marlin-24", **INT4), ["'marlin-24'", "pack-quantized"]),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, ["no config_groups"]),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": 3}}, ["group_0"]),
        ({**compressed("pack-quantized", **INT4), "transform_config": {"a": 1}}, ["transform_config"]),
        # claims that the tensors, 16-bit ones, do not keep
        (AWQ, ["awq", "stored unquantized"]),
        (compressed("int-quantized", **INT8), ["compressed-tensors", "stored unquantized"]),
    ],
)
def test_configs_that_are_not_read(config: object, words: list[str], tmp_path: Path) -> None:
    save(random_model(tiny_config("llama"), torch.bfloat16), tmp_path)
    configure(tmp_path, config)
    sentence = refusal(tmp_path)
    assert all(word in sentence for word in words), sentence


O_PROJ = "model.layers.1.self_attn.o_proj"  # N = 128, K = 256


def drop(leaf: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(f"{O_PROJ}.{leaf}")


def put(leaf: str, change: Callable[[Tensor], Tensor], module: str = O_PROJ) -> Callable[[dict[str, Tensor]], object]:
    name = f"{module}.{leaf}"
    return lambda tensors: tensors.update({name: change(tensors[name]).contiguous()})


@pytest.mark.parametrize(
    ("case", "change", "words"),
    [
        ("awq", drop("scales"), ["o_proj.scales is missing"]),
        ("awq", drop("qzeros"), ["o_proj.qzeros is missing"]),
        ("awq", put("qweight", lambda t: t[:128]), ["o_proj.qweight has shape [128, 16]", "[256, 16]"]),
        ("awq", put("scales", lambda t: t[:1]), ["o_proj.scales has shape [1, 128]", "[2, 128]"]),
        ("awq", put("qweight", lambda t: t.long()), ["o_proj.qweight is stored as I64", "I32 is read"]),
        ("awq", put("scales", lambda t: t * float("nan")), ["o_proj.scales holds NaN"]),
        ("awq", lambda t: t.update({f"{O_PROJ}.extra": torch.zeros(3)}), ["o_proj.extra is not expected"]),
        ("gptq", put("g_idx", lambda t: t + 1), ["o_proj", "g_idx does not put 128 features into each of 2"]),
        ("gptq", put("g_idx", lambda t: t * 0), ["g_idx does not put"]),
        ("gptq, zero biases", put("bias", lambda t: t + 1), ["o_proj.bias is not expected", "not zero"]),
        ("packed", drop("weight_scale"), ["o_proj.weight_scale is missing"]),
        ("packed", put("weight_shape", lambda t: t * 2), ["weight_shape says [256, 512]", "[128, 256]"]),
        ("packed, zero points", drop("weight_zero_point"), ["weight_zero_point is missing"]),
        ("int8", drop("weight_scale"), ["o_proj.weight_scale is missing"]),
        ("int8", put("weight", lambda t: t[:, :9]), ["o_proj.weight has shape [128, 9]"]),
        ("int8", put("weight", lambda t: t.to(torch.uint8)), ["stored as U8", "I8 is read"]),
        (
            "int8",
            lambda t: t.update({f"{O_PROJ}.weight_zero_point": torch.ones(128, 1, dtype=torch.int8)}),
            ["weight_zero_point is not zero"],
        ),
        (
            "gptq, activation order",
            put("g_idx", lambda t: t.flip(0), "model.layers.1.self_attn.q_proj"),
            ["q_proj", "v_proj", "different activation orders"],
        ),
    ],
)
def test_tensors_that_do_not_fit(
    case: str, change: Callable[[dict[str, Tensor]], object], words: list[str], tmp_path: Path
) -> None:
    write(tmp_path, CASES[case])
    rewrite(tmp_path, change)
    sentence = refusal(tmp_path)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize(
    ("written", "claimed", "words"),
    [
        ("gptq", "awq", ["g_idx", "not expected"]),
        ("awq", "gptq", ["qweight has shape"]),
        ("packed", "int8", ["weight_packed", "not expected"]),
        ("int8", "packed", ["down_proj.weight,", "not expected"]),
        ("packed, 8 bits", "packed", ["weight_packed has shape"]),
        ("awq, group 64", "awq", ["down_proj.qzeros has shape [4, 16]", "[2, 16]"]),
        ("packed, zero points", "packed", ["weight_zero_point", "not expected"]),
    ],
)
def test_a_format_that_the_tensors_do_not_have(written: str, claimed: str, words: list[str], tmp_path: Path) -> None:
    write(tmp_path, CASES[written])
    configure(tmp_path, CASES[claimed].config)
    sentence = refusal(tmp_path)
    assert all(word in sentence for word in words), sentence


def test_quantized_tensors_that_config_does_not_tell_of(tmp_path: Path) -> None:
    write(tmp_path, CASES["awq"])
    configure(tmp_path, None)
    assert "not expected by config.json" in refusal(tmp_path)


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    write(tmp_path, CASES["awq, group 64"], intermediate_size=192)
    load_model(EngineConfig(model=str(tmp_path))).close()
    configure(tmp_path, AWQ)
    assert "down_proj: 192 in features are not a multiple of the group size 128" in refusal(tmp_path)


def test_parts_of_a_fused_matrix_must_share_a_format(tmp_path: Path) -> None:
    write(tmp_path, CASES["awq"])
    value = "model.layers.1.self_attn.v_proj"

    def restore(tensors: dict[str, Tensor]) -> None:
        for leaf in ("qweight", "qzeros", "scales"):
            del tensors[f"{value}.{leaf}"]
        tensors[f"{value}.weight"] = torch.zeros(128, 128)

    rewrite(tmp_path, restore)
    sentence = refusal(tmp_path)
    assert "q_proj.weight is int4 group 128" in sentence and "v_proj.weight is not quantized" in sentence
