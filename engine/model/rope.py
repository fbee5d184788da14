"""The rotary table of a model: cosines and sines per position, with every scaling that transformers knows.

The frequencies come from transformers' own functions (linear, dynamic NTK, YaRN, LongRoPE, Llama 3), so that a config
means here what it means there; only the unscaled form (Su et al., RoFormer, 2021) is written out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model.spec import ModelSpec

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def cos_sin_table(spec: ModelSpec, length: int, device: torch.device | str) -> Tensor:
    """float32 [length, head_dim]: cosines of head_dim / 2 frequencies, then their sines, times the attention factor.

    The table is fixed for sessions of up to `length` tokens. Two variants depend on that length where transformers
    follows the sequence as it grows: dynamic NTK stretches beyond max_position_embeddings, LongRoPE takes its long
    factors when `length` exceeds the original context.
    """
    frequencies, factor = _frequencies(spec, length)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies.float()
    return torch.cat((angles.cos() * factor, angles.sin() * factor), -1).to(device)


def check_rope(spec: ModelSpec) -> None:
    """Raise CheckpointError, with the variants that are supported, where no table can be made for `spec`."""
    kind = spec.rope.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"{spec.name}: rope_type {kind!r} is not supported; these are: {', '.join(ROPE_TYPES)}")
    partial = spec.rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0:
        raise CheckpointError(f"{spec.name}: partial_rotary_factor is {partial}; only 1.0 is supported")
    try:
        frequencies, factor = _frequencies(spec, spec.max_positions)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{spec.name}: rope parameters {dict(spec.rope)} are incomplete: {error!r}") from error
    if not (bool(frequencies.isfinite().all()) and math.isfinite(factor)):
        raise CheckpointError(f"{spec.name}: rope parameters {dict(spec.rope)} give angles that are no numbers")


def _frequencies(spec: ModelSpec, length: int) -> tuple[Tensor, float]:
    """Inverse frequencies [head_dim / 2] and the factor on cosines and sines."""
    kind = spec.rope.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, spec.head_dim, 2, dtype=torch.float32) / spec.head_dim
        return 1.0 / (float(spec.rope["rope_theta"]) ** exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters: dict[str, Any] = dict(spec.rope)
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        num_attention_heads=spec.num_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_positions,
        rope_parameters=parameters,
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    return frequencies, float(factor)
