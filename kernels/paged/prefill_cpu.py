"""Paged attention of prompt chunks on the CPU: gathered blocks (see `gather_cpu`), then ATen's fused attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .gather_cpu import Tails, find_tails, gather, gathered_blocks
from .kv_cache import Codec, KVLayer, decode

CAUSAL_ROWS = 256  # a whole prompt of at least this many tokens runs alone, so that the masked half is skipped


@dataclass(frozen=True)
class Chunks:
    """Prompt chunks that are computed together, padded to the longest, and the indices that this takes.

    rows: where a single chunk stands in the batch, else None; at: int64 [chunks, T], its rows, of which a shorter chunk
    repeats its last; live: bool [chunks, T], False for these repeats. table, tails: as in `Rows`, over all tokens of
    each sequence; longest: the most. seen: bool [chunks, 1, group * T, longest], what each query may attend to, None
    for one whole prompt.
    """

    rows: slice | None
    at: Tensor
    live: Tensor
    table: Tensor
    tails: Tails
    longest: int
    seen: Tensor | None


PrefillPlan = tuple[Chunks, ...]


def plan_prefill(
    layer: KVLayer, heads: int, block_tables: Tensor, query_starts: Tensor, lengths: Tensor
) -> PrefillPlan:
    """What `prefill_cpu` derives from everything but queries and cache: the same for every layer of a step. Whole long
    prompts are computed alone, everything else in padded groups of similar size."""
    starts, counts = query_starts.tolist(), lengths.tolist()
    chunks = chunk_sizes(starts, counts)
    alone = [b for b, t in enumerate(chunks) if t >= CAUSAL_ROWS and t == counts[b]]
    rest = [b for b, t in enumerate(chunks) if t and b not in alone]
    groups = [[b] for b in alone] + _groups(rest, chunks, counts)
    return tuple(_chunks(g, layer, heads // layer.kv_heads, block_tables, starts, chunks, counts) for g in groups)


def chunk_sizes(starts: list[int], counts: list[int]) -> list[int]:
    """New tokens of each sequence; ValueError where a chunk is longer than its sequence, or ends before it starts."""
    chunks = [starts[b + 1] - starts[b] for b in range(len(counts))]
    for chunk, count in zip(chunks, counts, strict=True):
        if not 0 <= chunk <= count:
            raise ValueError(f"prefill_attention: a chunk of {chunk} tokens cannot be the end of {count}")
    return chunks


def _chunks(
    group: list[int], layer: KVLayer, per_head: int, block_tables: Tensor, starts: list[int], chunks: list[int],
    counts: list[int],
) -> Chunks:
    t, longest = max(chunks[b] for b in group), max(counts[b] for b in group)
    lengths, news = torch.tensor([counts[b] for b in group]), torch.tensor([chunks[b] for b in group])[:, None]
    table, held, blocks = gathered_blocks(block_tables[group], lengths, lengths.tolist(), layer)
    tails = find_tails(held, lengths, layer.block_size, blocks)
    step = torch.arange(t).minimum(news - 1)  # padding repeats the last row
    at = torch.tensor([starts[b] for b in group])[:, None] + step
    rows = slice(starts[group[0]], starts[group[0]] + t) if len(group) == 1 else None
    seen = None
    if rows is None or t < longest:
        position = lengths[:, None] - news + step
        seen = (torch.arange(longest) <= position[:, :, None])[:, None, None]
        seen = seen.expand(-1, 1, per_head, -1, -1).flatten(2, 3)
    return Chunks(rows, at, torch.arange(t) < news, table, tails, longest, seen)


def prefill_cpu(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float,
    plan: PrefillPlan | None = None, out: Tensor | None = None,
) -> Tensor:
    """See `attention.prefill_attention`."""
    plan = plan_prefill(layer, q.shape[1], block_tables, query_starts, lengths) if plan is None else plan
    out = torch.zeros_like(q) if out is None else out.zero_()
    for chunks in plan:
        _prefill_chunks(out, q, layer, chunks, scale)
    return out


def _groups(rows: list[int], chunks: list[int], counts: list[int]) -> list[list[int]]:
    """Rows of similar size together: padding may cost a third of the scores of a group, or what a call costs anyway."""
    groups: list[list[int]] = []
    longest = used = 0
    for b in sorted(rows, key=lambda b: (chunks[b], counts[b])):
        t, n = chunks[b], max(longest, counts[b])
        padded = t * n * (len(groups[-1]) + 1) if groups else 0
        if not groups or padded > 1.5 * (used + t * counts[b]) + 20_000:
            groups.append([])
            n, used = counts[b], 0
        groups[-1].append(b)
        longest, used = n, used + t * counts[b]
    return groups


def _prefill_chunks(out: Tensor, q: Tensor, layer: KVLayer, chunks: Chunks, scale: float) -> None:
    d, hkv = layer.head_dim, layer.kv_heads
    batch, t = chunks.at.shape

    def side(words: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
        x = gather(words, chunks.table, batch)
        if scales is not None:
            x = decode(x, gather(scales, chunks.table, batch), codec).bfloat16()
        chunks.tails.clear(x)
        return x[:, :, : chunks.longest].transpose(0, 1)

    k, v = side(layer.key, layer.key_scale, layer.format.key), side(layer.value, layer.value_scale, layer.format.value)
    x = (q[chunks.at] if chunks.rows is None else q[None, chunks.rows]).to(torch.bfloat16)
    if chunks.seen is None:
        y = F.scaled_dot_product_attention(x.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True)
        y = y.transpose(1, 2)
    else:
        packed = x.view(batch, t, hkv, -1, d).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, group * T, D]
        y = F.scaled_dot_product_attention(packed, k, v, chunks.seen, scale=scale)
        y = y.view(batch, hkv, -1, t, d).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if chunks.rows is not None:
        out[chunks.rows] = y[0]
    else:
        out[chunks.at[chunks.live]] = y[chunks.live].to(out.dtype)
