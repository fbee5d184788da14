"""transformers on the same model, in the same process: `generate` on padded batches, and its continuous batching."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from engine.bench.measure import Candidate
from engine.bench.work import Work
from engine.errors import ConfigError
from engine.loading.loader import LoadedModel

PADDED = (16, 64)
"""Prompts of a padded batch, each size measured: what a small batch loses in speed, a large one pays for in padding and
in requests that wait for its longest output."""


def batches(count: int) -> list[int]:
    """Sizes of padded batches that differ for `count` prompts."""
    return [size for smaller, size in zip((0, *PADDED), PADDED, strict=False) if smaller < count]


def load_network(model: LoadedModel, device: torch.device) -> Any:
    """The model as transformers computes it, in bf16; of a synthetic one the dimensions, with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    if not model.is_synthetic:
        folder = _folder(model.source)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        return network.eval().to(device)
    spec = model.spec
    kinds = {"LlamaForCausalLM": LlamaConfig, "Qwen2ForCausalLM": Qwen2Config}
    config = kinds[spec.architecture](
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rms_norm_eps=spec.rms_norm_eps,
        rope_parameters=dict(spec.rope),
        tie_word_embeddings=spec.tie_embeddings,
    )
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _folder(source: str) -> Path:
    if source == "bundled":
        from engine.bundled import MODEL_DIR

        return MODEL_DIR
    if not Path(source).is_dir():
        raise ConfigError(f"--compare needs a model on this disk; --model is {source!r}: give the folder it lies in")
    return Path(source)


def generate_candidate(model: LoadedModel, network: Any, batch_size: int) -> Candidate:
    """transformers' own `generate`, greedy, in left-padded batches that each run to their longest output."""
    pad = model.spec.eos_token_ids[0] if model.spec.eos_token_ids else 0

    def run(work: Work) -> tuple[float, None]:
        start = time.perf_counter()
        for first in range(0, len(work.prompts), batch_size):
            prompts = work.prompts[first : first + batch_size]
            longest = max(map(len, prompts))
            ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=network.device)
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=network.device)
            new = max(work.num_outputs[first : first + batch_size])
            with torch.inference_mode():
                network.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                    pad_token_id=pad,
                )
        return time.perf_counter() - start, None

    return run


class ContinuousCandidate:
    """transformers' continuous batching, greedy, every request with its own number of tokens; started at the first run
    and kept, as ours is."""

    def __init__(self, network: Any) -> None:
        self._network = network
        self._manager: Any = None

    def __call__(self, work: Work) -> tuple[float, None]:
        if self._manager is None:
            from transformers import GenerationConfig

            settings = GenerationConfig(do_sample=False, max_new_tokens=1 << 20, eos_token_id=-1)
            self._manager = self._network.init_continuous_batching(generation_config=settings)
            self._manager.start()
        start = time.perf_counter()
        for prompt, count in zip(work.prompts, work.num_outputs, strict=True):
            self._manager.add_request(prompt, max_new_tokens=count, eos_token_id=-1)
        left, made = len(work.prompts), 0
        while left:
            result = self._manager.get_result(timeout=120)
            if result is None:
                raise RuntimeError("transformers' continuous batching gave no result within two minutes")
            if result.is_finished():
                left -= 1
                made += len(result.generated_tokens)
        seconds = time.perf_counter() - start
        if made != work.output_tokens:
            raise RuntimeError(f"transformers' continuous batching made {made} tokens, not {work.output_tokens}")
        return seconds, None

    def close(self) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)
