"""The small operations between the matrix products: RMSNorm (with the residual added, or of rows looked up in a table),
SiLU-mul and rotary embedding.

RMSNorm: Zhang & Sennrich 2019. SwiGLU: Shazeer 2020. RoPE: Su et al. 2021, in the half-split order that Llama
checkpoints use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dispatch import choose


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, impl: str = "auto") -> Tensor:
    """x / rms(x) * weight over the last dimension, statistics in float32 (float64 stays float64) -> x's shape and
    dtype.

    x [..., D] may be any view whose last dimension is contiguous, e.g. the heads of a fused qkv for a per-head norm.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x ends in {x.shape[-1]}")
    out: Tensor = choose("rms_norm", RMS_NORM, impl, x.device)(x, weight, eps)
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual), both new tensors in residual's dtype; the norm reads the rounded sum.

    x may also be `linear`'s partials, residual's shape behind a dimension that is summed.
    """
    if x.shape[-residual.dim() :] != residual.shape or x.dim() > residual.dim() + 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"add_rms_norm: x {tuple(x.shape)}, residual {tuple(residual.shape)} and weight {tuple(weight.shape)} "
            "do not fit"
        )
    out: tuple[Tensor, Tensor] = choose("add_rms_norm", ADD_RMS_NORM, impl, x.device)(x, residual, weight, eps)
    return out


def embed_rms_norm(
    tokens: Tensor, table: Tensor, weight: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(rows), rows) of the rows `tokens` int64 [T] of table [vocab, D], both new tensors in table's dtype.

    On a GPU nobody checks that tokens lie in 0 .. vocab - 1.
    """
    if tokens.dim() != 1 or table.dim() != 2 or weight.shape != table.shape[-1:]:
        raise ValueError(
            f"embed_rms_norm: tokens {tuple(tokens.shape)}, table {tuple(table.shape)} and weight "
            f"{tuple(weight.shape)} do not fit"
        )
    run = choose("embed_rms_norm", EMBED_RMS_NORM, impl, table.device)
    out: tuple[Tensor, Tensor] = run(tokens, table, weight, eps)
    return out


def silu_mul(gate_up: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) * up for gate_up [T, 2I], gate in the first half -> [T, I]; or for `linear`'s partials [S, T, 2I]."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"silu_mul: the last dimension holds gate and up, {gate_up.shape[-1]} is odd")
    out: Tensor = choose("silu_mul", SILU_MUL, impl, gate_up.device)(gate_up)
    return out


def rotation(positions: Tensor, cos_sin: Tensor, *, impl: str = "auto") -> Tensor:
    """What `rope` multiplies with, looked up once per step for all layers: [T, 2, D] in cos_sin's dtype.

    positions [T] int64, on a GPU unchecked. cos_sin [max_position, D]: cosines of the D/2 frequencies, then their
    sines. x turned is x * turn[:, 0] + (x rolled by D/2) * turn[:, 1]: cosines twice, sines with the sign of their
    half.
    """
    if positions.dim() != 1 or cos_sin.dim() != 2 or cos_sin.shape[1] % 2:
        raise ValueError(
            f"rotation: positions {tuple(positions.shape)} and cos_sin {tuple(cos_sin.shape)} must be [T] and "
            "[max_position, an even D]"
        )
    out: Tensor = choose("rotation", ROTATION, impl, cos_sin.device)(positions, cos_sin)
    return out


def rope(q: Tensor, k: Tensor, turn: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotate q [T, H, D] and k [T, Hkv, D] by `rotation`'s turn [T, 2, D]; new tensors, the inputs are left alone.

    Element i turns with element i + D/2.
    """
    if turn.shape != (q.shape[0], 2, q.shape[-1]) or q.shape[-1] != k.shape[-1] or q.shape[0] != k.shape[0]:
        raise ValueError(f"rope: q {tuple(q.shape)}, k {tuple(k.shape)} and turn {tuple(turn.shape)} do not fit")
    out: tuple[Tensor, Tensor] = choose("rope", ROPE, impl, q.device)(q, k, turn)
    return out


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    w = x.to(_wide(x))
    return (w * torch.rsqrt(w.square().mean(-1, keepdim=True) + eps) * weight.to(w.dtype)).to(x.dtype)


def _add_rms_norm_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    if x.dim() > residual.dim():
        x = x.sum(0)
    total = (x + residual).to(residual.dtype)
    return _rms_norm_torch(total, weight, eps), total


def _rms_norm_aten(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference, by the fewest and smallest operators: half the time of F.rms_norm on bf16."""
    d = x.shape[-1]
    y = x.to(_wide(x))
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    inverse = norm.square_().add_(d * eps).rsqrt_().mul_(d**0.5)
    return (y.mul_(inverse) if y is not x else y * inverse).mul_(weight).to(x.dtype)


def _add_rms_norm_aten(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = ((x.sum(0) if x.dim() > residual.dim() else x) + residual).to(residual.dtype)
    return _rms_norm_aten(total, weight, eps), total


def _embed_rms_norm_torch(tokens: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = F.embedding(tokens, table)
    return _rms_norm_torch(rows, weight, eps), rows


def _embed_rms_norm_aten(tokens: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    rows = F.embedding(tokens, table)
    return _rms_norm_aten(rows, weight, eps), rows


def _silu_mul_torch(gate_up: Tensor) -> Tensor:
    if gate_up.dim() == 3:
        gate_up = gate_up.sum(0)
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _rotation_torch(positions: Tensor, cos_sin: Tensor) -> Tensor:
    cos, sin = cos_sin[positions].chunk(2, -1)
    return torch.cat((cos, cos, -sin, sin), -1).unflatten(-1, (2, -1))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """x [T, H, D] by turn [T, 2, D], computed in float32 (float64 stays float64) -> x's dtype."""
    wide = _wide(x)
    cos, sin = turn.to(wide).unsqueeze(2).unbind(1)
    y = x.to(wide)
    return torch.addcmul(y * cos, torch.roll(y, y.shape[-1] // 2, -1), sin).to(x.dtype)


def _rope_torch(q: Tensor, k: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, turn), rotate(k, turn)


def _silu_mul_aten(gate_up: Tensor) -> Tensor:
    if gate_up.dim() == 3:
        gate_up = gate_up.sum(0)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def _triton(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        from . import elementwise_triton

        return getattr(elementwise_triton, name)(*args)

    return run


RMS_NORM = {"torch": _rms_norm_torch, "aten": _rms_norm_aten, "triton": _triton("rms_norm")}
ADD_RMS_NORM = {"torch": _add_rms_norm_torch, "aten": _add_rms_norm_aten, "triton": _triton("add_rms_norm")}
EMBED_RMS_NORM = {
    "torch": _embed_rms_norm_torch, "aten": _embed_rms_norm_aten, "triton": _triton("embed_rms_norm")
}
SILU_MUL = {"torch": _silu_mul_torch, "aten": _silu_mul_aten, "triton": _triton("silu_mul")}
ROTATION = {"torch": _rotation_torch, "aten": _rotation_torch, "triton": _triton("rotation")}
ROPE = {"torch": _rope_torch, "aten": _rope_torch, "triton": _triton("rope")}
