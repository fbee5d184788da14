"""The bundled model as it ships: its size, its tokenizer, its split, and that it writes Python."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from engine.bundled import END_OF_TEXT, MODEL_DIR, heldout_text
from engine.bundled.corpus import batches, is_held_out, is_prose_or_code
from engine.bundled.evaluate import complete, function_of, negative_log_likelihood, parses
from engine.bundled.train import Recipe, model_config


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(MODEL_DIR)
    return loaded


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()


def test_all_files_together_stay_within_24_mb() -> None:
    files = [path for path in MODEL_DIR.parent.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(path.stat().st_size for path in files) <= 24_000_000


def test_import_of_the_package_needs_no_torch() -> None:
    code = "import sys, engine.bundled as b; b.heldout_text(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=MODEL_DIR.parents[2])


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "head_dim"])
def test_config_is_the_one_the_script_trains(model: LlamaForCausalLM, name: str) -> None:
    assert getattr(model.config, name) == getattr(model_config(), name)


def test_tensors_match_the_config_and_are_bf16() -> None:
    expected = {name: list(tensor.shape) for name, tensor in LlamaForCausalLM(model_config()).state_dict().items()}
    del expected["lm_head.weight"]  # tied
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as tensors:
        found = {name: tensors.get_slice(name) for name in expected}
        assert sorted(tensors.keys()) == sorted(expected)
        assert {name: tensor.get_shape() for name, tensor in found.items()} == expected
        assert {tensor.get_dtype() for tensor in found.values()} == {"BF16"}


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_tokenizer_round_trips_any_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["  \t x\r\n", "naïve λ 漢字 🐍 e\u0301\u200d", "\x00\x0c\u2028", " ", "a\n\n\n    b  # c "]
)
def test_tokenizer_round_trips_awkward_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_keeps_python_compact(tokenizer: PreTrainedTokenizerFast) -> None:
    text = heldout_text()
    assert len(text.encode()) / len(tokenizer.encode(text, verbose=False)) > 3.0
    for depth in (1, 2, 3, 4, 5):
        assert len(tokenizer.encode("\n" + "    " * depth + "return")) == 3  # newline, indentation, word


def test_prompts_may_end_before_or_after_a_newline_or_indentation(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = tokenizer.encode("def f(n):\n    return n")
    for prompt in ("def f(n):", "def f(n):\n", "def f(n):\n    "):
        tokens = tokenizer.encode(prompt)
        assert whole[: len(tokens)] == tokens


def test_end_of_text_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.encode(END_OF_TEXT) == [tokenizer.eos_token_id] == [tokenizer.bos_token_id] == [0]


def test_excerpt_holds_the_files_of_its_manifest_all_from_the_held_out_side() -> None:
    files = json.loads((MODEL_DIR / "manifest.json").read_text())["files"]
    texts = heldout_text().split(END_OF_TEXT)
    assert texts.pop() == ""
    assert [len(text.encode()) for text in texts] == [file["bytes"] for file in files]
    assert all(is_held_out(file["path"]) for file in files)
    assert 190_000 <= len(heldout_text().encode()) <= 250_000


def test_split_holds_back_a_few_percent() -> None:
    share = sum(is_held_out(f"package/module_{i}.py") for i in range(10_000)) / 10_000
    assert share == pytest.approx(0.04, abs=0.01)


def test_tables_are_not_trained_on() -> None:
    assert not is_prose_or_code("0x1f, 0x2e, 0x3d, " * 100)
    assert is_prose_or_code("def add(left, right):\n    return left + right\n" * 10)


def test_aligned_batches_begin_where_lines_do(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(200)) + END_OF_TEXT
    documents = [np.array(tokenizer.encode(text), dtype=np.uint16)]
    (newline,) = tokenizer.encode("\n")
    source = batches(documents, [newline, 0], aligned=1.0, rows=8, context=16, seed=0)
    for _ in range(5):
        batch = next(source)
        assert batch.shape == (8, 17)
        assert all(tokenizer.decode(row).startswith(("def f", "    return")) for row in batch)


def test_rate_warms_up_then_falls_to_zero() -> None:
    recipe = Recipe()
    assert recipe.rate(0.0) == recipe.rate(1.0) == 0.0
    assert recipe.rate(0.3) == recipe.learning_rate > recipe.rate(0.8) > recipe.rate(0.9)


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ("def f(x):\n    return x\n", True),
        ("def f(x):\n    y = 1\n    return g(x,", True),  # the last statement is unfinished
        ('def f(x):\n    y = 1\n    """Text', True),
        ("def f(x):\n    return g(x,", False),  # nothing is left of the body
        ("def f(x):\n    y = 1\n    z = = 2\n    return y", False),
        ("def f(x):\nreturn x", False),
    ],
)
def test_parses_forgives_only_what_is_unfinished(text: str, valid: bool) -> None:
    assert parses(text) is valid


def test_function_of_ends_where_the_function_does() -> None:
    assert function_of("def f():\n    a\n\n    b\nc\n") == "def f():\n    a\n\n    b"
    assert function_of("def f():\n    a\n    ret") == "def f():\n    a"


def test_perplexity_on_held_out_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    stream = np.array(tokenizer.encode(heldout_text()[:12_000]), dtype=np.uint16)
    perplexity = math.exp(negative_log_likelihood(model, stream, context=1024) / (len(stream) - 1))
    assert perplexity < 12.0


@pytest.mark.parametrize("prompt", ["def fibonacci(n):", "def fibonacci(n):\n"])
def test_greedy_body_is_indented_by_one_level(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> None:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    body = tokenizer.decode(output[0], skip_special_tokens=True).split("\n")[1]
    assert body.strip()
    assert len(body) - len(body.lstrip(" ")) == 4


def test_greedy_completion_is_valid_python(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    (text,) = complete(model, tokenizer, ["def list_files(path):\n"])
    assert parses(text.rpartition("\n")[0])


def test_model_card_states_the_measured_figures() -> None:
    card = (MODEL_DIR.parent / "README.md").read_text(encoding="utf-8")
    measured = json.loads((MODEL_DIR / "evaluation.json").read_text())
    for name in ("perplexity", "bits_per_byte"):
        assert f"{measured[name]:.3f}" in card
    assert f"{measured['completions_that_parse']} of {measured['completions']}" in card
