"""Checkpoints quantized elsewhere: each built here from known codes, by packers that follow the formats' own sources
and share nothing with the reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.config import EngineConfig
from engine.decoder import Decoder
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.loader import load_model
from engine.sampling_params import SamplingParams
from tests.unit.engine.checkpoints import logits_by_transformers, random_model, save, tiny_config
from tests.unit.engine.test_decoder import random_ids, relative, whole

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
REFERENCE = 1e-3
FAST = 1e-2


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class Known:
    """A weight [N, K] as written: unsigned 4-bit codes and zeros, or signed 8-bit codes; scale [N, groups]."""

    codes: np.ndarray
    scale: Tensor
    zero: np.ndarray
    g_idx: np.ndarray  # group of each of the K features

    @property
    def dense(self) -> Tensor:
        """float64: exact."""
        centred = torch.from_numpy(self.codes.astype(np.float64) - self.zero.astype(np.float64)[:, self.g_idx])
        return centred * self.scale.double()[:, self.g_idx]


def words(values: np.ndarray, axis: int, bits: int = 4, places: tuple[int, ...] | None = None) -> Tensor:
    """Neighbours along `axis` in int32 words: of those of one word, the one at places[i] goes to the i-th bits."""
    count = 32 // bits
    lines = np.moveaxis(values, axis, 0).astype(np.uint64)
    lines = np.concatenate([lines, np.zeros((-len(lines) % count, lines.shape[1]), np.uint64)])
    packed = np.zeros((len(lines) // count, lines.shape[1]), np.uint64)
    for i in range(count):
        packed |= lines[(places[i] if places else i) :: count] << np.uint64(i * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).astype(np.uint32).view(np.int32).copy())


def awq(w: Known) -> dict[str, Tensor]:
    """https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py"""
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(w.codes.T, 1, places=places),
        "qzeros": words(w.zero.T, 1, places=places),
        "scales": w.scale.t().contiguous(),
    }


def gptq(w: Known) -> dict[str, Tensor]:
    """https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; zeros less one"""
    return {**gptq_v2(w), "qzeros": words((w.zero.T.astype(np.int64) - 1) & 15, 1)}


def gptq_v2(w: Known) -> dict[str, Tensor]:
    return {
        "qweight": words(w.codes.T, 0),
        "qzeros": words(w.zero.T, 1),
        "scales": w.scale.t().contiguous(),
        "g_idx": torch.from_numpy(w.g_idx.astype(np.int32)),
    }


def packed(w: Known) -> dict[str, Tensor]:
    """https://github.com/vllm-project/compressed-tensors, compressors/quantized_compressors/pack_quantized.py"""
    return {
        "weight_packed": words(w.codes, 1),
        "weight_scale": w.scale,
        "weight_shape": torch.tensor(w.codes.shape),
    }


def packed_with_zeros(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_zero_point": words(w.zero, 0)}


def packed_in_order(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_g_idx": torch.from_numpy(w.g_idx.astype(np.int32))}


def packed8(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_packed": words(w.codes.astype(np.int64) + 128, 1, bits=8)}


def int8(w: Known) -> dict[str, Tensor]:
    return {"weight": torch.from_numpy(w.codes), "weight_scale": w.scale, "input_scale": torch.ones(1)}


def int8_tensor(w: Known) -> dict[str, Tensor]:
    return {"weight": torch.from_numpy(w.codes), "weight_scale": w.scale[0]}


def compressed(form: str, *, activations: bool = False, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8} if activations else None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


@dataclass(frozen=True)
class Case:
    pack: Callable[[Known], dict[str, Tensor]]
    config: dict[str, Any]
    group: int = 128  # -1 for one per channel
    symmetric: bool = False
    act_order: bool = False
    signed: bool = False
    one_scale: bool = False
    dtype: torch.dtype = torch.float16
    label: str = "8 matrices int4 group 128"


CASES = {
    "awq": Case(awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}),
    "awq, group 64": Case(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 64}, 64, label="8 matrices int4 group 64"
    ),
    "gptq": Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "gptq v2": Case(
        gptq_v2,
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
        64,
        label="8 matrices int4 group 64",
    ),
    "gptq, activation order": Case(
        gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, 64, act_order=True,
        label="8 matrices int4 group 64",
    ),
    "gptq, per channel": Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": -1}, -1),
    "gptq, zero biases": Case(
        lambda w: {**gptq(w), "bias": torch.zeros(len(w.codes), dtype=torch.float16)},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ),
    "packed": Case(packed, compressed("pack-quantized", **INT4), symmetric=True),
    "packed, bf16 scales": Case(packed, compressed("pack-quantized", **INT4), symmetric=True, dtype=torch.bfloat16),
    "packed, zero points": Case(packed_with_zeros, compressed("pack-quantized", **{**INT4, "symmetric": False})),
    "packed, activation order": Case(
        packed_in_order, compressed("pack-quantized", **{**INT4, "group_size": 64}), 64, True, True,
        label="8 matrices int4 group 64",
    ),
    "packed, per channel": Case(
        packed, compressed("pack-quantized", **{**INT4, "group_size": None, "strategy": "channel"}), -1, True
    ),
    "packed, 8 bits": Case(
        packed8, compressed("pack-quantized", **INT8), -1, signed=True, label="8 matrices int8"
    ),
    "int8": Case(
        int8, compressed("int-quantized", activations=True, **INT8), -1, signed=True, dtype=torch.float32,
        label="activations computed in bf16",
    ),
    "int8, one scale per matrix": Case(
        int8_tensor, compressed("int-quantized", **{**INT8, "strategy": "tensor"}), -1, signed=True, one_scale=True,
        label="8 matrices int8",
    ),
}  # fmt: skip


def known(case: Case, n: int, k: int, g_idx: np.ndarray, rng: np.random.Generator) -> Known:
    """Weights of about the size of 1 / sqrt(K), every code and zero among them."""
    groups = int(g_idx.max()) + 1
    levels = 256 if case.signed else 16
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (n, groups)) * 3.5 / levels * k**-0.5)
    if case.one_scale:
        scale = scale[:1, :1].expand(n, 1).contiguous()
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8) if case.signed else rng.integers(0, 16, (n, k), np.uint8)
    middle = 0 if case.signed else 8
    zero = np.full((n, groups), middle) if case.symmetric or case.signed else rng.integers(0, 16, (n, groups))
    if not (case.symmetric or case.signed):
        scale *= 0.5  # a mean that is not zero adds up
    return Known(codes, scale.to(case.dtype), zero.astype(np.int64), g_idx)


def quantize(model: Any, case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Give every linear of the layers known weights; the tensors to save."""
    rng = np.random.default_rng(seed)
    tensors = {name: tensor.clone().bfloat16() for name, tensor in model.state_dict().items()}
    orders: dict[tuple[int, str], np.ndarray] = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        n, k = module.weight.shape
        size = k if case.group == -1 else case.group
        shared = (int(name.split(".")[2]), "o" if "o_proj" in name else "down" if "down" in name else f"{k} {name[15]}")
        g_idx = orders.setdefault(shared, rng.permutation(k) // size if case.act_order else np.arange(k) // size)
        weight = known(case, n, k, g_idx, rng)
        module.weight.copy_(weight.dense)
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in case.pack(weight).items()})
    return tensors


def write(folder: Path, case: Case, **changes: Any) -> Any:
    """The folder, and transformers' model of the dequantized weights."""
    model = random_model(tiny_config("llama", **changes))
    with torch.no_grad():  # a residual stream as strong as what layers add: bf16 itself then errs by half a percent
        model.model.embed_tokens.weight.mul_(model.config.hidden_size**0.5)
    for parameter in model.parameters():  # not the model, whose rotary table would lose bits
        parameter.requires_grad_(False).copy_(parameter.bfloat16())
    save(model, folder)
    save_file(quantize(model, case), folder / WEIGHTS, metadata={"format": "pt"})
    configure(folder, case.config)
    return model


def configure(folder: Path, quantization: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


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
    ids = random_ids(40)
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


def test_fp8_is_dequantized_to_bf16_and_said(tmp_path: Path) -> None:
    model = random_model(tiny_config("llama"))
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(parameter.bfloat16())
    save(model, tmp_path)
    tensors = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            scale = (module.weight.abs().amax(1, keepdim=True) / 448).bfloat16()
            codes = (module.weight / scale).to(torch.float8_e4m3fn)
            module.weight.copy_((codes.double() * scale).to(torch.bfloat16))
            tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
    save_file(tensors, tmp_path / WEIGHTS)
    configure(tmp_path, compressed("float-quantized", activations=True, **FP8))
    reference, ids = built(tmp_path, "torch"), random_ids(40)
    for part, dense in fused(model, 1).items():
        assert torch.equal(reference._layers[1].matrices()[part].dequantize(), dense)
    assert relative(whole(reference, ids), logits_by_transformers(model, ids)) < REFERENCE
    with Engine(EngineConfig(model=str(tmp_path), device="cpu", memory_limit=64 << 20)) as engine:
        assert "8 matrices bf16" in engine.description and "fp8 weights dequantized to bf16" in engine.description
    with pytest.raises(ConfigError, match=r"'int8'.*fp8"):
        built(tmp_path, "auto", "int8")


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
