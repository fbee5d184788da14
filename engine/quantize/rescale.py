"""The steps of AWQ and SmoothQuant that move scale inside a layer: the float function stays, the rounding gets easier.

A scale on the inputs of qkv and gate_up goes into the norm before them, one on the inputs of down into the rows of
`up`, one on the inputs of o into the rows of v; query heads that share a KV head then share its scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.quantize.calibration import FloatLayer
from kernels.formats.quantize import grouped, on_grid, span
from kernels.formats.smoothing import awq_scales, fold_norm, search, smooth

SEARCH_SEQUENCES = 4
_NORM = {"qkv": "input_norm", "gate_up": "post_norm"}


def smoothquant(layer: FloatLayer, x: Tensor, group_size: int) -> None:
    """Xiao et al. 2022: the inputs after the two norms lose their outliers to the weights, alpha 0.5."""
    largest: dict[str, Tensor] = {}
    for part in x.split(SEARCH_SEQUENCES):
        for name, entering in layer.inputs(part).items():
            now = entering.abs().amax((0, 1))
            largest[name] = torch.maximum(largest.get(name, now), now)
    for name in _NORM:
        fold(layer, name, smooth(largest[name], layer.tensors[name]))


def awq(layer: FloatLayer, x: Tensor, group_size: int) -> None:
    """Lin et al. 2023: for each matrix the scale of a grid that leaves the least error at the output of its block
    (attention for qkv, the MLP for gate_up, the matrix itself for o and down), on a sample of sequences."""
    sample = x[:: -(-len(x) // SEARCH_SEQUENCES)]
    entering = layer.inputs(sample)
    found = {name: _searched(layer, name, entering, group_size) for name in entering}
    for name, scale in found.items():
        fold(layer, name, scale)


def _searched(layer: FloatLayer, name: str, entering: dict[str, Tensor], group_size: int) -> Tensor:
    weight, x = layer.tensors[name], entering[name]

    def output(changed: Tensor) -> Tensor:
        y = layer.multiply(name, x, changed)
        following = {"qkv": "o", "gate_up": "down"}.get(name)
        return y if following is None else layer.multiply(following, layer.input_of(following, y))

    expected = output(weight)

    def loss(scale: Tensor) -> float:
        columns = _spread(layer, name, scale)
        w = grouped(weight * columns, group_size)
        rounded = on_grid(w, span(w)).dequantize() / columns
        return float((output(rounded) - expected).square().mean())

    activation = x.abs().mean((0, 1))
    if name == "o":  # one scale for the query heads of a KV head
        activation = _by_kv_head(layer, activation).mean(1).flatten()
        weight_of_kv = _by_kv_head(layer, weight.abs()).mean(-2).flatten(-2)
        return search(awq_scales(activation, weight_of_kv, layer.spec.head_dim), loss)[0]
    return search(awq_scales(activation, weight, group_size), loss)[0]


def _by_kv_head(layer: FloatLayer, x: Tensor) -> Tensor:
    """[..., heads * D] -> [..., KV heads, heads of each, D]."""
    spec = layer.spec
    heads: Tensor = x.unflatten(-1, (spec.num_kv_heads, -1, spec.head_dim))
    return heads


def _spread(layer: FloatLayer, name: str, scale: Tensor) -> Tensor:
    """A scale for every input of `name`: those of o repeat for the query heads that share a KV head."""
    if name != "o":
        return scale
    spec = layer.spec
    repeats = spec.num_heads // spec.num_kv_heads
    repeated: Tensor = scale.view(-1, 1, spec.head_dim).expand(-1, repeats, -1).flatten()
    return repeated


def fold(layer: FloatLayer, name: str, scale: Tensor) -> None:
    """Divide the inputs of `name` by `scale` where they come from and multiply its columns."""
    tensors = layer.tensors
    if name in _NORM:
        norm = _NORM[name]
        tensors[norm], factor = fold_norm(tensors[norm], scale)
        tensors[name] = tensors[name] * factor
        return
    tensors[name] = tensors[name] * _spread(layer, name, scale)
    source = {"o": "qkv", "down": "gate_up"}[name]  # v and up are the last rows of what they are fused into
    for held in (source, f"{source}_bias"):
        if held in tensors:
            rows = tensors[held].clone()
            tail = rows[-len(scale) :]
            tail /= scale if rows.dim() == 1 else scale[:, None]
            tensors[held] = rows
