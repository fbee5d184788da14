"""How large the key biases of a checkpoint are: keys of Qwen2 stand on a bias that can dwarf what tells them apart."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.loading.checkpoint import read_modules
from engine.model.kv_plan import KeyBias
from engine.model.rope import cos_sin_table
from engine.model.spec import ModelSpec

POSITIONS = 256
"""Positions whose rotation of the bias is looked at; they reach as far as the model does, at most FARTHEST."""
FARTHEST = 8192


def key_biases(folder: Path, spec: ModelSpec) -> tuple[KeyBias, ...]:
    """One entry per layer where the keys of `spec` have a bias; empty where they have none, where a norm behind the
    bias sets their size (Qwen3), or where the folder has no weights.

    Reads the key projections only. CheckpointError as the whole checkpoint would raise it."""
    if not spec.attention_bias or spec.qk_norm or not any(folder.glob("*.safetensors")):
        return ()
    names = [f"model.layers.{layer}.{name}" for layer in range(spec.num_layers) for name in (_KEYS, _NORM)]
    held = read_modules(folder, spec, names)
    length = min(spec.max_positions, FARTHEST)
    rotation = cos_sin_table(spec, length, "cpu")[:: max(1, length // POSITIONS)]
    return tuple(
        key_bias(
            held[f"model.layers.{layer}.{_KEYS}.bias"],
            held[f"model.layers.{layer}.{_KEYS}.weight"],
            held[f"model.layers.{layer}.{_NORM}.weight"],
            rotation,
        )
        for layer in range(spec.num_layers)
    )


def key_bias(bias: Tensor, weight: Tensor, norm: Tensor, rotation: Tensor) -> KeyBias:
    """bias [heads * D] and weight [heads * D, K] of a key projection, norm [K] before it, rotation [positions, D].

    Activations behind an RMSNorm have a mean square of one per element, so a key's element varies by about the length
    of its row, the norm's weight counted in. The span is that of the rotated bias, over positions on average, and of D
    normal numbers."""
    d = rotation.shape[1]
    spread = (weight.float() * norm.float()).view(-1, d, weight.shape[1]).square().sum(-1).mean(-1).sqrt()
    first, second = bias.float().view(-1, 1, d).chunk(2, -1)
    cos, sin = rotation.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)  # [heads, positions, D]
    distance = (rotated.amax(-1) - rotated.amin(-1)).mean(-1) / spread
    size = (bias.float().view(-1, d).square().mean(-1) / spread.square() + 1).sqrt()
    return KeyBias(float(distance.max()) + _normal_span(d), float(size.max()))


def _normal_span(d: int) -> float:
    """About the expected distance between the largest and the smallest of d normal numbers: twice the quantile at
    1 - 1/(d + 1) (Blom, 1958, in its simplest form)."""
    return 2 * float(torch.special.ndtri(torch.tensor(1 - 1 / (d + 1))))


_KEYS, _NORM = "self_attn.k_proj", "input_layernorm"
