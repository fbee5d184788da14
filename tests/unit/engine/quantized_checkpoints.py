"""Checkpoints as other tools write them: packers that follow the formats' sources and share nothing with the reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels import WEIGHT_FORMATS
from tests.unit.engine.checkpoints import random_model, save, tiny_config

WEIGHTS = "model.safetensors"
SIXTEEN_BIT_ROWS = WEIGHT_FORMATS["w8a8"].sixteen_bit_rows



@dataclass
class Known:
    """A weight [N, K] as written: unsigned 4-bit codes and zeros, or signed 8-bit codes; scale [N, groups]."""

    codes: np.ndarray
    scale: Tensor
    zero: np.ndarray
    g_idx: np.ndarray  # group of each of the K features

    @property
    def dense(self) -> Tensor:
        """float64: exact."""
        centred = torch.from_numpy(self.codes.astype(np.float64) - self.zero.astype(np.float64)[:, self.g_idx])
        return centred * self.scale.double()[:, self.g_idx]


def words(values: np.ndarray, axis: int, bits: int = 4, places: tuple[int, ...] | None = None) -> Tensor:
    """Neighbours along `axis` in int32 words: of those of one word, the one at places[i] goes to the i-th bits."""
    count = 32 // bits
    lines = np.moveaxis(values, axis, 0).astype(np.uint64)
    lines = np.concatenate([lines, np.zeros((-len(lines) % count, lines.shape[1]), np.uint64)])
    packed = np.zeros((len(lines) // count, lines.shape[1]), np.uint64)
    for i in range(count):
        packed |= lines[(places[i] if places else i) :: count] << np.uint64(i * bits)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(packed, 0, axis)).astype(np.uint32).view(np.int32).copy())


def awq(w: Known) -> dict[str, Tensor]:
    """https://github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py"""
    places = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(w.codes.T, 1, places=places),
        "qzeros": words(w.zero.T, 1, places=places),
        "scales": w.scale.t().contiguous(),
    }


def gptq(w: Known) -> dict[str, Tensor]:
    """https://github.com/AutoGPTQ/AutoGPTQ, auto_gptq/nn_modules/qlinear/qlinear_cuda.py; zeros less one"""
    return {**gptq_v2(w), "qzeros": words((w.zero.T.astype(np.int64) - 1) & 15, 1)}


def gptq_v2(w: Known) -> dict[str, Tensor]:
    return {
        "qweight": words(w.codes.T, 0),
        "qzeros": words(w.zero.T, 1),
        "scales": w.scale.t().contiguous(),
        "g_idx": torch.from_numpy(w.g_idx.astype(np.int32)),
    }


def packed(w: Known) -> dict[str, Tensor]:
    """https://github.com/vllm-project/compressed-tensors, compressors/quantized_compressors/pack_quantized.py"""
    return {
        "weight_packed": words(w.codes, 1),
        "weight_scale": w.scale,
        "weight_shape": torch.tensor(w.codes.shape),
    }


def packed_with_zeros(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_zero_point": words(w.zero, 0)}


def packed_in_order(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_g_idx": torch.from_numpy(w.g_idx.astype(np.int32))}


def packed8(w: Known) -> dict[str, Tensor]:
    return {**packed(w), "weight_packed": words(w.codes.astype(np.int64) + 128, 1, bits=8)}


def int8(w: Known) -> dict[str, Tensor]:
    return {"weight": torch.from_numpy(w.codes), "weight_scale": w.scale, "input_scale": torch.ones(1)}


def int8_tensor(w: Known) -> dict[str, Tensor]:
    return {"weight": torch.from_numpy(w.codes), "weight_scale": w.scale[0]}


def compressed(form: str, *, activations: dict[str, Any] | None = None, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
INT8_INPUTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
FP8_INPUTS = {**INT8_INPUTS, "type": "float"}


@dataclass(frozen=True)
class Case:
    pack: Callable[[Known], dict[str, Tensor]]
    config: dict[str, Any]
    group: int = 128  # -1 for one per channel
    symmetric: bool = False
    act_order: bool = False
    signed: bool = False
    one_scale: bool = False
    dtype: torch.dtype = torch.float16
    label: str = "8 matrices int4 group 128"
    tokens: int = 40  # of a text whose logits are compared


CASES = {
    "awq": Case(awq, {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}),
    "awq, group 64": Case(
        awq, {"quant_method": "awq", "bits": 4, "group_size": 64}, 64, label="8 matrices int4 group 64"
    ),
    "gptq": Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": 128}),
    "gptq v2": Case(
        gptq_v2,
        {"quant_method": "gptq", "bits": 4, "group_size": 64, "checkpoint_format": "gptq_v2"},
        64,
        label="8 matrices int4 group 64",
    ),
    "gptq, activation order": Case(
        gptq, {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}, 64, act_order=True,
        label="8 matrices int4 group 64",
    ),
    "gptq, per channel": Case(gptq, {"quant_method": "gptq", "bits": 4, "group_size": -1}, -1),
    "gptq, zero biases": Case(
        lambda w: {**gptq(w), "bias": torch.zeros(len(w.codes), dtype=torch.float16)},
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
    ),
    "packed": Case(packed, compressed("pack-quantized", **INT4), symmetric=True),
    "packed, bf16 scales": Case(packed, compressed("pack-quantized", **INT4), symmetric=True, dtype=torch.bfloat16),
    "packed, zero points": Case(packed_with_zeros, compressed("pack-quantized", **{**INT4, "symmetric": False})),
    "packed, activation order": Case(
        packed_in_order, compressed("pack-quantized", **{**INT4, "group_size": 64}), 64, True, True,
        label="8 matrices int4 group 64",
    ),
    "packed, per channel": Case(
        packed, compressed("pack-quantized", **{**INT4, "group_size": None, "strategy": "channel"}), -1, True
    ),
    "packed, int8 activations": Case(
        packed, compressed("pack-quantized", activations=INT8_INPUTS, **INT4), symmetric=True, dtype=torch.bfloat16,
        label="8 matrices w4a8 group 128, lm_head bf16, KV",
    ),
    "packed, int8 activations, activation order": Case(
        packed_in_order, compressed("pack-quantized", activations=INT8_INPUTS, **{**INT4, "group_size": 64}), 64, True,
        True, label="8 matrices w4a8 group 64",
    ),
    "packed, static int8 activations": Case(
        packed_with_zeros,
        compressed(
            "pack-quantized", activations={**INT8_INPUTS, "dynamic": False, "strategy": "tensor"},
            **{**INT4, "symmetric": False},
        ), label="8 matrices w4a8 group 128, lm_head bf16 (activations scaled per token",
    ),
    "packed, 8 bits": Case(
        packed8, compressed("pack-quantized", **INT8), -1, signed=True, label="8 matrices int8"
    ),
    "int8": Case(
        int8, compressed("int-quantized", **INT8), -1, signed=True, dtype=torch.float32, label="8 matrices int8"
    ),
    "int8, asymmetric activations": Case(
        int8, compressed("int-quantized", activations={**INT8_INPUTS, "symmetric": False}, **INT8), -1, signed=True,
        label="8 matrices int8, lm_head bf16 (activations computed in bf16",
    ),
    "w8a8": Case(
        int8, compressed("int-quantized", activations=INT8_INPUTS, **INT8), -1, signed=True, dtype=torch.bfloat16,
        label="8 matrices w8a8, lm_head bf16", tokens=SIXTEEN_BIT_ROWS,
    ),
    "w8a8, static": Case(
        int8,
        compressed("int-quantized", activations={**INT8_INPUTS, "dynamic": False, "strategy": "tensor"}, **INT8),
        -1, signed=True, label="8 matrices w8a8, lm_head bf16 (activations scaled per token", tokens=SIXTEEN_BIT_ROWS,
    ),
    "int8, one scale per matrix": Case(
        int8_tensor, compressed("int-quantized", **{**INT8, "strategy": "tensor"}), -1, signed=True, one_scale=True,
        label="8 matrices int8",
    ),
}  # fmt: skip


def known(case: Case, n: int, k: int, g_idx: np.ndarray, rng: np.random.Generator) -> Known:
    """Weights of about the size of 1 / sqrt(K), every code and zero among them."""
    groups = int(g_idx.max()) + 1
    levels = 256 if case.signed else 16
    scale = torch.from_numpy(rng.uniform(0.5, 1.5, (n, groups)) * 3.5 / levels * k**-0.5)
    if case.one_scale:
        scale = scale[:1, :1].expand(n, 1).contiguous()
    codes = rng.integers(-128, 128, (n, k)).astype(np.int8) if case.signed else rng.integers(0, 16, (n, k), np.uint8)
    middle = 0 if case.signed else 8
    zero = np.full((n, groups), middle) if case.symmetric or case.signed else rng.integers(0, 16, (n, groups))
    if not (case.symmetric or case.signed):
        scale *= 0.5  # a mean that is not zero adds up
    return Known(codes, scale.to(case.dtype), zero.astype(np.int64), g_idx)


def quantize(model: Any, case: Case, seed: int = 0) -> dict[str, Tensor]:
    """Give every linear of the layers known weights; the tensors to save."""
    rng = np.random.default_rng(seed)
    tensors = {name: tensor.clone().bfloat16() for name, tensor in model.state_dict().items()}
    orders: dict[tuple[int, str], np.ndarray] = {}
    for name, module in model.named_modules():
        if not name.endswith("_proj"):
            continue
        n, k = module.weight.shape
        size = k if case.group == -1 else case.group
        shared = (int(name.split(".")[2]), "o" if "o_proj" in name else "down" if "down" in name else f"{k} {name[15]}")
        g_idx = orders.setdefault(shared, rng.permutation(k) // size if case.act_order else np.arange(k) // size)
        weight = known(case, n, k, g_idx, rng)
        module.weight.copy_(weight.dense)
        del tensors[f"{name}.weight"]
        tensors.update({f"{name}.{leaf}": tensor for leaf, tensor in case.pack(weight).items()})
    return tensors


def write(folder: Path, case: Case, **changes: Any) -> Any:
    """The folder, and transformers' model of the dequantized weights."""
    model = random_model(tiny_config("llama", **changes))
    with torch.no_grad():  # a residual stream as strong as what layers add: bf16 itself then errs by half a percent
        model.model.embed_tokens.weight.mul_(model.config.hidden_size**0.5)
    for parameter in model.parameters():  # not the model, whose rotary table would lose bits
        parameter.requires_grad_(False).copy_(parameter.bfloat16())
    save(model, folder)
    save_file(quantize(model, case), folder / WEIGHTS, metadata={"format": "pt"})
    configure(folder, case.config)
    return model


def configure(folder: Path, quantization: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
