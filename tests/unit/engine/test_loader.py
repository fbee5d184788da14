"""Loading: where models come from, and one clear sentence for each way in which a folder can be wrong."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import engine.loading.loader
from engine.config import EngineConfig
from engine.errors import CheckpointError, ConfigError
from engine.loading.checkpoint import ARCHITECTURES
from engine.loading.loader import load_model
from engine.loading.shapes import SHAPES
from engine.model.tokenizer import ByteTokenizer
from tests.unit.engine.checkpoints import VOCAB, random_model, save, tiny_config

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound bf16 Llama; damaged copies of it are what most tests load."""
    folder = tmp_path_factory.mktemp("good") / "llama"
    return save(random_model(tiny_config("llama"), torch.bfloat16), folder)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "copy"))


def config(model: object, **options: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **options)


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def refusal(folder: Path, **options: Any) -> str:
    """The sentence of the CheckpointError; nothing of the folder stays mapped."""
    with pytest.raises(CheckpointError) as caught:
        load_model(config(folder, **options))
    gc.collect()
    assert not mapped(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def mapped(folder: Path) -> list[str]:
    process = psutil.Process()
    paths = [m.path for m in process.memory_maps()] + [f.path for f in process.open_files()]
    return [path for path in paths if str(folder) in path]


def test_a_sound_folder_loads_and_lets_go_of_its_files(folder: Path) -> None:
    with load_model(config(folder)) as model:
        assert model.source == str(folder) and not model.is_synthetic
        assert model.spec.architecture == "LlamaForCausalLM"
        assert (model.spec.num_heads, model.spec.num_kv_heads, model.spec.head_dim) == (4, 2, 64)
        assert model.spec.eos_token_ids == (2,) and model.tokenizer.eos_token_ids == (2,)
        assert model.tokenizer.decode(model.tokenizer.encode("def f(x):\n\treturn 'é'")) == "def f(x):\n\treturn 'é'"
        assert model.host_bytes == model.spec.num_parameters * 2
        assert not mapped(folder)
    model.close()
    with pytest.raises(ConfigError, match="closed"):
        model.decoder(weights="bf16", group_size=64, device=CPU, impl="auto")


def test_sharded_weights_load_as_one_file_does(folder: Path, tmp_path: Path) -> None:
    sharded = save(random_model(tiny_config("llama"), torch.bfloat16), tmp_path / "shards", max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    options = {"weights": "bf16", "group_size": 64, "device": CPU, "impl": "torch"}
    one, many = (load_model(config(path)).decoder(**options) for path in (folder, sharded))
    for left, right in zip(one._layers, many._layers, strict=True):
        assert all(torch.equal(left.matrices()[k].data, right.matrices()[k].data) for k in left.matrices())
    next(sharded.glob("model-00002*")).unlink()
    assert "model-00002" in refusal(sharded)


def test_decoders_are_built_from_the_original_and_the_last_is_kept(folder: Path) -> None:
    with load_model(config(folder)) as model:
        first = model.decoder(weights="int8", group_size=128, device=CPU, impl="auto")
        assert model.decoder(weights="int8", group_size=64, device=CPU, impl="auto") is first
        other = model.decoder(weights="int4", group_size=64, device=CPU, impl="auto")
        assert other is not first
        assert model.decoder(weights="int4", group_size=128, device=CPU, impl="auto") is not other
        again = model.decoder(weights="int8", group_size=128, device=CPU, impl="auto")
        assert torch.equal(again._layers[1].qkv.data, first._layers[1].qkv.data)


def test_a_group_size_that_does_not_divide_is_refused(tmp_path: Path) -> None:
    save(random_model(tiny_config("llama", intermediate_size=192)), tmp_path)
    with load_model(config(tmp_path)) as model, pytest.raises(ConfigError, match=r"down.*192.*128"):
        model.decoder(weights="int4", group_size=128, device=CPU, impl="auto")


@pytest.mark.parametrize("shape", SHAPES)
def test_synthetic_shapes_need_no_files(shape: str) -> None:
    model = load_model(config(f"synthetic:{shape}", runner="simulated"))
    assert model.is_synthetic and model.spec.name == f"synthetic:{shape}"
    assert model.tokenizer.decode(model.tokenizer.encode("höhe <b>")) == "höhe <b>"


def test_parameters_of_the_synthetic_shapes_are_the_published_ones() -> None:
    millions = {name: spec.num_parameters / 1e6 for name, spec in SHAPES.items()}
    assert millions["0.5b"] == pytest.approx(494, abs=1)  # Qwen2.5 technical report: 0.49B
    assert millions["1.5b"] == pytest.approx(1544, abs=1)  # 1.54B
    assert millions["7b"] == pytest.approx(7740, abs=5)  # InternLM2.5-7B: 7.74B
    assert millions["8b"] == pytest.approx(8030, abs=1)  # Llama 3.1: 8.03B


def test_byte_tokenizer_shows_ids_beyond_bytes() -> None:
    tokenizer = ByteTokenizer(1000)
    assert tokenizer.vocab_size == 1000 and len(tokenizer.decode([65, 300, 999])) == 3


def test_simulation_reads_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    model = load_model(config(folder, runner="simulated"))
    with pytest.raises(ConfigError, match="simulation"):
        model.decoder(weights="bf16", group_size=64, device=CPU, impl="auto")


@pytest.mark.parametrize("name", ["synthetic:9000b", "no-such-folder", "./no/such/folder", "a/b/c"])
def test_names_that_lead_nowhere(name: str) -> None:
    with pytest.raises(ConfigError, match=name.replace(".", "[.]")):
        load_model(config(name))


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "give the folder" in refusal(folder / WEIGHTS)


# --- damaged folders ------------------------------------------------------------------------------------------------


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder).endswith("has no config.json")


@pytest.mark.parametrize("text", ["{", "[1]", "\xff"])
def test_config_that_is_not_an_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "no weights" in refusal(folder)


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(folder)


def test_damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    assert "tokenizer" in refusal(folder)


def test_tokenizer_larger_than_the_model(folder: Path) -> None:
    edit(folder, vocab_size=100)
    assert "vocab_size is 100" in refusal(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "weights.pt"])
def test_pickled_weights_are_named_and_not_opened(folder: Path, name: str) -> None:
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    sentence = refusal(folder)
    assert name in sentence and "pickle" in sentence


@pytest.mark.parametrize("keep", [0, 4, 1000, -1000])
def test_truncated_weights(folder: Path, keep: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:keep])
    assert f"{WEIGHTS} is damaged or truncated" in refusal(folder)


def test_garbage_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)
    assert "damaged" in refusal(folder)


def test_shapes_that_differ_from_the_config(folder: Path) -> None:
    edit(folder, intermediate_size=384)
    sentence = refusal(folder)
    assert "mlp" in sentence and "256" in sentence and "384" in sentence


def test_missing_tensors(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight is missing" in refusal(folder)
    edit(folder, num_hidden_layers=4)
    assert "and 17 more are missing" in refusal(folder)


def test_unexpected_tensors(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(256)}))
    assert "q_proj.bias is not expected" in refusal(folder)


def test_rotary_tables_and_copies_of_tied_embeddings_are_ignored(tmp_path: Path) -> None:
    save(random_model(tiny_config("llama", tie_word_embeddings=True)), tmp_path)
    extra = {"lm_head.weight": torch.zeros(VOCAB, 128), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(32)}
    rewrite(tmp_path, lambda t: t.update(extra))
    with load_model(config(tmp_path)) as model:
        assert model.spec.tie_embeddings and model.host_bytes == model.spec.num_parameters * 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    rewrite(folder, lambda t: t["model.layers.1.self_attn.k_proj.weight"].view(-1)[77:78].fill_(value))
    assert "model.layers.1.self_attn.k_proj.weight holds NaN or infinity" in refusal(folder)


def test_dtypes_that_are_not_read(folder: Path) -> None:
    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int32)

    rewrite(folder, convert)
    assert "model.norm.weight is stored as I32" in refusal(folder)


SHORT_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 256,
    "short_factor": [1.0] * 3, "long_factor": [1.0] * 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", *ARCHITECTURES]),
        ({"architectures": None}, ["none named", *ARCHITECTURES]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, ["awq", "quantized already"]),
        ({"hidden_act": "gelu"}, ["gelu", "silu"]),
        ({"head_dim": 96}, ["96", "64", "128"]),
        ({"num_key_value_heads": 3}, ["4 heads", "3 KV heads"]),
        ({"num_hidden_layers": 0}, ["num_layers is 0"]),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4}}, ["proportional", "llama3"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["yarn"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["0.5"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, ["angles that are no numbers"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, ["angles that are no numbers"]),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.0}}, ["no numbers"]),
        ({"rope_parameters": SHORT_LONGROPE}, ["rope parameters", "incomplete"]),
        ({"architectures": {"a": 1}}, ["none named", *ARCHITECTURES]),
        ({"architectures": 5}, ["none named"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan", "at least 0"]),
        ({"rms_norm_eps": -1.0}, ["rms_norm_eps is -1.0"]),
        ({"sliding_window": "a"}, ["sliding_window is 'a'"]),
        ({"quantization_config": {"quant_method": "awq", "config_groups": {"a": 5}}}, ["awq", "stored unquantized"]),
    ],
)
def test_configs_that_are_not_computed(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    edit(folder, **change)
    sentence = refusal(folder)
    assert all(word in sentence for word in words), sentence


@pytest.mark.parametrize("value", ["abc", [1, "a"], {"a": 1}, 1.5])
def test_ends_that_are_no_tokens(folder: Path, value: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert f"eos_token_id is {value!r}; it must be a token id" in refusal(folder)


def test_a_link_that_leads_nowhere(folder: Path) -> None:
    """As in a hub's cache whose blobs were cleaned away."""
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(folder / "gone")
    assert f"{WEIGHTS} is no file: a folder, or a link that leads nowhere" in refusal(folder)


def test_remote_code_is_not_run(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    edit(folder, auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}, model_type="evil")
    refusal(folder)
    edit(folder, model_type="llama")
    load_model(config(folder)).close()
    assert not (folder / "ran").exists()


def test_sliding_window_must_not_bite(tmp_path: Path) -> None:
    save(random_model(tiny_config("mistral", sliding_window=64)), tmp_path)
    with load_model(config(tmp_path, session_len=64)) as model:
        assert model.spec.max_positions == 64 and model.spec.sliding_window == 64
    with pytest.raises(ConfigError, match=r"65.*sliding window.*64"):
        load_model(config(tmp_path, session_len=65))


# --- the hub, without a connection ------------------------------------------------------------------------------------


def test_hub_snapshots(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[dict[str, Any]] = []
    reachable, cached = True, True

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        offline = options.get("local_files_only", False)
        if (offline and not cached) or (not offline and not reachable):
            raise ConnectionError("no route to host")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load_model(config("owner/name")).source == "owner/name"
    assert asked[0]["allow_patterns"] == list(engine.loading.loader.HUB_PATTERNS)
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in engine.loading.loader.HUB_PATTERNS)
    reachable = False
    assert "local copy" in load_model(config("owner/name")).source
    cached = False
    with pytest.raises(ConfigError, match=r"owner/name.*cannot be reached.*ConnectionError"):
        load_model(config("owner/name"))
