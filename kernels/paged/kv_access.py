"""Writing keys and values into the paged cache, and reading them back."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import choose
from .kv_cache import Codec, KVLayer, decode, encode


def write_kv(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor, *, impl: str = "auto") -> None:
    """Store k, v [T, kv_heads, D] at `slots` [T] int64 (block * block_size + offset; -1 marks a padding row, which
    writes nothing)."""
    expected = (slots.shape[0], layer.kv_heads, layer.head_dim)
    if tuple(k.shape) != expected or tuple(v.shape) != expected:
        raise ValueError(f"write_kv: k {tuple(k.shape)} and v {tuple(v.shape)} must be {expected}")
    choose("write_kv", WRITE_KV, impl, layer.device)(layer, k, v, slots)


def read_kv(layer: KVLayer, block_table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first `length` tokens behind block_table [n], dequantized: two float32 tensors [length, kv_heads, D].

    ValueError for a table that does not reach so far.
    """
    blocks = block_table[: -(-length // layer.block_size)].long()
    if length > len(blocks) * layer.block_size or (length and int(blocks.min()) < 0):
        raise ValueError(f"read_kv: {length} tokens do not lie in the blocks {blocks.tolist()} of {layer.block_size}")

    def side(words: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
        held = words[blocks].flatten(0, 1)[:length]
        return decode(held, None if scales is None else scales[blocks].flatten(0, 1)[:length], codec)

    return side(layer.key, layer.key_scale, layer.format.key), side(layer.value, layer.value_scale, layer.format.value)


def _write_torch(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor) -> None:
    if bool((slots < 0).any()):
        live = slots >= 0
        k, v, slots = k[live], v[live], slots[live]
    where = (slots // layer.block_size, slots % layer.block_size)
    for x, codec, words, scales in (
        (k, layer.format.key, layer.key, layer.key_scale),
        (v, layer.format.value, layer.value, layer.value_scale),
    ):
        new_words, new_scales = encode(x, codec)
        words.index_put_(where, new_words)
        if scales is not None and new_scales is not None:
            scales.index_put_(where, new_scales)


def _write_aten(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """As the reference, for the CPU's memory order: each side is one index_copy_ along the slots of [heads, slots,
    words]."""
    if layer.key.stride(2) < layer.key.stride(0):
        raise ValueError("write_kv: impl 'aten' needs the CPU's memory order (heads outermost)")
    if slots.numel() and min(slots.tolist()) < 0:
        live = slots >= 0
        k, v, slots = k[live], v[live], slots[live]
    for x, codec, held, scales in (
        (k, layer.format.key, layer.slots_by_head[0], layer.key_scale),
        (v, layer.format.value, layer.slots_by_head[1], layer.value_scale),
    ):
        new_words, new_scales = encode(x, codec)
        held.index_copy_(1, slots, new_words.transpose(0, 1))
        if scales is not None and new_scales is not None:
            scales.movedim(2, 0).flatten(1, 2).index_copy_(1, slots, new_scales.t())


def _write_triton(layer: KVLayer, k: Tensor, v: Tensor, slots: Tensor) -> None:
    from .kv_cache_triton import write_kv_triton

    write_kv_triton(layer, k, v, slots)


WRITE_KV = {"torch": _write_torch, "aten": _write_aten, "triton": _write_triton}
