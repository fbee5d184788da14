"""Small random checkpoints, written by transformers itself, and its own logits for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
VOCAB = 320


def tiny_config(family: str, **changes: Any) -> Any:
    """Two layers, four query heads of 64 on two KV heads, 128 wide."""
    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        **changes,
    }
    if family == "qwen2":  # its heads are always hidden_size / num_attention_heads wide
        del options["head_dim"]
        options = {**options, "hidden_size": 64 * options["num_attention_heads"]}
    return CONFIGS[family](**options)


def random_model(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """transformers' model with every parameter random, norms and biases too, so that a forgotten one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.to(dtype).eval()


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Write the checkpoint with a tokenizer of one token per character."""
    model.save_pretrained(folder, **options)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + i for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def _attention_over_bf16_cache(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    key, value = (x.to(torch.bfloat16).to(x.dtype) for x in (key, value))
    answer: tuple[Tensor, Tensor] = eager_attention_forward(module, query, key, value, *args, **kwargs)
    return answer


def logits_by_transformers(model: Any, ids: list[int], *, bf16_cache: bool = True) -> Tensor:
    """float32 [len(ids), vocab]. bf16_cache: keys and values are rounded as our cache rounds them."""
    name = "eager_over_bf16_cache"
    ALL_ATTENTION_FUNCTIONS.register(name, _attention_over_bf16_cache)
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS["eager"])
    model.set_attn_implementation(name if bf16_cache else "eager")
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits.float()
