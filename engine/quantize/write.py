"""Quantized matrices as other tools store them: the reverse of `engine.loading.quantized`, exact to the last code.

    layout               formats                              who reads it besides this engine
    awq (gemm)           int4 in groups that are neighbours   AutoAWQ, transformers, vLLM, LMDeploy
    gptq (v2)            int4, also in activation order       GPTQModel, transformers, vLLM
    compressed-tensors   all, also mixed                      transformers with that library, vLLM, LMDeploy (int4)
    plain                bf16                                 everyone

Each function gives the tensors of one module by leaf; `quantization_config` what config.json must say of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import CheckpointError, ConfigError
from engine.loading.quantized import AWQ_ORDER
from engine.model.weight_plan import WeightPlan
from kernels import WEIGHT_FORMATS, QuantizedWeight

LAYOUTS: dict[str, tuple[str, ...]] = {
    "awq": ("int4",),
    "gptq": ("int4",),
    "compressed-tensors": tuple(WEIGHT_FORMATS),
    "plain": ("bf16",),
}
"""The weight formats that each layout holds."""


def choose_layout(asked: str | None, plan: WeightPlan, *, with_order: bool = False) -> str:
    """The layout asked for, or the first that holds the plan. with_order: columns are grouped in activation order.

    ConfigError where that layout cannot hold it.
    """
    if asked is not None and asked not in LAYOUTS:
        raise ConfigError(f"layout is {asked!r}; it must be one of {', '.join(LAYOUTS)}")
    for bits in (8, 4):  # whose tensors look alike
        alike = [name for name, form in WEIGHT_FORMATS.items() if name in plan.formats and form.code_bits == bits]
        if len(alike) > 1:
            names = " and ".join(alike)
            raise ConfigError(f"weights is '{plan}': a checkpoint holds one {bits}-bit format, not {names}")
    fitting = [
        name for name, formats in LAYOUTS.items() if plan.formats <= set(formats) and (name == "gptq" or not with_order)
    ]
    if not fitting:
        raise ConfigError(f"weights is '{plan}': only a checkpoint of int4 alone can group columns in activation order")
    if asked is not None and asked not in fitting:
        grouped = ", grouped in activation order" if with_order else ""
        raise ConfigError(f"layout is {asked!r}, which does not hold weights '{plan}'{grouped}; {fitting[0]!r} does")
    return asked or (fitting[-1] if plan == WeightPlan("bf16") else fitting[0])


def pack(values: Tensor, bits: int, order: Sequence[int] | None = None) -> Tensor:
    """uint8 [R, C], values of 4 or 8 bits -> int32 [R, ceil(C * bits / 32)]: the value of column order[i] of a word's
    columns lies in its bits from i * bits on. The last word is filled with zeros."""
    per_word = 32 // bits
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % per_word))
    if order is not None:
        values = values.unflatten(1, (-1, per_word))[:, :, torch.tensor(order)].flatten(1)
    if bits == 4:
        values = values[:, 0::2] | values[:, 1::2] << 4
    return values.contiguous().view(torch.int32)


def write_awq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """AutoAWQ's WQLinear_GEMM, see `read_awq`."""
    assert weight.scale is not None and weight.zero is not None
    if weight.shape[0] % len(AWQ_ORDER):
        raise CheckpointError(f"{weight.shape[0]} out features cannot be packed by eight")
    return {
        "qweight": pack(weight.codes.t(), 4, AWQ_ORDER),
        "qzeros": pack(weight.zero.t(), 4, AWQ_ORDER),
        "scales": _half(weight.scale.t()),
    }


def write_gptq(weight: QuantizedWeight) -> dict[str, Tensor]:
    """GPTQModel's layout "gptq_v2", see `read_gptq`: columns in their places, g_idx says to which group each belongs.

    Not the older "gptq", which stores the zero less one: its readers differ on what a zero of 0 becomes.
    """
    assert weight.scale is not None and weight.zero is not None and weight.group_size is not None
    k = weight.shape[1]
    back = torch.arange(k) if weight.order is None else weight.order.argsort()
    return {
        "qweight": pack(weight.codes[:, back], 4).t(),
        "qzeros": pack(weight.zero.t(), 4),
        "scales": _half(weight.scale.t()),
        "g_idx": (back // weight.group_size).to(torch.int32),
    }


def _half(scale: Tensor) -> Tensor:
    """float16, as these layouts expect it, where that holds the scales, else bfloat16."""
    half = scale.half()
    return half if torch.equal(half.float(), scale) else scale.bfloat16()


def write_packed4(weight: QuantizedWeight) -> dict[str, Tensor]:
    """pack-quantized of the compressed-tensors library, 4 bits, asymmetric, see `read_packed`."""
    assert weight.scale is not None and weight.zero is not None
    return {
        "weight_packed": pack(weight.codes, 4),
        "weight_scale": weight.scale.bfloat16(),
        "weight_zero_point": pack(weight.zero.t(), 4).t(),
        "weight_shape": torch.tensor(weight.shape),
    }


def write_packed8(weight: QuantizedWeight) -> dict[str, Tensor]:
    """pack-quantized, 8 bits, symmetric, one scale per channel; activations stay 16 bit."""
    assert weight.scale is not None
    codes = (weight.codes.to(torch.int16) + 128).to(torch.uint8)
    return {
        "weight_packed": pack(codes, 8),
        "weight_scale": weight.scale[:, None].bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }


def write_plain8(weight: QuantizedWeight) -> dict[str, Tensor]:
    """int-quantized and float-quantized: codes as they are, one scale per channel; float32 where bf16 is too short."""
    assert weight.scale is not None
    short = weight.scale.bfloat16()
    scale = short if torch.equal(short.float(), weight.scale) else weight.scale
    return {"weight": weight.codes, "weight_scale": scale[:, None]}


_PACKED: dict[str, Callable[[QuantizedWeight], dict[str, Tensor]]] = {
    "int4": write_packed4,
    "int8": write_packed8,
    "w8a8": write_plain8,
    "fp8": write_plain8,
    "w4a8": write_packed4,
}


def leaves_of(weight: QuantizedWeight, layout: str) -> dict[str, Tensor]:
    """The tensors of one module in `layout`."""
    write = {"awq": write_awq, "gptq": write_gptq}.get(layout) or _PACKED[weight.format]
    return {leaf: tensor.contiguous() for leaf, tensor in write(weight).items()}


# --- config.json ------------------------------------------------------------------------------------------------------


def quantization_config(
    layout: str, modules: Mapping[str, str], group_size: int, *, with_order: bool = False
) -> dict[str, Any] | None:
    """modules: format of each linear layer by its name in the checkpoint. None for the layout "plain"."""
    if layout == "plain":
        return None
    if layout == "awq":
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    if layout == "gptq":
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": group_size,
            "sym": False,
            "desc_act": with_order,
            "checkpoint_format": "gptq_v2",
            "lm_head": False,
        }
    formats = [name for name in _PACKED if name in modules.values()]
    unquantized = [module for module, name in modules.items() if name == "bf16"]
    groups = {f"group_{i}": _config_group(name, modules, group_size) for i, name in enumerate(formats)}
    forms = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": forms.pop() if len(forms) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": ["lm_head", *unquantized],
    }


def _config_group(name: str, modules: Mapping[str, str], group_size: int) -> dict[str, Any]:
    """One group of the compressed-tensors library's QuantizationConfig: everything, or the modules by name."""
    several = len(set(modules.values()) - {"bf16"}) > 1
    targets = [module for module, held in modules.items() if held == name] if several else ["Linear"]
    number = "float" if name == "fp8" else "int"
    chosen = WEIGHT_FORMATS[name]
    weights = {
        "num_bits": chosen.code_bits,
        "type": number,
        "symmetric": not chosen.grouped,
        "strategy": "group" if chosen.grouped else "channel",
        "group_size": group_size if chosen.grouped else None,
        "dynamic": False,
    }
    inputs = {"num_bits": 8, "type": number, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None if chosen.activations is None else inputs,
        "format": {"w8a8": "int-quantized", "fp8": "float-quantized"}.get(name, "pack-quantized"),
    }
