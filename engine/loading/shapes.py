"""`synthetic:<shape>`: published dimensions, random weights. Speed and memory are real; text and quality are not."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.model.spec import ModelSpec

_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SHAPES: dict[str, ModelSpec] = {
    # For tests: every matrix is a few kilobytes, every size a multiple of what the kernels ask for.
    "tiny": ModelSpec(
        name="tiny", architecture="LlamaForCausalLM", vocab_size=512, hidden_size=128, num_layers=2, num_heads=4,
        num_kv_heads=2, head_dim=64, intermediate_size=256, max_positions=2048,
    ),
    # config.json of Qwen/Qwen2.5-0.5B
    "0.5b": ModelSpec(
        name="0.5b", architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=896, num_layers=24, num_heads=14,
        num_kv_heads=2, head_dim=64, intermediate_size=4864, max_positions=32768, rms_norm_eps=1e-6,
        tie_embeddings=True, attention_bias=True, rope={"rope_type": "default", "rope_theta": 1e6},
    ),
    # config.json of Qwen/Qwen2.5-1.5B
    "1.5b": ModelSpec(
        name="1.5b", architecture="Qwen2ForCausalLM", vocab_size=151936, hidden_size=1536, num_layers=28, num_heads=12,
        num_kv_heads=2, head_dim=128, intermediate_size=8960, max_positions=131072, rms_norm_eps=1e-6,
        tie_embeddings=True, attention_bias=True, rope={"rope_type": "default", "rope_theta": 1e6},
    ),
    # config.json of internlm/internlm2_5-7b, in the Llama architecture and without its dynamic rope scaling
    "7b": ModelSpec(
        name="7b", architecture="LlamaForCausalLM", vocab_size=92544, hidden_size=4096, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, intermediate_size=14336, max_positions=32768,
        rope={"rope_type": "default", "rope_theta": 1e6},
    ),
    # config.json of meta-llama/Llama-3.1-8B
    "8b": ModelSpec(
        name="8b", architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, num_layers=32, num_heads=32,
        num_kv_heads=8, head_dim=128, intermediate_size=14336, max_positions=131072, rope=_LLAMA3_ROPE,
    ),
}  # fmt: skip


def synthetic_spec(shape: str) -> ModelSpec:
    """The spec of `synthetic:<shape>`; ConfigError with the shapes there are."""
    if shape not in SHAPES:
        raise ConfigError(f"model is 'synthetic:{shape}'; the shapes are {', '.join(SHAPES)}")
    return replace(SHAPES[shape], name=f"synthetic:{shape}")


class SyntheticWeights:
    """Random weights by canonical name (see `engine.model.decoder.layer_shapes`), made where they are used, never kept.

    The same seed, name, layer and kind of device give the same values, so another weight format quantizes the same
    model. Standard deviations keep activations near one: 1/sqrt(K) for a matrix [N, K], reduced by sqrt(2 * layers)
    where its output joins the residual stream (Radford et al., GPT-2, 2019, section 2.3).
    """

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        self.spec = spec
        self.seed = seed

    def __call__(self, name: str, layer: int | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
        """bfloat16 `shape` on `device`."""
        if name.endswith("norm"):
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self.seed}/{name}/{layer}".encode()))
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return drawn.normal_(0.0, self._std(name, shape), generator=generator)

    def _std(self, name: str, shape: tuple[int, ...]) -> float:
        if name.endswith("bias"):
            return 0.02
        std = 1.0 / math.sqrt(shape[1])
        return std / math.sqrt(2 * self.spec.num_layers) if name in ("o", "down") else std

    @property
    def nbytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is held."""
