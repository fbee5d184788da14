"""From a model to its quantized copy: the float pass, what is folded, what is refused, and nothing half done."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import CheckpointError, ConfigError
from engine.loading.loader import LoadedModel, load_model
from engine.model.decoder import Decoder
from engine.model.rope import cos_sin_table
from engine.model.spec import ModelSpec
from engine.model.weight_plan import MODULES, WeightPlan
from engine.quantize import main, quantize
from engine.quantize.calibration import MIN_TOKENS, FloatLayer, calibration_windows
from engine.quantize.layers import METHODS
from engine.quantize.rescale import awq, fold, smoothquant
from engine.sampling_params import SamplingParams
from tests.unit.engine.checkpoints import logits_by_transformers, random_model, save, tiny_config
from tests.unit.engine.test_decoder import random_ids, relative

CPU = torch.device("cpu")
WORDS = "def return import class self for in if else not value name list print open close read write".split()
TEXT = " ".join(random.Random(0).choices(WORDS, k=800))  # 4,700 characters, each a token


@pytest.fixture(autouse=True)
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.quantize.rescale.SEARCH_SEQUENCES", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with grouped heads whose hidden features differ in strength, as those of trained models do."""
    model = random_model(tiny_config("llama"), torch.bfloat16)
    strengths = torch.logspace(-0.6, 0.4, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter.mul_(strengths.to(parameter.dtype))
    return save(model, tmp_path_factory.mktemp("model"))


def quick(model: str | Path | LoadedModel, method: str = "gptq", **options: Any) -> LoadedModel:
    given = model if isinstance(model, LoadedModel) else str(model)
    return quantize(given, method, **{"calibration": TEXT, "budget": 2048, "bar": None, "device": "cpu", **options})


def decoder_of(model: LoadedModel, weights: str = "bf16", impl: str = "torch") -> Decoder:
    return model.decoder(weights=weights, group_size=128, device=CPU, impl=impl)


def float_layers(folder: Path) -> tuple[ModelSpec, list[FloatLayer], Any]:
    model = load_model(EngineConfig(model=str(folder)))
    cos_sin = cos_sin_table(model.spec, 512, CPU)
    layers = [FloatLayer.read(model.spec, model.weights, i, cos_sin, CPU) for i in range(model.spec.num_layers)]
    return model.spec, layers, model.weights


def output(layer: FloatLayer, x: Tensor) -> Tensor:
    carried = residual = x
    for name in MODULES:
        carried = layer.multiply(name, layer.input_of(name, carried))
        if name in ("o", "down"):
            carried = residual = carried + residual
    return carried


# --- the float pass ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_float_pass_computes_what_transformers_computes(family: str, tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    oracle = random_model(tiny_config(family, **changes))
    save(oracle, tmp_path)
    for parameter in oracle.parameters():
        if parameter.dim() == 1:  # the engine's vectors are bf16
            parameter.requires_grad_(False).copy_(parameter.bfloat16())
    spec, layers, read = float_layers(tmp_path)
    ids = random_ids(40)
    x = read("embeddings", None, (), CPU)[torch.tensor([ids])]
    for layer in layers:
        x = output(layer, x)
    final_norm = read("final_norm", None, (), CPU).bfloat16().float()
    x = torch.nn.functional.rms_norm(x, (spec.hidden_size,), final_norm, spec.rms_norm_eps)
    logits = x[0] @ read("lm_head", None, (), CPU).T
    assert relative(logits, logits_by_transformers(oracle, ids, bf16_cache=False)) < 1e-5


def test_windows_are_spread_evenly_and_never_overlap() -> None:
    found = calibration_windows(range(10_000), 5_000, 512)
    assert found.shape == (9, 512) and found[0, 0] == 0 and found[-1, -1] == 9_999
    assert (found[1:, 0] > found[:-1, -1]).all() and (found.diff(dim=1) == 1).all()
    assert calibration_windows(range(MIN_TOKENS), 10**6, 512).numel() == MIN_TOKENS


# --- what is folded ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", MODULES)
def test_folding_any_scale_keeps_the_float_function(family: str, name: str, tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    save(random_model(tiny_config(family, **changes)), tmp_path)
    spec, (layer, _), _ = float_layers(tmp_path)
    x = torch.randn(2, 30, spec.hidden_size, generator=torch.Generator().manual_seed(0))
    before, entering = output(layer, x), layer.inputs(x)[name]
    features = spec.num_kv_heads * spec.head_dim if name == "o" else layer.tensors[name].shape[1]
    fold(layer, name, torch.logspace(-0.5, 0.5, features))
    assert relative(output(layer, x), before) < 1e-5
    assert relative(layer.inputs(x)[name], entering) > 0.1


@pytest.mark.parametrize("prepare", [awq, smoothquant])
def test_preparing_keeps_the_float_function(prepare: Callable[..., None], folder: Path) -> None:
    _, (layer, _), read = float_layers(folder)
    x = read("embeddings", None, (), CPU)[calibration_windows([ord(c) % 256 for c in TEXT], 2048, 64)].float()
    before, weight = output(layer, x), layer.tensors["qkv"]
    prepare(layer, x, 128)
    assert relative(output(layer, x), before) < 1e-5
    assert not torch.equal(layer.tensors["qkv"], weight)


def test_smoothquant_evens_out_what_enters_a_norms_matrices(folder: Path) -> None:
    _, (layer, _), read = float_layers(folder)
    x = read("embeddings", None, (), CPU)[calibration_windows([ord(c) % 256 for c in TEXT], 2048, 64)].float()

    def spread(name: str) -> float:
        largest = layer.inputs(x)[name].abs().amax((0, 1))
        return float(largest.amax() / largest.median())

    before = {name: spread(name) for name in ("qkv", "gate_up")}
    smoothquant(layer, x, 128)
    assert all(spread(name) < 0.6 * before[name] for name in before)


# --- results ----------------------------------------------------------------------------------------------------------


def test_calibrated_methods_lose_less_than_rounding(folder: Path) -> None:
    """At the output of the first layer, on text that was not calibrated on."""
    _, (layer, _), read = float_layers(folder)
    ids = load_model(EngineConfig(model=str(folder))).tokenizer.encode(TEXT[3000:3400])
    x = read("embeddings", None, (), CPU)[torch.tensor([ids])].float()
    expected = output(layer, x) - x
    error = {}
    for method in ("rtn", "awq", "gptq"):
        held = quick(folder, method, calibration=TEXT[:2500]).weights
        tensors = {name: held(name, 0, (), CPU) for name in layer.tensors}
        dense = {n: t.float() if isinstance(t, Tensor) else t.dequantize() for n, t in tensors.items()}
        error[method] = relative(output(replace(layer, tensors=dense), x) - x, expected)
    assert error["awq"] < 0.9 * error["rtn"] and error["gptq"] < 0.9 * error["rtn"], error


def test_rounding_to_nearest_is_what_the_engine_does_itself(folder: Path) -> None:
    quantized = decoder_of(quick(folder, "rtn", group_size=64))
    with load_model(EngineConfig(model=str(folder))) as model:
        own = model.decoder(weights="int4", group_size=64, device=CPU, impl="torch")
    for name, matrix in quantized.matrices().items():
        if name != "lm_head":
            assert torch.equal(matrix.dequantize(), own.matrices()[name].dequantize())


def test_layers_are_calibrated_on_what_the_quantized_ones_before_send(folder: Path) -> None:
    """The second layer of a quantized model is rounded otherwise when the first one stayed as it was."""
    whole_model = quick(folder, "gptq")
    first_left = {f"layers.0.{name}": "bf16" for name in MODULES}
    left = quick(folder, "gptq", weights=WeightPlan.of({"default": "int4", **first_left}))
    a, b = (decoder_of(model).matrices()["layers.1.qkv"].dequantize() for model in (whole_model, left))
    assert 0 < relative(a, b) < 0.2


def test_the_result_runs_in_an_engine_and_its_model_stays_open(folder: Path) -> None:
    with load_model(EngineConfig(model=str(folder))) as original:
        result = quick(original, "gptq")
        assert original.host_bytes > 0
        with Engine(EngineConfig(device="cpu", memory_limit=64 << 20), model=result) as engine:
            assert "gptq" in engine.description and "8 matrices int4 group 128" in engine.description
            assert engine.generate(["abc"], SamplingParams(max_tokens=3))[0].finish_reason


def test_a_model_that_was_opened_here_is_closed_and_the_result_lives_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[LoadedModel] = []

    def remember(config: EngineConfig) -> LoadedModel:
        opened.append(load_model(config))
        return opened[-1]

    monkeypatch.setattr("engine.quantize.run.load_model", remember)
    result = quick(folder, "rtn")
    assert opened[0].host_bytes == 0
    with pytest.raises(ConfigError, match="closed"):
        _ = opened[0].weights
    assert decoder_of(result).matrix_formats() == {"int4 group 128": 8}


def test_progress_counts_the_matrices(folder: Path) -> None:
    seen: list[Any] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            self.total, self.count = options["total"], 0
            seen.append(self)

        def update(self) -> None:
            self.count += 1

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None: ...

    quick(folder, "rtn", bar=Bar)
    assert [(bar.total, bar.count) for bar in seen] == [(8, 8)]


def test_synthetic_models_are_quantized_but_not_saved(tmp_path: Path) -> None:
    result = quick("synthetic:tiny", "hqq", calibration=None)
    assert result.is_synthetic and decoder_of(result).matrix_formats() == {"int4 group 128": 8}
    with pytest.raises(ConfigError, match="random weights"):
        quick("synthetic:tiny", "rtn", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "'magic'.*rtn, hqq, awq, gptq, smoothquant"),
        ({"calibration": None}, "gptq needs a calibration text.*rtn, hqq"),
        ({"calibration": "short"}, "5 tokens; at least 2,048"),
        ({"budget": 100}, "budget is 100.*2,048"),
        ({"group_size": 32}, "group_size is 32.*64, 128"),
        ({"order": "best"}, "'best'.*static, group, none"),
        ({"weights": "int3"}, "'int3'"),
        ({"weights": "bf16"}, "gptq would change nothing"),
        ({"weights": WeightPlan.of({"default": "int4", "lm_head": "int8"})}, "lm_head is 'int8'"),
        ({"weights": WeightPlan.of({"default": "int4", "layers.9.o": "int8"})}, r"layers\.9\.o.*0 to 1"),
        ({"weights": WeightPlan.of({"default": "fp8", "layers.1.o": "int8"})}, "one 8-bit format, not int8 and fp8"),
        ({"weights": WeightPlan.of({"default": "int4", "layers.1.o": "w4a8"})}, "one 4-bit format, not int4 and w4a8"),
        ({"method": "smoothquant", "weights": "w4a8"}, "formats of 8 or 16 bits, not w4a8"),
        ({"layout": "gptq", "weights": "w4a8"}, "'gptq', which does not hold weights 'w4a8'"),
        ({"method": "smoothquant"}, "smoothquant prepares formats of 8 or 16 bits"),
        ({"layout": "gguf"}, "'gguf'.*awq, gptq, compressed-tensors, plain"),
        ({"layout": "awq", "weights": "int8"}, "'awq', which does not hold weights 'int8'.*'compressed-tensors' does"),
        ({"layout": "awq", "order": "group"}, "activation order.*'gptq' does"),
        ({"out": "missing/out"}, "no folder.*missing"),
        ({"device": "tpu"}, "'tpu'.*auto, cpu, cuda"),
    ],
)
def test_options_that_are_refused(
    options: dict[str, Any], words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    method = options.pop("method", "gptq")
    with pytest.raises(ConfigError, match=words) as caught:
        quick(folder, method, **{"out": "out", **options})
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        quick(folder, "rtn", out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_group_that_does_not_divide(tmp_path: Path) -> None:
    save(random_model(tiny_config("llama", hidden_size=192), torch.bfloat16), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"128; it does not divide the 192 in features of layers\.0\.qkv"):
        quick(tmp_path / "model", "rtn", out=tmp_path / "out")
    assert quick(tmp_path / "model", "rtn", group_size=64).spec.stored is not None


def test_weights_that_are_no_numbers(folder: Path, tmp_path: Path) -> None:
    model = load_model(EngineConfig(model=str(folder)))
    model.weights._tensors["model.layers.0.mlp.down_proj.weight"][3, 4] = float("nan")  # type: ignore[attr-defined]
    for method in METHODS:
        weights = "int8" if method == "smoothquant" else "int4"
        with pytest.raises(CheckpointError, match=r"down of layer 0 holds NaN"):
            quick(model, method, weights=weights, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_quantized_already_is_refused(folder: Path, tmp_path: Path) -> None:
    quick(folder, "rtn", out=tmp_path / "once")
    with pytest.raises(ConfigError, match=r"quantized already \(awq\)"):
        quick(tmp_path / "once", "rtn")


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_leaves_nothing_behind(folder: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) > 6

    with pytest.raises(InterruptedError, match="nothing was written"):
        quick(folder, "rtn", out=tmp_path / "out", stopped=stopped)
    assert len(asked) == 7 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError("the disk is full")])
def test_an_interrupt_while_writing_leaves_nothing_behind(
    error: BaseException, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []

    def fails(*_: object) -> None:
        written.extend(path for path in tmp_path.rglob("*.safetensors"))
        raise error

    monkeypatch.setattr("engine.quantize.save._write_config", fails)
    with pytest.raises(error if isinstance(error, type) else OSError):
        quick(folder, "rtn", out=tmp_path / "out")
    assert written and list(tmp_path.iterdir()) == []


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.py"
    text.write_text(TEXT)
    arguments = ["--model", str(folder), "--calibration", str(text), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--group-size", "64", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "4.50 bits per weight" in said and str(tmp_path / "out") in said
    with load_model(EngineConfig(model=str(tmp_path / "out"))) as model:
        assert decoder_of(model).matrix_formats() == {"int4 group 64": 8}
    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_the_command_line_takes_a_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = '{"default": "int4", "layers.0.down": "int8"}'
    assert main(["--model", str(folder), "--method", "rtn", "--weights", plan, "--quiet"]) == 0
    assert "4.57 bits per weight" in capsys.readouterr().out
    assert main(["--model", str(folder), "--calibration", str(folder / "none.txt"), "--quiet"]) == 2
    assert "none.txt" in capsys.readouterr().err
