"""Paged attention on the CPU from ATen's operators: gather a batch's blocks, then batched matrix products.

In the CPU's memory order (heads outermost, see `kv_cache`) gathering a batch's blocks is one index_select, and what it
gives is already the batch of matrices [heads * batch, tokens, D] that bmm wants: no transpose, no loop over sequences.
Quantized codes enter the product as centred bf16 integers and the scales are applied to the scores and the weights (as
in `decode_triton`). What lies behind a sequence's last token cannot reach a result: scores there are replaced, values
there are cleared.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .kv_cache import Codec, KVLayer, decode, scale_and_low

# Rows are taken in order of length, in chunks of this many key elements: 1 MB of bf16 stays in a core's cache, is
# handed out by malloc without touching new pages (64 x 200 tokens: twice as fast as all at once), and short rows are
# not padded to long ones.
CHUNK_ELEMENTS = 1 << 19
CAUSAL_ROWS = 256  # a whole prompt of at least this many tokens runs alone, so that the masked half is skipped


def decode_cpu(q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """See `attention.decode_attention`."""
    counts = lengths.tolist()
    per_token = layer.kv_heads * layer.head_dim
    if counts and min(counts) > 0 and (len(counts) == 1 or len(counts) * max(counts) * per_token <= CHUNK_ELEMENTS):
        return _decode_padded(q, layer, block_tables, lengths, counts, scale)
    out = torch.zeros_like(q)
    rows: list[int] = []
    order = sorted((b for b, n in enumerate(counts) if n), key=counts.__getitem__)
    for b, following in zip(order, [*order[1:], -1], strict=False):
        rows.append(b)
        if following < 0 or (len(rows) + 1) * counts[following] * per_token > CHUNK_ELEMENTS:
            at = torch.tensor(rows)
            out[at] = _decode_padded(q[at], layer, block_tables[at], lengths[at], [counts[b] for b in rows], scale)
            rows = []
    return out


def _decode_padded(
    q: Tensor, layer: KVLayer, block_tables: Tensor, lengths: Tensor, counts: list[int], scale: float
) -> Tensor:
    """All rows at once, padded to the longest; every length is at least 1."""
    batch, heads, d = q.shape
    hkv = layer.kv_heads
    table, held = _blocks(block_tables, lengths, counts, layer.block_size)
    key, value, codec_k, codec_v = layer.key, layer.value, layer.format.key, layer.format.value
    k, ks, kl = _operand(key, layer.key_scale, codec_k, table, batch, counts[0])
    v, vs, vl = _operand(value, layer.value_scale, codec_v, table, batch, counts[0])
    padded = min(counts) < v.shape[2]
    if padded:
        _clear_tails(v, held, lengths, layer.block_size)
        if vs is not None and vl is not None:  # a NaN scale behind the end would survive multiplication by zero
            behind = torch.arange(v.shape[2]) >= lengths[:, None]
            vs, vl = vs.masked_fill(behind, 0), vl.masked_fill(behind, 0)
    rows = q.view(batch, hkv, -1, d).transpose(0, 1).to(torch.bfloat16)  # [Hkv, B, group, D]
    if batch == 1 and ks is None and vs is None:
        y = F.scaled_dot_product_attention(rows.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), scale=scale)
        return y.reshape(1, heads, d).to(q.dtype)
    q_codes = rows if ks is None else rows[..., _permutation(d, codec_k.bits)]
    s = (
        torch.bmm(q_codes.reshape(hkv * batch, -1, d), k.flatten(0, 1).transpose(1, 2))
        .view(hkv, batch, -1, k.shape[2])
        .float()
    )
    if ks is not None and kl is not None:
        s = s.mul_(ks[:, :, None]).add_(rows.float().sum(-1, keepdim=True) * kl[:, :, None])
    if padded:
        s.masked_fill_((torch.arange(k.shape[2]) >= lengths[:, None])[:, None], float("-inf"))
    p = torch.softmax(s.mul_(scale), -1)
    weighted = p if vs is None else p * vs[:, :, None]
    y = torch.bmm(weighted.bfloat16().flatten(0, 1), v.flatten(0, 1)).view(hkv, batch, -1, d)
    if vl is not None:
        y = (y.float() + p @ vl[..., None])[..., _inverse(d, codec_v.bits)]
    return y.transpose(0, 1).reshape(batch, heads, d).to(q.dtype)


def _blocks(block_tables: Tensor, lengths: Tensor, counts: list[int], block_size: int) -> tuple[Tensor, Tensor]:
    """The blocks to gather, [B * n] with n the longest's count (a shorter row repeats its first), and how many each row
    holds [B]."""
    n = -(-max(counts) // block_size)
    held = (lengths + (block_size - 1)) // block_size
    table = block_tables[:, :n]
    if min(counts) <= (n - 1) * block_size:
        table = torch.where(torch.arange(n) < held[:, None], table, block_tables[:, :1])
    return table.reshape(-1), held


def _gather(words: Tensor, table: Tensor, batch: int) -> Tensor:
    """words [blocks, block_size, Hkv, ...] of the blocks in `table` -> [Hkv, B, tokens, ...], contiguous in the CPU's
    memory order."""
    by_head = words.movedim(2, 0)
    found = by_head.flatten(2).index_select(1, table)
    return found.view(by_head.shape[0], batch, -1, *by_head.shape[3:])


def _operand(
    words: Tensor, scales: Tensor | None, codec: Codec, table: Tensor, batch: int, alone: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """bf16 [Hkv, B, tokens, D] with scale and low [Hkv, B, tokens]: x ~ operand * scale + low, its elements in
    `_permutation`'s order; one row is cut to its own length, `alone`."""
    x = _gather(words, table, batch)
    if batch == 1:
        x = x[:, :, :alone]
    if scales is None:
        return x, None, None
    scale, low = scale_and_low(_gather(scales, table, batch)[:, :, : x.shape[2]])
    middle = 1 << (codec.bits - 1)
    codes = x.contiguous().view(torch.uint8)
    if codec.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), -1)
    return codes.to(torch.bfloat16).sub_(middle), scale, low + middle * scale


@lru_cache(maxsize=16)
def _permutation(d: int, bits: int) -> Tensor:
    """Which element each code of `_operand` is: bytes of a word in memory order, low nibbles before high ones."""
    planes = torch.arange(d).view(16 // bits, -1)
    return (
        planes.t().reshape(-1) if bits == 8 else torch.cat((planes[0::2].t().reshape(-1), planes[1::2].t().reshape(-1)))
    )


@lru_cache(maxsize=16)
def _inverse(d: int, bits: int) -> Tensor:
    return torch.argsort(_permutation(d, bits))


def _clear_tails(x: Tensor, held: Tensor, lengths: Tensor, block_size: int) -> None:
    """Zero what lies behind each row's end of x [Hkv, B, tokens, D], in place: touches the last block of a row and
    those past it only."""
    blocks = x.view(x.shape[0], -1, block_size, x.shape[-1])
    n = blocks.shape[1] // len(held)
    index = torch.arange(n)
    past = (index >= held[:, None]).view(-1).nonzero().view(-1)
    if len(past):
        blocks.index_fill_(1, past, 0)
    last = torch.arange(0, n * len(held), n) + held - 1
    behind = torch.arange(block_size) > (lengths[:, None] - 1) % block_size
    blocks.index_copy_(1, last, blocks.index_select(1, last).masked_fill_(behind[None, :, :, None], 0))


def prefill_cpu(
    q: Tensor, layer: KVLayer, block_tables: Tensor, query_starts: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """See `attention.prefill_attention`: whole long prompts alone, everything else in padded groups of similar size."""
    out = torch.zeros_like(q)
    starts, counts = query_starts.tolist(), lengths.tolist()
    chunks = [starts[b + 1] - starts[b] for b in range(len(counts))]
    alone = [b for b, t in enumerate(chunks) if t >= CAUSAL_ROWS and t == counts[b]]
    for group in [[b] for b in alone] + _groups(
        [b for b, t in enumerate(chunks) if t and b not in alone], chunks, counts
    ):
        _prefill_group(out, q, layer, block_tables, group, starts, chunks, counts, scale)
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


def _prefill_group(
    out: Tensor, q: Tensor, layer: KVLayer, block_tables: Tensor, group: list[int], starts: list[int],
    chunks: list[int], counts: list[int], scale: float,
) -> None:
    (_, heads, d), hkv = q.shape, layer.kv_heads
    t, longest = max(chunks[b] for b in group), max(counts[b] for b in group)
    lengths, news = torch.tensor([counts[b] for b in group]), torch.tensor([chunks[b] for b in group])
    table, held = _blocks(block_tables[group], lengths, lengths.tolist(), layer.block_size)

    def side(words: Tensor, scales: Tensor | None, codec: Codec) -> Tensor:
        x = _gather(words, table, len(group))
        if scales is not None:
            x = decode(x, _gather(scales, table, len(group)), codec).bfloat16()
        _clear_tails(x, held, lengths, layer.block_size)
        return x[:, :, :longest].transpose(0, 1)

    k, v = side(layer.key, layer.key_scale, layer.format.key), side(layer.value, layer.value_scale, layer.format.value)
    if len(group) == 1:
        rows = slice(starts[group[0]], starts[group[0]] + t)
        x = q[None, rows]
    else:
        at = torch.tensor([starts[b] for b in group])[:, None] + torch.arange(t).minimum(
            news[:, None] - 1
        )  # padding repeats the last row
        x = q[at]
    x = x.to(torch.bfloat16)
    if len(group) == 1 and t == longest:
        y = F.scaled_dot_product_attention(
            x.transpose(1, 2), k, v, is_causal=True, scale=scale, enable_gqa=True
        ).transpose(1, 2)
    else:
        position = lengths[:, None] - news[:, None] + torch.arange(t).minimum(news[:, None] - 1)
        seen = (
            (torch.arange(longest) <= position[:, :, None])[:, None, None]
            .expand(-1, 1, heads // hkv, -1, -1)
            .flatten(2, 3)
        )
        packed = x.view(len(group), t, hkv, -1, d).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, group * T, D]
        y = F.scaled_dot_product_attention(packed, k, v, seen, scale=scale)
        y = y.view(len(group), hkv, -1, t, d).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if len(group) == 1:
        out[rows] = y[0]
    else:
        live = torch.arange(t) < news[:, None]
        out[at[live]] = y[live].to(out.dtype)
