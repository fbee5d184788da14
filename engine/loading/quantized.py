"""Checkpoints quantized elsewhere, read as they are: their codes become `kernels.QuantizedWeight` without requantizing.

    method              tensors of one module [N, K]                    becomes
    awq (gemm)          qweight, qzeros, scales                         int4
    gptq                qweight, qzeros, scales, g_idx                  int4, activation order kept
    compressed-tensors  weight_packed, weight_scale, weight_zero_point  int4; of 8 bits per channel int8
                        (the same)                                      w4a8 where activations are int8
                        weight (int8), weight_scale                     int8; w8a8 where activations are int8 too
                        weight (float8_e4m3fn), weight_scale            fp8

Each format has a function that says what its tensors must be and one that reads them. `quantization_config` chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import CheckpointError
from kernels import QuantizedWeight
from kernels.formats.weights import FEATURES_OF_8_BIT_PRODUCTS

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
GROUPS = (128, 64)  # of the int4 kernels, the larger first: fewer scales are read
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Leaves = Mapping[str, Tensor]
Matrix = Tensor | QuantizedWeight


@dataclass(frozen=True)
class Wanted:
    """What a tensor must be: one of these shapes, one of these dtypes by their safetensors names."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Scheme:
    """How modules are stored. kind: a key of `KINDS`. group: features of K that share a scale, None where all do."""

    kind: str
    group: int | None = None
    symmetric: bool = True

    def groups(self, k: int) -> int:
        return -(-k // (self.group or k))


class UnreadableError(ValueError):
    """What this engine does not read; raised without the name of the folder or module, which the caller adds."""


def convert(
    tensors: dict[str, Tensor], modules: Mapping[str, Scheme], dense: Mapping[str, Wanted]
) -> dict[str, QuantizedWeight]:
    """Replace, in `tensors`, each module's leaves; what is quantized is returned as {"<module>.weight": weight}."""
    quantized: dict[str, QuantizedWeight] = {}
    for module, scheme in modules.items():
        names = [name for name in tensors if name.startswith(f"{module}.") and name not in dense]
        leaves = {name.removeprefix(f"{module}."): tensors.pop(name) for name in names}
        if f"{module}.weight" in tensors:
            leaves["weight"] = tensors.pop(f"{module}.weight")
        bias = leaves.pop("bias", None)
        if bias is not None and bool(bias.any()):
            raise CheckpointError(f"tensor {module}.bias is not expected by config.json and is not zero")
        shape = dense[f"{module}.weight"].shapes[0]
        try:
            weight = KINDS[scheme.kind].read(leaves, scheme, (shape[0], shape[1]))
        except UnreadableError as error:
            raise CheckpointError(f"{module}: {error}") from error
        if isinstance(weight, QuantizedWeight):
            quantized[f"{module}.weight"] = weight
        else:
            tensors[f"{module}.weight"] = weight
    return quantized


def join(parts: Sequence[Matrix], names: Sequence[str]) -> QuantizedWeight:
    """Matrices that the engine fuses, one above the other. CheckpointError where their formats or orders differ."""
    labels = [_label(part) for part in parts]
    if len(set(labels)) > 1:
        raise CheckpointError(
            f"{' and '.join(f'{name} is {label}' for name, label in zip(names, labels, strict=True))}; matrices that "
            "are computed together must have one format"
        )
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if not quantized:
        raise TypeError("none of the parts is quantized")
    first = quantized[0]
    if not all(_same(part.order, first.order) for part in quantized):
        raise CheckpointError(
            f"{names[0]} and {names[-1]} have different activation orders (g_idx); matrices that are computed "
            "together must share one"
        )
    return QuantizedWeight(
        first.format,
        torch.cat([part.codes for part in quantized]),
        _cat(part.scale for part in quantized),
        _cat(part.zero for part in quantized),
        first.group_size,
        first.order,
    )


def _label(part: Matrix) -> str:
    if isinstance(part, Tensor):
        return "not quantized"
    return part.format if part.group_size is None else f"{part.format} group {part.group_size}"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))


def _cat(parts: Iterable[Tensor | None]) -> Tensor | None:
    held = [part for part in parts if part is not None]
    return torch.cat(held) if held else None


# --- the formats: what a module holds, and how it is read -----------------------------------------------------------


def _grouped(codes: Tensor, scale: Tensor, zero: Tensor, order: Tensor | None = None) -> QuantizedWeight:
    """int4 from uint8 codes [N, K], scale and zero [N, groups] of any group size that a group of the kernels divides.

    Repeating the scale of a wide group over narrower ones changes no weight.
    """
    k = codes.shape[1]
    width = k // scale.shape[1]
    group = next((size for size in GROUPS if width % size == 0), None)
    if group is None:
        raise UnreadableError(f"its group size is {width} ({k} in features); multiples of {GROUPS[-1]} are computed")
    scale, zero = (x.repeat_interleave(width // group, 1).contiguous() for x in (scale.float(), zero))
    return QuantizedWeight("int4", codes.contiguous(), scale, zero.to(torch.uint8), group, order)


def _unpack(words: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """int32 [R, C] -> uint8 [R, C * 32 / bits], bits 4 or 8: value i of a word lies in its bits from i * bits on and
    belongs to column order[i] of the word's columns."""
    values = words.contiguous().view(torch.uint8)  # little-endian: the lowest byte first
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), -1).flatten(1)
    if order is not None:
        values = values.unflatten(1, (-1, len(order)))[:, :, torch.tensor(order).argsort()].flatten(1)
    return values


def awq_tensors(scheme: Scheme, module: str, n: int, k: int) -> dict[str, Wanted]:
    groups = scheme.groups(k)
    _eights(module, n)
    return {
        "qweight": Wanted(((k, n // 8),), ("I32",)),
        "qzeros": Wanted(((groups, n // 8),), ("I32",)),
        "scales": Wanted(((groups, n),), tuple(FLOATS)),
    }


def read_awq(leaves: Leaves, scheme: Scheme, shape: tuple[int, int]) -> Matrix:
    """AutoAWQ's WQLinear_GEMM: everything transposed, eight neighbours of N in a word, in the order of the kernel.

        qweight [K, N/8]    word c:  bits  0-3  4-7  8-11  12-15  16-19  20-23  24-27  28-31
        qzeros [K/G, N/8]            n=8c+ 0    2    4     6      1      3      5      7
        w[n, k] = (code - zero[k/G, n]) * scales[k/G, n]
    """
    codes, zero = (_unpack(leaves[leaf], 4, AWQ_ORDER).t() for leaf in ("qweight", "qzeros"))
    return _grouped(codes, leaves["scales"].t(), zero)


def gptq_tensors(scheme: Scheme, module: str, n: int, k: int) -> dict[str, Wanted]:
    groups = scheme.groups(k)
    _eights(module, n, k)
    return {
        "qweight": Wanted(((k // 8, n),), ("I32",)),
        "qzeros": Wanted(((groups, n // 8),), ("I32",)),
        "scales": Wanted(((groups, n),), tuple(FLOATS)),
        "g_idx": Wanted(((k,),), ("I32", "I64"), optional=True),
    }


def read_gptq(leaves: Leaves, scheme: Scheme, shape: tuple[int, int]) -> Matrix:
    """AutoGPTQ's QuantLinear: eight neighbours of K in a word of the codes, eight of N in a word of the zero points.

        qweight [K/8, N]    bits 4i to 4i+3 of word [r, n]: feature k = 8r + i
        qzeros [K/G, N/8]   bits 4i to 4i+3 of word [g, c]: n = 8c + i; the zero less one, modulo 16 (gptq_v2: the zero)
        w[n, k] = (code - zero[g, n]) * scales[g, n], g = g_idx[k], or k/G without it
    """
    codes = _unpack(leaves["qweight"].t(), 4)
    zero = _unpack(leaves["qzeros"], 4).t()
    if scheme.kind == "gptq":
        zero = (zero + 1) & 15
    order = _order(leaves.get("g_idx"), leaves["scales"].shape[0])
    return _grouped(codes if order is None else codes[:, order], leaves["scales"].t(), zero, order)


def packed_tensors(scheme: Scheme, module: str, n: int, k: int) -> dict[str, Wanted]:
    four = scheme.kind != "packed8"
    groups = scheme.groups(k) if four else 1
    scale = Wanted(((n, groups), (1,)) if groups == 1 and not four else ((n, groups),), tuple(FLOATS))
    leaves = {
        "weight_packed": Wanted(((n, -(-k // (8 if four else 4))),), ("I32",)),
        "weight_scale": scale,
        "weight_shape": Wanted(((2,),), ("I32", "I64"), optional=True),
    }
    if four:
        leaves["weight_g_idx"] = Wanted(((k,),), ("I32", "I64"), optional=True)
    if not scheme.symmetric:
        leaves["weight_zero_point"] = Wanted(((-(-n // 8), groups),), ("I32",))
    return leaves


def read_packed(leaves: Leaves, scheme: Scheme, shape: tuple[int, int]) -> Matrix:
    """pack-quantized of the compressed-tensors library: signed codes, stored with half their range added.

        weight_packed [N, ceil(K/8)]               bits 4i to 4i+3 of word [n, r]: code + 8 of feature k = 8r + i
        weight_zero_point [ceil(N/8), K/G]         bits 4i to 4i+3 of word [c, g]: zero + 8 of n = 8c + i
        weight_scale [N, K/G], weight_shape (N, K); without zero points the zero is 0
        8 bits: weight_packed [N, ceil(K/4)], four codes + 128 in a word, one scale per channel
        w[n, k] = (code - zero[n, g]) * weight_scale[n, g], g = weight_g_idx[k], or k/G without it
    """
    n, k = shape
    stated = leaves["weight_shape"].tolist() if "weight_shape" in leaves else [n, k]
    if stated != [n, k]:
        raise UnreadableError(f"weight_shape says {stated}, config.json asks for {[n, k]}")
    scale = leaves["weight_scale"]
    if scheme.kind == "packed8":
        codes = (_unpack(leaves["weight_packed"], 8)[:, :k].to(torch.int16) - 128).to(torch.int8)
        return QuantizedWeight("int8", codes.contiguous(), _per_channel(scale, n))
    codes = _unpack(leaves["weight_packed"], 4)[:, :k]
    zero = torch.full_like(scale, 8, dtype=torch.uint8)
    if not scheme.symmetric:
        zero = _unpack(leaves["weight_zero_point"].t(), 4).t()[:n]
    order = _order(leaves.get("weight_g_idx"), scale.shape[1])
    four = _grouped(codes if order is None else codes[:, order], scale, zero, order)
    return replace(four, format=KINDS[scheme.kind].weights)


def eight_bit_tensors(scheme: Scheme, module: str, n: int, k: int) -> dict[str, Wanted]:
    fp8 = scheme.kind == "fp8"
    if k % FEATURES_OF_8_BIT_PRODUCTS and scheme.kind != "int8":
        raise CheckpointError(f"{module}: {k} in features are not a multiple of {FEATURES_OF_8_BIT_PRODUCTS}")
    leaves = {
        "weight": Wanted(((n, k),), ("F8_E4M3",) if fp8 else ("I8",)),
        "weight_scale": Wanted(((n, 1), (n,), (1,), ()), tuple(FLOATS)),
    }
    if not fp8:
        leaves["weight_zero_point"] = Wanted(((n, 1), (1,)), ("I8",), optional=True)
    return leaves


def read_int8(leaves: Leaves, scheme: Scheme, shape: tuple[int, int]) -> Matrix:
    """int-quantized of the compressed-tensors library, symmetric.

        weight int8 [N, K], weight_scale [N, 1] or [1]: w[n, k] = code * weight_scale[n]
    """
    if "weight_zero_point" in leaves and bool(leaves["weight_zero_point"].any()):
        raise UnreadableError("weight_zero_point is not zero, but config.json calls the weights symmetric")
    return QuantizedWeight(scheme.kind, leaves["weight"], _per_channel(leaves["weight_scale"], shape[0]))


def read_fp8(leaves: Leaves, scheme: Scheme, shape: tuple[int, int]) -> Matrix:
    """float-quantized of the compressed-tensors library.

        weight float8_e4m3fn [N, K], weight_scale [N, 1] or [1]: w[n, k] = code * weight_scale[n]
    """
    return QuantizedWeight("fp8", leaves["weight"], _per_channel(leaves["weight_scale"], shape[0]))


def _per_channel(scale: Tensor, n: int) -> Tensor:
    return scale.float().reshape(-1).expand(n).contiguous()


def _order(g_idx: Tensor | None, groups: int) -> Tensor | None:
    """The features of K sorted by their group, None where they are already."""
    if g_idx is None:
        return None
    k = g_idx.shape[0]
    sorted_groups, order = g_idx.long().sort(stable=True)
    if not torch.equal(sorted_groups, torch.arange(groups).repeat_interleave(k // groups)):
        raise UnreadableError(f"g_idx does not put {k // groups} features into each of {groups} groups")
    return None if torch.equal(order, torch.arange(k)) else order


def _eights(module: str, *sizes: int) -> None:
    for size in sizes:
        if size % 8:
            raise CheckpointError(f"{module}: {size} features cannot be packed by eight")


@dataclass(frozen=True)
class Kind:
    """weights: the key of kernels.WEIGHT_FORMATS that computes it."""

    weights: str
    wanted: Callable[[Scheme, str, int, int], dict[str, Wanted]]
    read: Callable[[Leaves, Scheme, tuple[int, int]], Matrix]


KINDS = {
    "awq": Kind("int4", awq_tensors, read_awq),
    "gptq": Kind("int4", gptq_tensors, read_gptq),
    "gptq_v2": Kind("int4", gptq_tensors, read_gptq),
    "packed4": Kind("int4", packed_tensors, read_packed),
    "packed4a8": Kind("w4a8", packed_tensors, read_packed),
    "packed8": Kind("int8", packed_tensors, read_packed),
    "int8": Kind("int8", eight_bit_tensors, read_int8),
    "w8a8": Kind("w8a8", eight_bit_tensors, read_int8),
    "fp8": Kind("fp8", eight_bit_tensors, read_fp8),
}
