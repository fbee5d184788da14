"""Paged attention on the CPU from ATen's operators: gather a batch's blocks, then one scaled_dot_product_attention.

A block is one contiguous row of memory, so gathering is index_select at memory speed. What lies behind a sequence's last token is
cleared after the gather, so that stale or poisoned tails cannot reach a result.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import Codec, KVLayer, decode


def _gather(layer: KVLayer, block_tables: Tensor, longest: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values [B, Hkv, longest, D] of a batch, zeros behind each length."""
    blocks = -(-longest // layer.block_size)
    held = torch.tensor([-(-n // layer.block_size) for n in lengths])
    table = block_tables[:, :blocks].where(torch.arange(blocks) < held[:, None], 0).reshape(-1)

    def side(words: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
        x = words.flatten(1).index_select(0, table).view(len(lengths), -1, *words.shape[2:])[:, :longest]
        if scales is not None:
            x = decode(x, scales.index_select(0, table).view(len(lengths), -1, scales.shape[2])[:, :longest], codec).bfloat16()
        if min(lengths) < longest:
            x = x.masked_fill((torch.arange(longest) >= torch.tensor(lengths)[:, None])[:, :, None, None], 0)
        return x.transpose(1, 2)

    return side(layer.key, layer.key_scale, layer.format.key), side(layer.value, layer.value_scale, layer.format.value)


def decode_cpu(q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See `attention.decode_attention`."""
    counts = lengths.tolist()
    longest = max(counts, default=0)
    if longest == 0:
        return torch.zeros_like(q)
    b, heads, d = q.shape
    k, v = _gather(layer, block_tables, longest, counts)
    mask = None if min(counts) == longest else (torch.arange(longest) < lengths[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(q.view(b, layer.kv_heads, -1, d).to(k.dtype), k, v, mask, scale=scale).reshape(b, heads, d)
    if min(counts) == 0:
        out = out.masked_fill((lengths == 0)[:, None, None], 0)
    return out.to(q.dtype)


def prefill_cpu(q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See `attention.prefill_attention`."""
    out = torch.zeros_like(q)
    starts = query_starts.tolist()
    for b, length in enumerate(lengths.tolist()):
        rows = slice(starts[b], starts[b + 1])
        t = rows.stop - rows.start
        if t == 0:
            continue
        k, v = _gather(layer, block_tables[b:b + 1], length, [length])
        mask = None if t == length else torch.ones(t, length, dtype=torch.bool).tril(length - t)
        x = q[rows].transpose(0, 1)[None].to(k.dtype)
        y = F.scaled_dot_product_attention(x, k, v, mask, is_causal=t == length, scale=scale, enable_gqa=True)
        out[rows] = y[0].transpose(0, 1)
    return out
