"""A layer in plain float arithmetic, opened between its matrices: what calibration needs to see.

Whole sequences from position 0, causal attention without a cache, float32. The engine's decoder computes the same
function (tests compare them); this one lets a quantizer read what enters each matrix and change the matrix before the
next one is entered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.errors import ConfigError
from engine.model.decoder import ReadWeight, layer_shapes
from engine.model.spec import ModelSpec
from engine.model.weight_plan import MODULES
from kernels import rope, rotation

BUDGET = 65536
WINDOW = 512
MIN_TOKENS = 2048


def calibration_windows(tokens: Sequence[int], budget: int, window: int = WINDOW) -> Tensor:
    """int64 [windows, window]: windows without overlap, evenly spread over the text, at most `budget` tokens.

    ConfigError for a text of fewer than MIN_TOKENS tokens, or a budget below that.
    """
    if budget < MIN_TOKENS:
        raise ConfigError(f"budget is {budget} calibration tokens; it must be at least {MIN_TOKENS:,}")
    if len(tokens) < MIN_TOKENS:
        raise ConfigError(
            f"the calibration text has {len(tokens):,} tokens; at least {MIN_TOKENS:,} are needed, and more is better"
        )
    count = min(len(tokens), budget) // window
    gap = (len(tokens) - count * window) / max(1, count - 1)
    starts = torch.tensor([round(i * (window + gap)) for i in range(count)])
    return torch.tensor(tokens)[starts[:, None] + torch.arange(window)]


@dataclass
class FloatLayer:
    """The tensors of one layer by canonical name, float32, and the steps between its matrices.

    Hidden states are [sequences, tokens, hidden].
    """

    spec: ModelSpec
    tensors: dict[str, Tensor]
    cos_sin: Tensor

    @classmethod
    def read(
        cls, spec: ModelSpec, read: ReadWeight, index: int, cos_sin: Tensor, device: torch.device
    ) -> FloatLayer:
        """Layer `index`; vectors are rounded to bf16, as the engine computes with them."""
        tensors = {}
        for name, shape in layer_shapes(spec).items():
            tensor = read(name, index, shape, device)
            assert isinstance(tensor, Tensor)
            held = tensor.to(device)
            tensors[name] = held.float() if held.dim() == 2 else held.bfloat16().float()
        return cls(spec, tensors, cos_sin)

    def inputs(self, x: Tensor) -> dict[str, Tensor]:
        """What enters each matrix, given the layer's input."""
        entering: dict[str, Tensor] = {}
        carried = x
        for name in MODULES:
            entering[name] = self.input_of(name, carried)
            if name != "down":
                carried = self.multiply(name, entering[name])
            if name == "o":
                carried = carried + x
        return entering

    def input_of(self, name: str, x: Tensor) -> Tensor:
        """From the layer's input (qkv), qkv's output (o), the middle of the layer (gate_up) or gate_up's output
        (down): what the matrix `name` multiplies."""
        if name == "o":
            return self._attend(x)
        if name == "down":
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up
        return self._norm(x, "input_norm" if name == "qkv" else "post_norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.tensors[name], self.spec.rms_norm_eps)

    def multiply(self, name: str, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """By the matrix `name`, or by `weight` in its place."""
        return F.linear(x, self.tensors[name] if weight is None else weight, self.tensors.get(f"{name}_bias"))

    def _attend(self, qkv: Tensor) -> Tensor:
        spec, (count, length, _) = self.spec, qkv.shape
        heads, kv_heads = spec.num_heads, spec.num_kv_heads
        q, k, v = qkv.unflatten(-1, (-1, spec.head_dim)).flatten(0, 1).split((heads, kv_heads, kv_heads), 1)
        if spec.qk_norm:
            q, k = self._norm(q, "q_norm"), self._norm(k, "k_norm")
        positions = torch.arange(length, device=qkv.device).repeat(count)
        q, k = rope(q, k, rotation(positions, self.cos_sin, impl="torch"), impl="torch")
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv_heads)
        return out.transpose(1, 2).flatten(2)
