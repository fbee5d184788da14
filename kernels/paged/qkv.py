"""From the qkv product to attention in one operation: norm of each head, rotary embedding, write to the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose
from ..rows.elementwise import rms_norm, rope, rotate
from .kv_access import write_kv
from .kv_cache import KVLayer

HeadNorms = tuple[Tensor, Tensor, float]
"""Weights [D] of the norms of query and key heads, and their eps (Qwen3)."""


def rope_write(
    qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: HeadNorms | None = None, *,
    settled: bool = False, impl: str = "auto",
) -> Tensor:
    """Norm and turn the queries and keys of qkv, store keys and values -> the queries [T, H, D].

    qkv [T, (H + 2 Hkv) * D] holds the heads of q, then k, then v; or `linear`'s partials of that shape. slots [T]
    int64 as in `write_kv`, turn [T, 2, D] as `rotation` gives it. settled: slots and turn are older than the kernel
    right before, so that on a GPU they are read while that one ends. ValueError where shapes do not fit.
    """
    rows, width = qkv.shape[-2:]
    heads = width // layer.head_dim - 2 * layer.kv_heads
    if width % layer.head_dim or heads < 1 or slots.shape != (rows,) or turn.shape != (rows, 2, layer.head_dim):
        raise ValueError(
            f"rope_write: qkv {tuple(qkv.shape)}, slots {tuple(slots.shape)} and turn {tuple(turn.shape)} do not fit "
            f"{layer.kv_heads} KV heads of {layer.head_dim}"
        )
    out: Tensor = choose("rope_write", ROPE_WRITE, impl, qkv.device)(qkv, layer, slots, turn, norms, settled)
    return out


def _rope_write_torch(
    qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: HeadNorms | None, settled: bool
) -> Tensor:
    q, k, v = _heads(qkv if qkv.dim() == 2 else qkv.sum(0), layer)
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2], impl="torch"), rms_norm(k, norms[1], norms[2], impl="torch")
    q, k = rope(q, k, turn, impl="torch")
    write_kv(layer, k, v, slots, impl="torch")
    return q


def _rope_write_aten(
    qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: HeadNorms | None, settled: bool
) -> Tensor:
    """As the reference, queries and keys turned together."""
    qkv = qkv if qkv.dim() == 2 else qkv.sum(0)
    heads = qkv.view(qkv.shape[0], -1, layer.head_dim)
    turned = heads.shape[1] - layer.kv_heads
    both = heads[:, :turned]
    if norms is not None:
        q, k = both.split((turned - layer.kv_heads, layer.kv_heads), 1)
        q, k = rms_norm(q, norms[0], norms[2], impl="aten"), rms_norm(k, norms[1], norms[2], impl="aten")
        both = torch.cat((q, k), 1)
    both = rotate(both, turn)
    write_kv(layer, both[:, turned - layer.kv_heads :], heads[:, turned:], slots, impl="aten")
    return both[:, : turned - layer.kv_heads]


def _rope_write_triton(
    qkv: Tensor, layer: KVLayer, slots: Tensor, turn: Tensor, norms: HeadNorms | None, settled: bool
) -> Tensor:
    from .qkv_triton import rope_write_triton

    return rope_write_triton(qkv, layer, slots, turn, norms, settled)


def _heads(qkv: Tensor, layer: KVLayer) -> tuple[Tensor, Tensor, Tensor]:
    heads = qkv.view(qkv.shape[0], -1, layer.head_dim)
    q, k, v = heads.split((heads.shape[1] - 2 * layer.kv_heads, layer.kv_heads, layer.kv_heads), 1)
    return q, k, v


ROPE_WRITE = {"torch": _rope_write_torch, "aten": _rope_write_aten, "triton": _rope_write_triton}
