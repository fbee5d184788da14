"""How a layer is quantized: the methods, and the pass through the layers that gives each its inputs.

Two steps on a layer: `prepare` moves scale between norms and weights and leaves the float function as it is (AWQ,
SmoothQuant); `to_int4` turns a matrix into 4-bit codes (RTN, HQQ, AWQ's clipping, GPTQ), for w4a8 too. Matrices to
which a plan gives another format are rounded to nearest in it, as the engine does when it loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.loading.loader import LoadedModel
from engine.loading.quantized import Matrix
from engine.model.decoder import outer_shapes
from engine.model.rope import cos_sin_table
from engine.model.weight_plan import MODULES, WeightPlan
from engine.quantize.calibration import FloatLayer
from engine.quantize.rescale import awq, smoothquant
from kernels import WEIGHT_FORMATS, QuantizedWeight, quantize_weight
from kernels.formats.gptq import gptq
from kernels.formats.quantize import clipped, hqq

CHUNK = 8  # sequences computed at a time


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a method is asked for. order: of GPTQ's columns, see `kernels.formats.gptq`."""

    plan: WeightPlan
    group_size: int
    order: str


ToInt4 = Callable[[Tensor, Tensor | None, Options], QuantizedWeight]
"""(weight [N, K], second moments [K, K] of its inputs where the method is calibrated, options) -> int4."""


@dataclass(frozen=True)
class Method:
    """One entry of METHODS. prepare, to_int4: see the head of this module; calibrated: whether text is needed."""

    label: str
    to_int4: ToInt4 | None
    calibrated: bool = True
    prepare: Callable[[FloatLayer, Tensor, int], None] | None = None


def _needed(moments: Tensor | None) -> Tensor:
    assert moments is not None
    return moments


METHODS: dict[str, Method] = {
    "rtn": Method("round to nearest", lambda w, _, o: quantize_weight(w, "int4", o.group_size), calibrated=False),
    "hqq": Method("HQQ: scales and zeros refined, no data", lambda w, _, o: hqq(w, o.group_size), calibrated=False),
    "awq": Method(
        "AWQ: scales and clipping searched", lambda w, m, o: clipped(w, _needed(m), o.group_size), prepare=awq
    ),
    "gptq": Method(
        "GPTQ: errors made up for, in activation order",
        lambda w, m, o: gptq(w, _needed(m), o.group_size, order=o.order),
    ),
    "smoothquant": Method("SmoothQuant: outliers moved from activations to weights", None, prepare=smoothquant),
}


def quantized_tensors(
    model: LoadedModel, method: Method, options: Options, windows: Tensor | None, device: torch.device,
    update: Callable[[], object],
) -> Iterator[tuple[tuple[str, int | None], Matrix]]:
    """Every tensor of the result, on the host, with its (canonical name, layer)."""
    spec, read = model.spec, model.weights
    x = None
    for name, shape in outer_shapes(spec).items():
        tensor = read(name, None, shape, device)
        assert isinstance(tensor, Tensor)
        if name == "embeddings" and windows is not None:
            x = tensor[windows.to(tensor.device)].to(device).float()
        yield (name, None), tensor.bfloat16().cpu()
    cos_sin = cos_sin_table(spec, 1 if windows is None else windows.shape[1], device)
    for index in range(spec.num_layers):
        layer = FloatLayer.read(spec, read, index, cos_sin, device)
        for name, tensor in layer.tensors.items():
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{spec.name}: {name} of layer {index} holds NaN or infinity")
        if method.prepare is not None:
            assert x is not None
            method.prepare(layer, x, options.group_size)
        for name, matrix in _matrices(layer, x, method, options, index):
            update()
            yield (name, index), matrix
        for name, tensor in layer.tensors.items():
            if tensor.dim() == 1:
                yield (name, index), tensor.bfloat16().cpu()


def _matrices(
    layer: FloatLayer, x: Tensor | None, method: Method, options: Options, index: int
) -> Iterator[tuple[str, Matrix]]:
    """The matrices of a layer in the order of computation, each for the inputs that the ones before it now give.

    `x`, the layer's input, becomes its output.
    """
    carried = None if x is None else list(x.split(CHUNK))
    residual = carried
    for name in MODULES:
        chosen = options.plan[f"layers.{index}.{name}"]
        moments = None
        if carried is not None:
            carried = [layer.input_of(name, part) for part in carried]
            if WEIGHT_FORMATS[chosen].grouped:
                moments = _moments(carried)
        weight = layer.tensors[name]
        try:
            if WEIGHT_FORMATS[chosen].grouped:
                assert method.to_int4 is not None
                matrix = replace(method.to_int4(weight, moments, options), format=chosen)
            else:
                matrix = quantize_weight(weight, chosen, options.group_size)
        except ValueError as error:
            raise CheckpointError(f"{layer.spec.name}: {name} of layer {index}: {error}") from error
        yield name, _on_host(matrix)
        if carried is not None:
            assert residual is not None
            layer.tensors[name] = matrix.dequantize()
            carried = [layer.multiply(name, part) for part in carried]
            if name in ("o", "down"):
                carried = residual = [a + b for a, b in zip(carried, residual, strict=True)]
    if x is not None and carried is not None:
        torch.cat(carried, out=x)


def _moments(parts: Sequence[Tensor]) -> Tensor:
    """Mean of x xᵀ over all tokens, float32 [K, K]."""
    flat = [part.flatten(0, 1) for part in parts]
    total = flat[0].T @ flat[0]
    for part in flat[1:]:
        total.addmm_(part.T, part)
    return total / sum(len(part) for part in flat)


def _on_host(matrix: QuantizedWeight) -> Matrix:
    if matrix.scale is None:
        return matrix.codes.cpu()
    moved = (None if t is None else t.cpu() for t in (matrix.scale, matrix.zero, matrix.order))
    scale, zero, order = moved
    return replace(matrix, codes=matrix.codes.cpu(), scale=scale, zero=zero, order=order)

